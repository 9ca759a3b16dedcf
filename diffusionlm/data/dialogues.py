"""Instruction data for supervised fine-tuning: dialogues as records of prompts and answers.

A record is one dialogue. Its `segment_ids` count its parts: 1 is the first prompt, 2 its answer, 3 what stands before
the second answer, and so on; an EOS ends the last answer, and more of them, in segment 0, fill the record. A trainer
gets one example of it at a time (`select_turn`), in which segment 1 is the whole prompt and 2 the answer with its EOS.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from diffusionlm.config import ANSWER, PROMPT
from diffusionlm.data.chat_templates import Message, Template
from diffusionlm.data.items import Item, record_of
from diffusionlm.data.records import Record, read_record
from diffusionlm.data.words import Codec, Counts, EncodedDocument, mark_starts, split_words


def read(item: Item, ignored: Collection[str] = ()) -> Record:
    """Return the dialogue of an item, up to its last answer that is not blank, and the names of its unread fields.

    Without an answer there are no messages.

    Args:
      item: a JSON object.
      ignored: fields that are taken for absent.

    Raises:
      ValueError: it is malformed, or of no known shape; the message is the reason.
    """
    if not item.is_json:
        raise ValueError("plain text; format=sft reads JSON objects")
    if (fields := record_of(item)) is None:
        return Record([], [])
    messages, unread = read_record(fields, ignored)
    blank = (i for i, m in enumerate(messages) if m.role == "assistant" and not m.content.strip())
    messages = messages[: next(blank, len(messages))]
    answers = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
    questions = [i for i, (role, _) in enumerate(messages) if role == "user"]
    answered = answers and questions and questions[0] < answers[-1]
    return Record(messages[: answers[-1] + 1] if answered else [], unread)


def encode(messages: Sequence[Message], codec: Codec, template: Template, length: int) -> EncodedDocument:
    """Encode a dialogue up to the last answer that ends, with its EOS, within `length` tokens.

    Answers that end beyond `length` are left out; that may be all of them.

    Returns:
      The dialogue, in whose words the first token of each part is marked.

    Raises:
      ValueError: as `Template.parts` does.
    """
    parts = template.parts(messages, codec.tokenizer)
    sizes = np.array([len(part.ids) for part in parts])
    if not sizes.all():
        raise ValueError("an answer that the tokenizer makes no token of")
    ends = np.cumsum(sizes)
    fitting = int((ends[1::2] < length).sum())
    kept = parts[: 2 * fitting]
    answers = [part for part in kept if part.answer]
    ids = [i for part in kept for i in part.ids] + [codec.tokenizer.eos_id] * bool(kept)
    words = np.array(ids, codec.word)
    mark_starts(words, (ends - sizes)[: len(kept)])
    counts = Counts(
        documents=len(answers),
        tokens=sum(len(part.ids) + 1 for part in answers),
        raw_bytes=sum(len(part.text.encode()) for part in answers),
        token_bytes=int(sum(codec.token_bytes[part.ids].sum() for part in answers)),
        too_long=len(parts) // 2 - fitting,
    )
    return EncodedDocument(json.dumps(messages), words, counts)


def pad_records(
    words_N: np.ndarray, lengths_R: Sequence[int] | np.ndarray, length: int, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return some dialogues of a stream as (tokens, segment ids), both (R, length).

    Args:
      words_N: the dialogues, one after another.
      lengths_R: words of each.
      length: tokens of a record.
      eos_id: fills a record, in segment 0.
    """
    tokens_RxL = np.full((len(lengths_R), length), eos_id, words_N.dtype)
    segment_ids_RxL = np.zeros_like(tokens_RxL)
    within_RxL = np.arange(length)[None] < np.asarray(lengths_R)[:, None]
    tokens_RxL[within_RxL], segment_ids_RxL[within_RxL] = split_words(words_N)
    return tokens_RxL, np.cumsum(segment_ids_RxL, axis=1, dtype=words_N.dtype) * within_RxL


def select_turn(rows: dict[str, np.ndarray], draws: Iterable[int], eos_id: int) -> dict[str, np.ndarray]:
    """Return each dialogue up to one of its answers, numbered from 0: its draw modulo the number of answers.

    LLaDA (arXiv 2502.09992, Appendix B.1) makes n pairs (history, answer) of a dialogue of n turns, and samples one
    each time. Segments are then PROMPT, ANSWER with one EOS, and 0.

    Args:
      rows: "tokens" and "segment_ids" of records, int32 (B, L).
      draws: a random number for each row.
      eos_id: ends an answer and fills the row.
    """
    tokens_BxL, parts_BxL = rows["tokens"], rows["segment_ids"]
    turns_B = parts_BxL.max(1) // 2
    chosen_B = np.fromiter(draws, np.int64, len(turns_B)) % np.maximum(turns_B, 1) + 1
    kept_BxL = (parts_BxL > 0) & (parts_BxL <= 2 * chosen_B[:, None])
    # The last answer of a record has its EOS there already.
    end_BxL = (np.arange(tokens_BxL.shape[1])[None] == kept_BxL.sum(1)[:, None]) & (chosen_B < turns_B)[:, None]
    answer_BxL = (parts_BxL == 2 * chosen_B[:, None]) | end_BxL
    return {
        "tokens": np.where(kept_BxL, tokens_BxL, np.int32(eos_id)),
        "segment_ids": np.where(answer_BxL, np.int32(ANSWER), np.where(kept_BxL, np.int32(PROMPT), np.int32(0))),
    }


def draw(*address: int | str) -> int:
    """Return a number in [0, 2**32) that looks random and is a function of the address alone, on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, address)).encode()).digest()[:4])
