"""Encode documents to token streams, one job for each piece of a source; and those that a tokenizer is trained on."""

import contextlib
import functools
import hashlib
import json
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from diffusionlm.data import contamination, dialogues, duplicates, tokenizers
from diffusionlm.data.chat_templates import Template
from diffusionlm.data.items import Item
from diffusionlm.data.jobs import Receipt
from diffusionlm.data.selection import Selection, is_held_out
from diffusionlm.data.sources import Piece
from diffusionlm.data.stream import BuildContext, TokenStream, read_index
from diffusionlm.data.tokenizers import Tokenizer
from diffusionlm.data.words import Codec, Counts, EncodedDocument, mark_starts
from diffusionlm.errors import UserError
from diffusionlm.storage import write_atomically

TOKENIZER_FILE = "parts/tokenizer.json"  # of the directory of jobs
MOST_MALFORMED = 10  # documents of a piece that are named
TRAINING_BYTES = 1 << 27  # of a source that a tokenizer is trained on


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
    """The documents of a piece, as words and, of dialogues, their lengths, in files for each split."""

    piece: Piece
    split: str
    index: int  # of the piece, in the order of the source
    rules: EncodeRules
    directory: str

    @property
    def receipt(self) -> str:
        """The file with the counts."""
        return f"{self.directory}/parts/{self.index:07d}.json"

    def file(self, split: str, kind: str) -> str:
        """Return the file of the "words" or "lengths" that the piece gives to a split."""
        return f"{self.directory}/parts/{self.index:07d}.{split}.{kind}"

    def work(self) -> Receipt:
        """Encode every document, end it with EOS and sort it into its split."""
        return _Encoding(self).run()


class _Encoding:
    """One run of an `EncodeJob`."""

    def __init__(self, job: EncodeJob):
        self._job, self._codec = job, _read_codec(f"{job.directory}/{TOKENIZER_FILE}")
        self._lengths: dict[str, list[int]] = {}
        self._counts: dict[str, Counts] = {}
        self._malformed, self._malformed_count, self._empty = [], 0, 0
        self._unread, self._left_out, self._found = Counter[str](), Counter[str](), []
        self._decontamination = contamination.read(job.directory)

    def run(self) -> Receipt:
        """Write the files and return their counts."""
        job = self._job
        dropped = duplicates.dropped(job.directory, job.index)
        with part_files({split: job.file(split, "words") for split in (job.split, "validation")}) as write:
            for number, item in enumerate(job.piece):
                if dropped and dropped[number]:
                    self._left_out[duplicates.REASON] += 1
                elif (entry := self._encode(item)) is not None:
                    write(*entry)
        for split, lengths in self._lengths.items():
            write_atomically(job.file(split, "lengths"), np.array(lengths, "<i8").tobytes())
        return {
            "splits": {split: counts._asdict() for split, counts in self._counts.items()},
            "words": {split: self._words(split) for split in self._counts},
            "lengths": {split: len(lengths) for split, lengths in self._lengths.items()},
            "malformed": self._malformed,
            "malformed_count": self._malformed_count,
            "empty": self._empty,
            "unread": dict(self._unread),
            "left_out": dict(self._left_out),
            "contaminated": self._found,
            "progress": job.piece.progress,
        }

    def _words(self, split: str) -> int:
        return epath.Path(self._job.file(split, "words")).stat().length // self._codec.word.itemsize

    def _encode(self, item: Item) -> tuple[str, bytes] | None:
        """Return the split and the words of a document that is taken."""
        job = self._job
        try:
            document, fields, reason = _encode_item(item, self._codec, job.rules)
        except ValueError as error:
            self._malformed_count += 1
            if len(self._malformed) < MOST_MALFORMED:
                self._malformed.append(f"{item.location}: {error}")
            return None
        self._unread.update(fields)
        if reason or document is None:
            self._left_out.update([reason] if reason else [])
            self._empty += not reason
            return None
        split = "validation" if is_held_out(document.key, job.rules.held_out) else job.split
        if split == "train" and self._decontamination and (match := self._decontamination.match(document.key)):
            self._left_out[contamination.REASON] += 1
            self._found.append({"location": str(item.location), **match})
            return None
        self._counts[split] = Counts.sum([self._counts.get(split, Counts()), document.counts])
        if job.rules.template:
            self._lengths.setdefault(split, []).extend([len(document.words)] if len(document.words) else [])
        return split, document.words.tobytes()


@contextlib.contextmanager
def part_files(paths: Mapping[str, str]) -> Iterator[Callable[[str, bytes], None]]:
    """Yield a function that appends to one of several files; those with content appear at the end.

    Args:
      paths: by the name of each.
    """
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        partial = {name: epath.Path(f"{path}.{uuid.uuid4().hex[:8]}.partial") for name, path in paths.items()}

        def write(name: str, data: bytes) -> None:
            if name not in files:
                files[name] = stack.enter_context(partial[name].open("wb"))
            files[name].write(data)

        try:
            yield write
        except BaseException:
            stack.close()
            for name in files:
                partial[name].unlink(missing_ok=True)
            raise
    for name in files:
        partial[name].replace(paths[name])


class EncodedSplits(NamedTuple):
    """The token stream of every split, and how many documents and which fields are in none."""

    streams: dict[str, TokenStream]
    malformed: int
    empty: int
    unread: Counter[str]  # field of JSON objects -> objects in which it holds something that no document has
    left_out: Counter[str]  # option of the selection -> documents that it leaves out
    contaminated: list[dict[str, Any]]  # of each document that `decontaminate` leaves out: where it is, and its n-gram


def forget_files() -> None:
    """Forget what was read of earlier datasets, whose directory may have been the same."""
    for cached in (_read_codec, contamination.read, duplicates.read_pieces, read_index):
        cached.cache_clear()


def encode_splits(
    context: BuildContext,
    pieces: Iterable[tuple[str, Piece]],
    names: Sequence[str],
    rules: EncodeRules,
    *,
    on_error: str,
) -> EncodedSplits:
    """Write the token stream of every split, with the tokenizer that is in the directory (see `write_tokenizer`).

    Args:
      context: the directory, and how jobs are run.
      pieces: of all sources, with their splits.
      names: of the splits that there will be.
      rules: how documents are encoded.
      on_error: "stop" or "skip", for malformed documents.

    Raises:
      UserError: a document is malformed, and on_error is "stop".
    """
    word = _read_codec(f"{context.directory}/{TOKENIZER_FILE}").word
    streams = {split: TokenStream(word) for split in names}
    encoded = EncodedSplits(streams, 0, 0, Counter(), Counter(), [])
    made: deque[EncodeJob] = deque()

    def jobs() -> Iterator[EncodeJob]:
        for index, (split, piece) in enumerate(pieces):
            made.append(EncodeJob(piece, split, index, rules, str(context.directory)))
            yield made[-1]

    with context.bar("encoding") as advance:
        for receipt in context.run(jobs()):
            job = made.popleft()
            if receipt["malformed"] and on_error == "stop":
                raise _malformed(receipt["malformed"][0])
            for split, counts in receipt["splits"].items():
                streams[split].append(job.file(split, "words"), receipt["words"][split], Counts(**counts))
                if split in receipt["lengths"]:
                    streams[split].append_lengths(job.file(split, "lengths"), receipt["lengths"][split])
            encoded = encoded._replace(
                malformed=encoded.malformed + receipt["malformed_count"], empty=encoded.empty + receipt["empty"]
            )
            encoded.unread.update(receipt["unread"])
            encoded.left_out.update(receipt["left_out"])
            encoded.contaminated.extend(receipt["contaminated"])
            advance(receipt["progress"])
    return encoded


def write_tokenizer(directory: epath.Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer of jobs into their directory."""
    write_atomically(directory / TOKENIZER_FILE, json.dumps(tokenizer.to_dict()))


def _malformed(reason: str) -> UserError:
    return UserError(f"{reason}; correct the line, or leave such lines out with --on_error skip")


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


@functools.lru_cache(maxsize=1)
def _read_codec(tokenizer_file: str) -> Codec:
    return Codec.of(tokenizers.from_dict(json.loads(epath.Path(tokenizer_file).read_text())))


def training_texts(pieces: Sequence[Piece], rules: EncodeRules, *, sft: bool, on_error: str) -> Iterator[str]:
    """Yield documents of the training split, to train a tokenizer on: all, or those of a sample of the pieces.

    Of a source of more than `TRAINING_BYTES`, the pieces are taken in the order of a hash of their numbers until they
    have so many, so that the sample is spread over the source and depends on nothing else.

    Args:
      pieces: of the source of "train".
      rules: how documents are encoded, with any template.
      sft: whether documents are dialogues, of which the messages are yielded.
      on_error: "stop" or "skip", for malformed documents.

    Raises:
      UserError: a document is malformed, and on_error is "stop".
    """
    sizes = [piece.progress for piece in pieces]
    numbers = sampled_pieces(sizes)
    for number in numbers:
        # Of packed files, which hold more than their size says, each gives its part.
        left = TRAINING_BYTES * sizes[number] // max(1, sum(sizes[number] for number in numbers))
        for item in pieces[number]:
            left -= len(item.payload)
            if left < 0:
                break
            try:
                key, text = _training_text(item, rules, sft)
            except ValueError as error:
                if on_error == "stop":
                    raise _malformed(f"{item.location}: {error}") from None
                continue
            if text and not is_held_out(key, rules.held_out):
                yield text


def sampled_pieces(sizes: Sequence[int]) -> list[int]:
    """Return the sorted numbers of pieces with about `TRAINING_BYTES` together, or of all if they have no more."""
    taken, size = [], 0
    for number in sorted(range(len(sizes)), key=lambda number: hashlib.sha256(f"piece {number}".encode()).digest()):
        if size and size + sizes[number] > TRAINING_BYTES:
            break
        taken.append(number)
        size += sizes[number]
    return sorted(taken)


def _training_text(item: Item, rules: EncodeRules, sft: bool) -> tuple[str, str]:
    """Return what decides the split of a document, and its text, which is empty if it is left out."""
    if sft:
        messages, _ = dialogues.read(item, rules.ignore_fields)
        return json.dumps(messages), "\n".join(message.content for message in messages)
    text = rules.selection.read(item).text
    return text, text
