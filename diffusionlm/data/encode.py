"""Encode documents to token streams, one batch per job, and train the tokenizer."""

import contextlib
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusionlm.data import dialogues, tokenizers
from diffusionlm.data.chat_templates import Template
from diffusionlm.data.items import Item
from diffusionlm.data.selection import Selection
from diffusionlm.data.sources import Source
from diffusionlm.data.stream import BuildContext, TokenStream
from diffusionlm.data.tokenizers import Tokenizer
from diffusionlm.data.words import Codec, Counts, EncodedDocument, mark_starts
from diffusionlm.errors import UserError

BATCH_BYTES = 1 << 20  # of a source that a worker encodes at a time
TRAINING_BYTES = 1 << 27  # of text that a tokenizer is trained on: the first training documents


class EncodeRules(NamedTuple):
    """The rules by which documents are encoded and sorted into splits."""

    held_out: float  # fraction of "train" that goes to "validation", by a hash
    selection: Selection  # of texts
    sequence_length: int
    template: Template | None = None  # of dialogues; None: the items are texts
    bos: bool = False  # of texts: BOS precedes each
    ignore_fields: tuple[str, ...] = ()  # of JSON objects: names of fields that are left out on purpose


@dataclass(frozen=True)
class EncodeJob:
    """Items of one source, in order."""

    items: Sequence[Item]
    split: str
    rules: EncodeRules
    tokenizer_file: Path  # JSON of `Tokenizer.to_dict`


class Part(NamedTuple):
    """The part of one split's stream that a job adds."""

    words: np.ndarray
    lengths: np.ndarray  # words of each dialogue; of texts, nothing
    counts: Counts


class Encoded(NamedTuple):
    """The outcome of a job."""

    parts: dict[str, Part]
    malformed: list[str]  # "location: reason"
    empty: int
    progress: int  # bytes of the source
    unread: Counter[str]  # field of JSON objects -> objects in which it holds something that no document has
    left_out: Counter[str]  # option of the selection -> documents that it leaves out


class EncodedSplits(NamedTuple):
    """The token stream of every split, and how many documents and which fields are in none."""

    streams: dict[str, TokenStream]
    malformed: int
    empty: int
    unread: Counter[str]  # field of JSON objects -> objects in which it holds something that no document has
    left_out: Counter[str]  # option of the selection -> documents that it leaves out


def encode_splits(
    context: BuildContext, sources: Mapping[str, Source], rules: EncodeRules, tokenizer: Tokenizer, *, on_error: str
) -> EncodedSplits:
    """Write the token stream of every split.

    Args:
      context: the directory, and how jobs are run.
      sources: by split.
      rules: how documents are encoded.
      tokenizer: encodes them.
      on_error: "stop" or "skip", for malformed documents.

    Raises:
      UserError: a document is malformed, and on_error is "stop".
    """
    tokenizer_file = context.directory / "tokenizer.json"
    tokenizer_file.write_text(json.dumps(tokenizer.to_dict()))
    jobs = (
        EncodeJob(items, split, rules, tokenizer_file)
        for split, source in sources.items()
        for items in _batches(source)
    )
    names = [*sources, *(["validation"] if rules.held_out else [])]
    bar = context.bars.add_task("encoding", total=sum(source.total for source in sources.values()))
    malformed, empty, unread, left_out = 0, 0, Counter[str](), Counter[str]()
    with contextlib.ExitStack() as files:
        streams = {split: TokenStream(context.directory / f"{split}.tokens") for split in names}
        for stream in streams.values():
            files.enter_context(stream.file)
        for encoded in context.map(encode, jobs):
            if encoded.malformed and on_error == "stop":
                raise _malformed(encoded.malformed[0])
            for split, part in encoded.parts.items():
                streams[split].append(*part)
            malformed += len(encoded.malformed)
            empty += encoded.empty
            unread += encoded.unread
            left_out += encoded.left_out
            context.bars.advance(bar, encoded.progress)
    tokenizer_file.unlink()
    return EncodedSplits(streams, malformed, empty, unread, left_out)


def _malformed(reason: str) -> UserError:
    return UserError(f"{reason}; correct the line, or leave such lines out with --on_error skip")


def _batches(source: Source) -> Iterator[list[Item]]:
    batch, size = [], 0
    for item in source:
        batch.append(item)
        size += len(item.payload)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode(job: EncodeJob) -> Encoded:
    """Encode every document of a job, end it with EOS and sort it into its split."""
    rules = job.rules
    codec = _read_codec(job.tokenizer_file)
    splits: dict[str, list[EncodedDocument]] = {}
    malformed, empty, unread, left_out = [], 0, Counter[str](), Counter[str]()
    for item in job.items:
        try:
            document, fields, reason = _encode_item(item, codec, rules)
        except ValueError as error:
            malformed.append(f"{item.location}: {error}")
            continue
        unread.update(fields)
        if reason:
            left_out[reason] += 1
            continue
        if document is None:
            empty += 1
            continue
        split = "validation" if is_held_out(document.key, rules.held_out) else job.split
        splits.setdefault(split, []).append(document)
    parts = {}
    for split, documents in splits.items():
        lengths = [len(document.words) for document in documents if len(document.words) and rules.template]
        parts[split] = Part(
            np.concatenate([document.words for document in documents]),
            np.array(lengths, np.int64),
            Counts.sum(document.counts for document in documents),
        )
    return Encoded(parts, malformed, empty, sum(item.progress for item in job.items), unread, left_out)


def _encode_item(item: Item, codec: Codec, rules: EncodeRules) -> tuple[EncodedDocument | None, Iterable[str], str]:
    """Return a text or dialogue, None if it is empty; the fields that are not in it; and why it is left out, if so.

    Raises:
      ValueError: the item is malformed; the message is the reason.
    """
    if rules.template:
        messages, unread = dialogues.read(item, rules.ignore_fields)
        if not messages:
            return None, unread, ""
        return dialogues.encode(messages, codec, rules.template, rules.sequence_length), unread, ""
    text, names, left_out = rules.selection.read(item)
    return _encode_text(text, codec, rules.bos) if text else None, set(names) - {*rules.ignore_fields}, left_out


def _encode_text(text: str, codec: Codec, bos: bool) -> EncodedDocument:
    """Return a text with its EOS, and with BOS if that is asked for."""
    tokenizer = codec.tokenizer
    start = [tokenizer.bos_id] if bos else []
    words = np.array([*start, *tokenizer.encode(text), tokenizer.eos_id], codec.word)
    counts = Counts(1, len(words), len(text.encode()), int(codec.token_bytes[words].sum()))
    mark_starts(words, 0)
    return EncodedDocument(text, words, counts)


def is_held_out(text: str, fraction: float) -> bool:
    """Return True if a document belongs to validation, by its text alone: equal documents fall into one split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < fraction * 2**64


@functools.lru_cache(maxsize=1)
def _read_codec(tokenizer_file: Path) -> Codec:
    return Codec.of(tokenizers.from_dict(json.loads(tokenizer_file.read_text())))


def training_texts(source: Source, rules: EncodeRules, *, sft: bool, on_error: str) -> Iterator[str]:
    """Yield the first documents of a source that will be in the training split, to train a tokenizer on.

    Args:
      source: of "train".
      rules: how documents are encoded, with any template.
      sft: whether documents are dialogues, of which the messages are yielded.
      on_error: "stop" or "skip", for malformed documents.

    Raises:
      UserError: a document is malformed, and on_error is "stop".
    """
    size = 0
    for item in source:
        try:
            if sft:
                messages, _ = dialogues.read(item, rules.ignore_fields)
                key, text = json.dumps(messages), "\n".join(message.content for message in messages)
            else:
                key = text = (selected := rules.selection.read(item)).text
                if selected.left_out:
                    continue
        except ValueError as error:
            if on_error == "stop":
                raise _malformed(f"{item.location}: {error}") from None
            continue
        if not is_held_out(key, rules.held_out):
            yield text
            size += len(item.payload)
            if size >= TRAINING_BYTES:
                return
