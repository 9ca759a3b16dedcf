"""Instruction data for supervised fine-tuning: dialogues as records of prompts and answers.

A record is one dialogue. Its `segment_ids` count its parts: 1 is the first prompt, 2 its answer, 3 what stands before
the second answer, and so on; an EOS ends the last answer, and more of them, in segment 0, fill the record. A trainer
gets one example of it at a time (`select_turn`), in which segment 1 is the whole prompt and 2 the answer with its EOS.

A packed record holds several dialogues, one after another, each numbered from 1. An odd part that ends a dialogue is
EOS padding that belongs to it (`slots`).
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from diffusionlm.config_data import ANSWER, PADDING, PARTS, PROMPT
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


class Layout(NamedTuple):
    """The places of dialogues in records; int64 arrays with a number for each dialogue, in the order of the stream."""

    lengths_D: np.ndarray  # its words
    slots_D: np.ndarray  # its words with the padding that belongs to it
    records_D: np.ndarray  # the record that it is in; each record has consecutive ones

    @classmethod
    def of(cls, lengths_D: np.ndarray, sequence_length: int, *, packed: bool) -> "Layout":
        """Return a layout with one dialogue in a record or, packed, with as many as fit into `sequence_length`."""
        if not packed:
            return cls(lengths_D, lengths_D, np.arange(len(lengths_D)))
        slots_D = slots(lengths_D)
        return cls(lengths_D, slots_D, next_fit(slots_D, sequence_length))

    def part(self, start: int, stop: int) -> "Layout":
        """Return the layout of the records in a range, numbered from 0."""
        first, last = np.searchsorted(self.records_D, [start, stop])
        return Layout(self.lengths_D[first:last], self.slots_D[first:last], self.records_D[first:last] - start)


def slots(lengths_D: np.ndarray) -> np.ndarray:
    """Return the words of each dialogue with its padding: as many as the longer of it and another one, drawn once.

    LLaDA pads each example to the longest of its mini-batch, of local batches of 2. So the padding that is learned has
    the same distribution when examples are packed; the other one is the same in every epoch.
    """
    others = np.random.RandomState(0).permutation(len(lengths_D))  # its numbers are the same in all versions of NumPy
    return np.maximum(lengths_D, lengths_D[others])


def next_fit(slots_D: np.ndarray, capacity: int) -> np.ndarray:
    """Return the record of each dialogue, from 0: the one before's if it has room, else the next."""
    records_D, record, used = np.zeros(len(slots_D), np.int64), 0, 0
    for i, slot in enumerate(slots_D.tolist()):
        if used + slot > capacity:
            record, used = record + 1, 0
        records_D[i] = record
        used += slot
    return records_D


def lay_out(words_N: np.ndarray, layout: Layout, length: int, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return some dialogues of a stream as records: tokens and segment ids, both (R, length).

    Args:
      words_N: the dialogues, one after another.
      layout: where they go.
      length: tokens of a record.
      eos_id: fills what is left of slots and, in segment 0, of records.
    """
    lengths_D, slots_D, records_D = layout
    before_D = np.cumsum(slots_D) - slots_D  # in all slots
    first_D = np.searchsorted(records_D, records_D)  # the first dialogue of the same record
    starts_D = records_D * length + before_D - before_D[first_D]
    tokens = np.full((int(records_D[-1]) + 1) * length, eos_id, words_N.dtype)
    segment_ids = np.zeros_like(tokens)
    within_N = np.arange(len(words_N)) - np.repeat(np.cumsum(lengths_D) - lengths_D, lengths_D)
    places_N = np.repeat(starts_D, lengths_D) + within_N
    tokens[places_N], marks_N = split_words(words_N)
    counts_N = np.cumsum(marks_N, dtype=np.int64)
    ends_D = np.cumsum(lengths_D) - 1
    before_parts_D = np.concatenate([[0], counts_N[ends_D[:-1]]])
    segment_ids[places_N] = counts_N - np.repeat(before_parts_D, lengths_D)
    padding_D = slots_D - lengths_D
    within_P = np.arange(padding_D.sum()) - np.repeat(np.cumsum(padding_D) - padding_D, padding_D)
    segment_ids[np.repeat(starts_D + lengths_D, padding_D) + within_P] = np.repeat(
        counts_N[ends_D] - before_parts_D + 1, padding_D
    )
    return tokens.reshape(-1, length), segment_ids.reshape(-1, length)


def places(parts_L: np.ndarray) -> list[tuple[slice, int]]:
    """Return where each dialogue of a record is, without its padding, and how many tokens of padding follow it."""
    begins_L = (parts_L == 1) & (np.concatenate([[0], parts_L[:-1]]) != 1)
    starts = np.flatnonzero(begins_L).tolist()
    ends = [*starts[1:], int(np.count_nonzero(parts_L))]
    dialogues = []
    for start, end in zip(starts, ends, strict=True):
        parts = parts_L[start:end]
        padding = int((parts == parts[-1]).sum()) if parts[-1] % 2 else 0
        dialogues.append((slice(start, end - padding), padding))
    return dialogues


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


def select_turns(
    rows: dict[str, np.ndarray], addresses: Iterable[tuple[int | str, ...]], eos_id: int
) -> dict[str, np.ndarray]:
    """Return packed records in which each dialogue goes up to one of its answers, as in `select_turn`.

    A dialogue that is cut keeps its amount of padding. Segments are PARTS * (number of the dialogue in its record) +
    PROMPT, ANSWER or PADDING, and 0.

    Args:
      rows: "tokens" and "segment_ids" of records, int32 (B, L).
      addresses: of each row, for `draw`; that of a dialogue after the first has its number in addition.
      eos_id: ends an answer and fills the row.
    """
    tokens_BxL = np.full_like(rows["tokens"], eos_id)
    ids_BxL = np.zeros_like(rows["segment_ids"])
    for row, address in enumerate(addresses):
        for number, (place, padding) in enumerate(places(rows["segment_ids"][row])):
            dialogue = {name: values[row : row + 1, place] for name, values in rows.items()}
            turn = select_turn(dialogue, [draw(*address, *[number] * (number > 0))], eos_id)
            parts = turn["segment_ids"][0]
            size = np.count_nonzero(parts)
            start = place.start
            tokens_BxL[row, place] = turn["tokens"][0]
            ids_BxL[row, start : start + size] = parts[:size] + PARTS * number
            ids_BxL[row, start + size : start + size + padding] = PADDING + PARTS * number
    return {"tokens": tokens_BxL, "segment_ids": ids_BxL}


def draw(*address: int | str) -> int:
    """Return a number in [0, 2**32) that looks random and is a function of the address alone, on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, address)).encode()).digest()[:4])
