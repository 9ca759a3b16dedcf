"""Text into fixed-length token records in ArrayRecord, which TFDS reads back: `diffusionlm data prepare`.

Documents are encoded, each followed by EOS (and after BOS, if asked for), concatenated in the order of the source and
cut into records of sequence_length + 1 tokens, whatever documents they cross (as SMDM and LLaDA do). Every record also
numbers its documents (`segment_ids`, from 1), so that a trainer may keep them from attending to each other. The last,
partial record of a split is dropped. The directory appears whole, under its name, or not at all.

With format "sft" documents are dialogues, and each is a record of its own (see `sft`).
"""

import contextlib
import hashlib
import json
import os
import reprlib
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from diffusionlm.data import chat_templates as templates
from diffusionlm.data import dialogues as sft
from diffusionlm.data import metadata as metadata_lib
from diffusionlm.data import stream as records
from diffusionlm.data.chat_templates import Template
from diffusionlm.data.metadata import Metadata, SplitMetadata
from diffusionlm.data.ordered_map import DEATHS, Map, in_order_by
from diffusionlm.data.sources import Item, Source, resolve_splits, text_of
from diffusionlm.data.tokenizers import kinds as tokenizers
from diffusionlm.errors import UserError
from diffusionlm.storage import whole_directory

BATCH_BYTES = 1 << 20  # of source that a worker encodes at a time
SHARD_TOKENS = 1 << 26  # a shard holds 32k records of 2048 tokens
TRAINING_BYTES = 1 << 27  # of text from which a tokenizer is trained: the first training documents


def prepare(
    source: str | Sequence[str],
    output: str | os.PathLike,
    *,
    sequence_length: int,
    tokenizer: str | os.PathLike | tokenizers.Tokenizer = "sentencepiece",
    vocab_size: int | None = None,
    validation: str | Sequence[str] | None = None,
    validation_fraction: float | None = None,
    text_field: str = "text",
    format: Literal["text", "sft"] = "text",
    template: Literal["auto", "llada", "plain", "none"] = "auto",
    bos: bool | None = None,
    workers: int = 1,
    on_error: Literal["stop", "skip"] = "stop",
    progress: bool = True,
) -> Metadata:
    """Prepares a dataset, or finds that `output` already holds the one that is asked for.

    Equal arguments give equal records in equal order, for any number of workers.

    Args:
      source: a registered corpus (`python_docs`), `tfds:NAME[:split]`, or one or several files, directories or glob
        patterns. A .txt or .md file is one document, a .jsonl file holds one a line, a .json file a list of them; all
        may end in .gz.
      output: the directory to make, local or mounted.
      sequence_length: tokens that a model will see; records hold one more.
      tokenizer: `byte`, `sentencepiece` (trained on the training documents), a tokenizer file (tokenizer.model,
        tokenizer.json), a checkpoint or a released model's directory (its tokenizer), or an object.
      vocab_size: pieces of the `sentencepiece` that is trained; for no other tokenizer.
      validation: a source, like `source`, for the validation split.
      validation_fraction: share of the documents held out by a hash of their text where no validation source is given,
        0.01 by default; a single text file gives its last part instead. 0: no validation split.
      text_field: the field of jsonl, or feature of TFDS, that holds the text; not for "sft".
      format: "text"; or "sft", instruction data in jsonl or json files (of a directory, both kinds): each record has
        the fields prompt and response or completion, instruction (and input) and output or response, question and
        answer, or a dialogue, messages of role and content or conversations of from and value. Answers that end behind
        sequence_length tokens are left out and counted.
      template: of "sft", how prompts are written: "llada", "plain", "none" (as they are), or "auto", llada where the
        tokenizer has its pieces and else plain.
      bos: of "text", whether BOS stands before each document; None: if the tokenizer is that of a checkpoint whose
        documents begin so.
      workers: processes. A script that asks for more than one needs the `if __name__ == "__main__"` guard.
      on_error: what is done about a malformed line or file, one without valid UTF-8 text: "stop", or "skip" and count.
        Empty documents are always skipped and counted.
      progress: show progress and a summary on stderr.

    Returns:
      The metadata, which is also in the directory's `meta.json`.

    Raises:
      UserError: unusable arguments or input, or an `output` that holds something else.
    """
    _check(output, sequence_length, workers, on_error, format, template, text_field)
    if format == "sft" and bos:
        raise UserError("bos=True is for format=text, and a template says how format=sft begins; drop it")
    console = Console(stderr=True, quiet=not progress, soft_wrap=True, highlight=False, markup=False)
    given = _given_tokenizer(tokenizer, vocab_size)
    if bos is None:
        bos = format == "text" and isinstance(tokenizer, str | os.PathLike) and begins_with_bos(os.fspath(tokenizer))
    if bos and given and given.bos_id is None:
        raise UserError(f"bos=True needs a tokenizer with a BOS piece, which {given.kind} has not; drop it")
    field = None if format == "sft" else text_field
    sources, held_out = resolve_splits(source, validation, validation_fraction, field)
    request = {
        "sources": {split: one.describe() for split, one in sources.items()},
        "held_out": held_out,
        "tokenizer": {given.kind: given.sha256} if given else {"sentencepiece": vocab_size},
        "sequence_length": sequence_length,
        "text_field": text_field,
        "on_error": on_error,
    }
    if format == "sft":
        request |= {"format": format, "template": template}
        del request["text_field"]
    if bos:
        request["bos"] = True
    output = Path(output)
    if (existing := _existing(output, request)) is not None:
        console.print(f"{output} already holds this dataset; reusing it")
        return existing
    asked = template if format == "sft" else ""
    plan = _Plan(sources, held_out, sequence_length, text_field, on_error, asked, bos, request)
    try:
        with whole_directory(output) as directory, _progress(console) as bars, in_order_by(workers) as in_order:
            chosen = given or _train_tokenizer(plan, vocab_size, bars)
            made = _build(directory, plan, chosen, in_order, bars)
    except BrokenProcessPool as error:
        raise UserError(f"workers={workers}: a worker process died ({DEATHS}); use workers=1") from error
    except OSError as error:
        if (existing := _existing(output, request)) is not None:  # another process made it meanwhile
            return existing
        raise UserError(f"cannot write the dataset {str(output)!r}: {error}") from error
    _summarise(console, output, made)
    return made


def _check(
    output: str | os.PathLike,
    sequence_length: int,
    workers: int,
    on_error: str,
    format: str,
    template: str,
    text_field: str,
) -> None:
    if sequence_length < 1 or workers < 1:
        raise UserError(f"sequence_length={sequence_length} and workers={workers} must both be at least 1")
    if on_error not in ("stop", "skip"):
        raise UserError(f"on_error={on_error!r} must be 'stop' or 'skip'")
    if format not in ("text", "sft"):
        raise UserError(f"format={format!r} must be 'text' or 'sft'")
    if format == "text" and template != "auto":
        raise UserError(f"template={template!r} is for format=sft; drop it, or add format=sft")
    if format == "sft" and text_field != "text":
        raise UserError(f"text_field={text_field!r} is for format=text, and format=sft has its own fields; drop it")
    if "://" in str(output):
        raise UserError(f"output {str(output)!r} must be a local or mounted directory; prepare there, then copy it")


@dataclass(frozen=True)
class _Plan:
    """What is to be prepared."""

    sources: dict[str, Source]
    held_out: float
    sequence_length: int
    text_field: str
    on_error: str
    template: str  # of dialogues, as asked for; "": texts
    bos: bool
    request: dict


class _Stream:
    """The token stream of one split while it grows, and its counts."""

    def __init__(self, path: Path):
        self.path, self.file, self.sha256 = path, path.open("wb"), hashlib.sha256()
        self.lengths: list[np.ndarray] = []  # of dialogues
        self.words = self.documents = self.tokens = self.raw_bytes = self.token_bytes = self.too_long = 0

    def add(self, part: records.Part) -> None:
        self.file.write(part.words.data)
        self.sha256.update(part.words.data)
        self.lengths.append(part.lengths)
        self.words += len(part.words)
        self.tokens += part.tokens
        self.documents += part.documents
        self.raw_bytes += part.raw_bytes
        self.token_bytes += part.token_bytes
        self.too_long += part.too_long

    def content_sha256(self) -> str:
        """Of all words and then of all lengths, however they came."""
        whole = self.sha256.copy()
        whole.update(self.all_lengths().data)
        return whole.hexdigest()

    def all_lengths(self) -> np.ndarray:
        """int64: the words of each dialogue; of texts, nothing."""
        return np.concatenate([np.empty(0, np.int64), *self.lengths]).astype("<i8")


def _build(directory: Path, plan: _Plan, tokenizer: tokenizers.Tokenizer, in_order: Map, bars: Progress) -> Metadata:
    """Fills `directory` with the records, what TFDS needs to read them and, at last, `meta.json`."""
    template = templates.choose(plan.template, tokenizer) if plan.template else None
    streams, malformed, empty = _encode(directory, plan, tokenizer, template, in_order, bars)
    splits = _write_records(directory, plan, tokenizer, streams, in_order, bars)
    metadata = Metadata(
        tokenizer=tokenizer.to_dict(),
        vocab_size=tokenizer.vocab_size,
        sequence_length=plan.sequence_length,
        splits=splits,
        request=plan.request,
        malformed=malformed,
        empty=empty,
        packing="examples" if template else "chunk",
        template=template.to_dict() if template else None,
        too_long=sum(stream.too_long for stream in streams.values()),
        format=metadata_lib.EXAMPLES_FORMAT if template else metadata_lib.FORMAT,
        bos=plan.bos,
    )
    metadata.write(directory)
    return metadata


def _encode(
    directory: Path,
    plan: _Plan,
    tokenizer: tokenizers.Tokenizer,
    template: Template | None,
    in_order: Map,
    bars: Progress,
) -> tuple[dict[str, _Stream], int, int]:
    """Writes the token stream of every split; returns them, and how many documents were malformed, and empty."""
    tokenizer_file = directory / "tokenizer.json"
    tokenizer_file.write_text(json.dumps(tokenizer.to_dict()))
    jobs = (
        records.TokenizeJob(
            items, split, plan.held_out, plan.text_field, tokenizer_file, plan.sequence_length, template, plan.bos
        )
        for split, source in plan.sources.items()
        for items in _batches(source)
    )
    names = [*plan.sources, *(["validation"] if plan.held_out else [])]
    bar = bars.add_task("encoding", total=sum(source.total for source in plan.sources.values()))
    malformed = empty = 0
    with contextlib.ExitStack() as files:
        streams = {split: _Stream(directory / f"{split}.tokens") for split in names}
        for stream in streams.values():
            files.enter_context(stream.file)
        for done in in_order(records.tokenize, jobs):
            if done.malformed and plan.on_error == "stop":
                raise UserError(f"{done.malformed[0]}; mend it, or leave such lines out with on_error=skip")
            for split, part in done.parts.items():
                streams[split].add(part)
            malformed += len(done.malformed)
            empty += done.empty
            bars.advance(bar, done.progress)
    tokenizer_file.unlink()
    return streams, malformed, empty


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


def _write_records(
    directory: Path,
    plan: _Plan,
    tokenizer: tokenizers.Tokenizer,
    streams: dict[str, _Stream],
    in_order: Map,
    bars: Progress,
) -> dict[str, SplitMetadata]:
    """Turns the streams into shards of records, with the metadata of TFDS, and removes the streams."""
    length, vocab_size, eos_id = plan.sequence_length + 1, tokenizer.vocab_size, tokenizer.eos_id
    jobs: dict[str, list[records.ShardJob]] = {}
    for split, stream in streams.items():
        lengths = None
        if plan.template:
            lengths, of_dialogues = stream.path.with_suffix(".lengths"), stream.all_lengths()
            of_dialogues.tofile(lengths)
        count = len(of_dialogues) if lengths else stream.words // length
        if not count and lengths:
            raise UserError(_why_no_example(plan, split, streams))
        if not count:
            raise UserError(
                f"split {split!r} has {stream.words} tokens, too few for one record of {length}; give more text, "
                "a shorter sequence_length or, for validation, a source or another validation_fraction"
            )
        shards = -(-count * length // SHARD_TOKENS)
        bounds = [count * i // shards for i in range(shards + 1)]
        of_split = (plan.sequence_length, vocab_size, split)
        jobs[split] = [
            records.ShardJob(stream.path, *bounds[i : i + 2], *of_split, i, shards, eos_id, lengths)
            for i in range(shards)
        ]
    flat = [job for split in jobs.values() for job in split]
    record_bytes = length * records.word_type(vocab_size).itemsize
    bar = bars.add_task("writing", total=sum(job.stop - job.first for job in flat) * record_bytes)
    sizes = []
    for job, size in zip(flat, in_order(records.write_shard, flat), strict=True):
        sizes.append(size)
        bars.advance(bar, (job.stop - job.first) * record_bytes)
    records.write_tfds_metadata(directory, flat, sizes)
    splits = {}
    for split, stream in streams.items():
        stream.path.unlink()
        stream.path.with_suffix(".lengths").unlink(missing_ok=True)
        splits[split] = SplitMetadata(
            records=jobs[split][-1].stop,
            documents=stream.documents,
            tokens=stream.tokens,
            raw_bytes=stream.raw_bytes,
            token_bytes=stream.token_bytes,
            sha256=stream.content_sha256(),
            shards={job.file.name: job.file.stat().st_size for job in jobs[split]},
        )
    return splits


def _why_no_example(plan: _Plan, split: str, streams: dict[str, _Stream]) -> str:
    if late := streams[split].too_long:
        what = f"split {split!r}: all {late:,} answers end behind {plan.sequence_length} tokens"
        return f"{what}; use a longer sequence_length"
    if split == "validation" and plan.held_out:
        there = sum(len(stream.all_lengths()) for stream in streams.values())
        return (
            f"validation_fraction={plan.held_out} holds out none of {there:,} dialogues; use a larger one, or name a "
            "validation source"
        )
    return f"split {split!r} has no answer: its source has no dialogue in which a user is answered; give another"


def _given_tokenizer(
    tokenizer: str | os.PathLike | tokenizers.Tokenizer, vocab_size: int | None
) -> tokenizers.Tokenizer | None:
    """The tokenizer that was named, or None where one is to be trained."""
    tokenizer = os.fspath(tokenizer) if isinstance(tokenizer, os.PathLike) else tokenizer
    if tokenizer == tokenizers.SentencePieceTokenizer.kind:
        if vocab_size is not None and vocab_size < 1:
            raise UserError(f"vocab_size={vocab_size} must be at least 1, and in practice a thousand or more")
        if not vocab_size:
            raise UserError("tokenizer=sentencepiece is trained on the data and needs vocab_size, such as 2048")
        return None
    if vocab_size:
        raise UserError(f"vocab_size={vocab_size} is for tokenizer=sentencepiece only; drop it with {tokenizer!r}")
    given = named_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    if given.eos_id is None:
        raise UserError(f"tokenizer {tokenizer!r} has no EOS piece, which ends every document; use one that has")
    return given


def named_tokenizer(name: str) -> tokenizers.Tokenizer:
    """A tokenizer by name, or that of the checkpoint or of the released model in a directory."""
    if not epath.Path(name).is_dir():
        return tokenizers.load(name)
    if (found := tokenizers.load_directory(name)) is not None:
        return found
    from diffusionlm.checkpoint import store as checkpoint  # here, because it imports JAX

    values = checkpoint.load_sidecar(name).tokenizer
    if values is None:
        raise UserError(f"the checkpoint {name} carries no tokenizer; give a tokenizer file")
    return tokenizers.from_dict(values)


def begins_with_bos(name: str) -> bool:
    """Whether a name is that of a checkpoint in whose training documents began with BOS."""
    if not epath.Path(name).is_dir() or tokenizers.load_directory(name) is not None:
        return False
    from diffusionlm.checkpoint import store as checkpoint

    sidecar = checkpoint.load_sidecar(name)
    # Where it is EOS as well, as in GPT-2, the one that ends the document before is enough.
    if sidecar.bos_id in (None, sidecar.eos_id) or sidecar.canvas.get("start_id") != sidecar.bos_id:
        return False
    # Qwen's config.json has one that its tokenizer never writes.
    return sidecar.tokenizer is not None and tokenizers.from_dict(sidecar.tokenizer).bos_id is not None


def _train_tokenizer(plan: _Plan, vocab_size: int, bars: Progress) -> tokenizers.Tokenizer:
    bar = bars.add_task("training the tokenizer", total=None)
    trained = tokenizers.train_sentencepiece(_training_texts(plan), vocab_size)
    bars.remove_task(bar)
    return trained


def _training_texts(plan: _Plan) -> Iterator[str]:
    """The first documents that will be in the training split."""
    size = 0
    for item in plan.sources["train"]:
        try:
            if plan.template:
                messages = sft.messages_of(item)
                key, text = json.dumps(messages), "\n".join(message.content for message in messages)
            else:
                key = text = text_of(item, plan.text_field)
        except ValueError as error:
            if plan.on_error == "stop":
                raise UserError(
                    f"{item.location}: {error}; mend it, or leave such lines out with on_error=skip"
                ) from None
            continue
        if not records.is_held_out(key, plan.held_out):
            yield text
            size += len(item.payload)
            if size >= TRAINING_BYTES:
                return


def _existing(output: Path, request: dict) -> Metadata | None:
    """The dataset at `output` if the request for it was this one; None where nothing is."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    try:
        found = metadata_lib.read(epath.Path(output))
    except UserError as error:
        raise UserError(f"output {str(output)!r} exists and cannot be reused ({error}); name another output") from error
    asked, was = json.loads(json.dumps(request)), found.request
    if differ := [name for name in asked | was if asked.get(name) != was.get(name)]:
        shown = ", ".join(
            f"{name}={reprlib.repr(was.get(name))}, not {reprlib.repr(asked.get(name))}" for name in differ
        )
        raise UserError(f"output {str(output)!r} holds another dataset ({shown}); name another, or remove it")
    return found


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _summarise(console: Console, output: Path, metadata: Metadata) -> None:
    what = "documents" if metadata.packing == "chunk" else "answers"
    for name, split in metadata.splits.items():
        console.print(
            f"{output} {name}: {split.records:,} records of {metadata.sequence_length + 1} tokens, "
            f"{split.documents:,} {what}, {split.raw_bytes / split.tokens:.2f} bytes/token"
        )
    if metadata.too_long:
        console.print(
            f"{metadata.too_long:,} answers that end behind {metadata.sequence_length} tokens were left out; a longer "
            "sequence_length keeps them"
        )
    if metadata.malformed:
        console.print(f"{metadata.malformed:,} malformed lines or files were skipped")
