"""Instruction data for supervised fine-tuning: dialogues as records of prompts and answers.

A record is one dialogue. Its `segment_ids` count its parts: 1 is the first prompt, 2 its answer, 3 what stands before
the second answer, and so on; an EOS ends the last answer, and more of them, in segment 0, fill the record. A trainer
gets one example of it at a time (`select_turn`), in which segment 1 is the whole prompt and 2 the answer with its EOS.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from diffusionlm.config import ANSWER, PROMPT
from diffusionlm.data.chat_templates import ROLES, Message, Template
from diffusionlm.data.sources import Item, checked_text, record_of
from diffusionlm.data.words import Codec, Counts, EncodedDocument, mark_starts, split_words

# Fields of a record with one question; an "instruction" may have an "input".
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
# Fields of a record with a dialogue, and the fields of its messages: role, content.
DIALOGUES = {"messages": ("role", "content"), "conversations": ("from", "value")}
SPEAKERS = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


def messages_of(item: Item) -> list[Message]:
    """Return the dialogue of a record, up to its last answer that is not blank; [] if it has no answer.

    Raises:
      ValueError: it is malformed, or of no known shape; the message is the reason.
    """
    if not item.is_json:
        raise ValueError("plain text; format=sft reads JSON objects")
    if (record := record_of(item)) is None:
        return []
    messages = _messages(record)
    blank = (i for i, m in enumerate(messages) if m.role == "assistant" and not m.content.strip())
    messages = messages[: next(blank, len(messages))]
    answers = [i for i, (role, _) in enumerate(messages) if role == "assistant"]
    questions = [i for i, (role, _) in enumerate(messages) if role == "user"]
    return messages[: answers[-1] + 1] if answers and questions and questions[0] < answers[-1] else []


def _messages(record: dict[str, Any]) -> list[Message]:
    for field, keys in DIALOGUES.items():
        if field in record:
            turns = record[field]
            if not isinstance(turns, list):
                raise ValueError(f"field {field!r} is {type(turns).__name__}, not a list of messages")
            return [_message(f"{field}[{i}]", turn, *keys) for i, turn in enumerate(turns)]
    for question, answer in PAIRS:
        if question in record and answer in record:
            prompt = checked_text(f"field {question!r}", record[question])
            if question == "instruction" and (extra := record.get("input")):
                prompt += "\n\n" + checked_text("field 'input'", extra)
            response = checked_text(f"field {answer!r}", record[answer])
            return [Message("user", prompt), Message("assistant", response)]
    known = ", ".join(["+".join(pair) for pair in PAIRS] + list(DIALOGUES))
    raise ValueError(f"fields {', '.join(map(repr, record)) or 'none'} are of no known shape; known: {known}")


def _message(location: str, turn: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(turn, dict) or not {role_key, content_key} <= set(turn):
        raise ValueError(f"{location} is not an object with the fields {role_key!r} and {content_key!r}")
    if not isinstance(speaker := turn[role_key], str) or speaker not in SPEAKERS:
        raise ValueError(f"{location} is by {speaker!r}; known: {', '.join(SPEAKERS)}")
    return Message(SPEAKERS[speaker], checked_text(f"{location}[{content_key!r}]", turn[content_key]))


def encode(item: Item, codec: Codec, template: Template, length: int) -> EncodedDocument | None:
    """Encode a dialogue up to the last answer that ends, with its EOS, within `length` tokens.

    Answers that end beyond `length` are left out; that may be all of them.

    Returns:
      The dialogue, in whose words the first token of each part is marked; None if it has no answer.

    Raises:
      ValueError: as `messages_of` and `Template.parts` do.
    """
    messages = messages_of(item)
    if not messages:
        return None
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
