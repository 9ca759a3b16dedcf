"""Instruction data for supervised fine-tuning: dialogues as records of prompts and answers.

A record is one dialogue. Its `segment_ids` count its parts: 1 is the first prompt, 2 its answer, 3 what stands before
the second answer, and so on; an EOS ends the last answer, and more of them, in segment 0, fill the record. What trains
on it gets one example of it at a time (`one_turn`), in which 1 is all that is given and 2 the answer with its EOS.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusionlm.config import ANSWER, PROMPT
from diffusionlm.data.chat_templates import ROLES, Message, Template
from diffusionlm.data.sources import Item, checked_text, record_of
from diffusionlm.data.tokenizers.kinds import Tokenizer

# Fields of a record with one question; an "instruction" may have an "input".
PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
# Fields of a record with a dialogue, and those of a message: who, what.
DIALOGUES = {"messages": ("role", "content"), "conversations": ("from", "value")}
SPEAKERS = {role: role for role in ROLES} | {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}


def messages_of(item: Item) -> list[Message]:
    """The dialogue that a record holds, up to its last answer that is not blank; [] where there is none.

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
    asked = [i for i, (role, _) in enumerate(messages) if role == "user"]
    return messages[: answers[-1] + 1] if answers and asked and asked[0] < answers[-1] else []


def _messages(record: dict) -> list[Message]:
    for field, (who, what) in DIALOGUES.items():
        if field in record:
            turns = record[field]
            if not isinstance(turns, list):
                raise ValueError(f"field {field!r} is {type(turns).__name__}, not a list of messages")
            return [_message(f"{field}[{i}]", turn, who, what) for i, turn in enumerate(turns)]
    for asked, answered in PAIRS:
        if asked in record and answered in record:
            prompt = checked_text(f"field {asked!r}", record[asked])
            if asked == "instruction" and (extra := record.get("input")):
                prompt += "\n\n" + checked_text("field 'input'", extra)
            answer = checked_text(f"field {answered!r}", record[answered])
            return [Message("user", prompt), Message("assistant", answer)]
    known = ", ".join(["+".join(pair) for pair in PAIRS] + list(DIALOGUES))
    raise ValueError(f"fields {', '.join(map(repr, record)) or 'none'} are of no known shape; known: {known}")


def _message(where: str, turn: Any, who: str, what: str) -> Message:
    if not isinstance(turn, dict) or not {who, what} <= set(turn):
        raise ValueError(f"{where} is not an object with the fields {who!r} and {what!r}")
    if not isinstance(speaker := turn[who], str) or speaker not in SPEAKERS:
        raise ValueError(f"{where} is by {speaker!r}; known: {', '.join(SPEAKERS)}")
    return Message(SPEAKERS[speaker], checked_text(f"{where}[{what!r}]", turn[what]))


class Encoded(NamedTuple):
    """A document as tokens; of a dialogue, the counts are of its answers."""

    key: str  # what it is held out by
    words: np.ndarray  # as in the token stream: the top bit set on the first token of each part
    documents: int
    tokens: int  # with the EOS that each answer ends with when it is learnt
    raw_bytes: int
    token_bytes: int
    too_long: int  # answers that are left out


def encode(
    item: Item, template: Template, tokenizer: Tokenizer, token_bytes: np.ndarray, word: np.dtype, length: int
) -> Encoded | None:
    """A dialogue up to the last answer that ends, with its EOS, within `length` tokens; None where it has no answer.

    Answers that end behind are left out, and so may be all of them.

    Raises:
      ValueError: as of `messages_of` and `Template.parts`.
    """
    messages = messages_of(item)
    if not messages:
        return None
    parts = template.parts(messages, tokenizer)
    sizes = np.array([len(part.ids) for part in parts])
    if not sizes.all():
        raise ValueError("an answer that the tokenizer makes no token of")
    ends = np.cumsum(sizes)
    fitting = int((ends[1::2] < length).sum())
    kept = parts[: 2 * fitting]
    answers = [part for part in kept if part.answer]
    words = np.array([i for part in kept for i in part.ids] + [tokenizer.eos_id] * bool(kept), word)
    words[(ends - sizes)[: len(kept)]] |= word.type(1 << (8 * word.itemsize - 1))
    return Encoded(
        json.dumps(messages),
        words,
        len(answers),
        sum(len(part.ids) + 1 for part in answers),
        sum(len(part.text.encode()) for part in answers),
        int(sum(token_bytes[part.ids].sum() for part in answers)),
        len(parts) // 2 - fitting,
    )


def padded(words_N: np.ndarray, lengths_R: Sequence[int], length: int, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """The records of some dialogues of a stream, one after another, as (tokens, segment ids), both (R, length)."""
    top_bit = 8 * words_N.itemsize - 1
    tokens_RxL = np.full((len(lengths_R), length), eos_id, words_N.dtype)
    segment_ids_RxL = np.zeros_like(tokens_RxL)
    within_RxL = np.arange(length)[None] < np.asarray(lengths_R)[:, None]
    tokens_RxL[within_RxL] = words_N & ((1 << top_bit) - 1)
    segment_ids_RxL[within_RxL] = words_N >> top_bit
    return tokens_RxL, np.cumsum(segment_ids_RxL, axis=1, dtype=words_N.dtype) * within_RxL


def one_turn(rows: dict[str, np.ndarray], draws: Iterable[int], eos_id: int) -> dict[str, np.ndarray]:
    """Each dialogue up to one of its answers: `draws` modulo their number, from 0.

    LLaDA (arXiv 2502.09992, Appendix B.1) makes n pairs (history, answer) of a dialogue of n turns, and samples one
    each time. Segments are then PROMPT, ANSWER with one EOS, and 0.
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
    """A number that looks random and is a function of the address alone, on every machine and in every version."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, address)).encode()).digest()[:4])
