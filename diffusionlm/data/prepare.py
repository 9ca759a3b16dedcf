"""Text into fixed-length token records in ArrayRecord, which TFDS reads back: `diffusionlm data prepare`.

Documents are encoded, each followed by EOS (and after BOS, if asked for), concatenated in the order of the source and
cut into records of sequence_length + 1 tokens, across documents (as SMDM and LLaDA do). A .txt or .md file is one
document; `formats` has the table of the others. Every record also numbers its documents (`segment_ids`, from 1), so
that a trainer may keep them from attending to each other. The last, partial record of a split is dropped. Empty
documents are skipped and counted. Equal arguments give equal records in equal order, for any number of workers, on one
machine or many. The directory appears whole, under its name, or not at all; what was interrupted goes on.

With format "sft" documents are dialogues, and each is a record of its own, or several are packed into one (see
`dialogues`).
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal

from etils import epath
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from diffusionlm.console import Console
from diffusionlm.data import beam_runner, chat_templates, contamination, duplicates, tokenizers
from diffusionlm.data import metadata as metadata_lib
from diffusionlm.data.encode import (
    TOKENIZER_FILE,
    EncodedSplits,
    EncodeRules,
    encode_splits,
    forget_files,
    training_texts,
    write_tokenizer,
)
from diffusionlm.data.items import MOST_NAMED
from diffusionlm.data.jobs import local_runner
from diffusionlm.data.metadata import Metadata
from diffusionlm.data.ordered_map import WORKER_DEATHS, ordered_map
from diffusionlm.data.request import DEFAULT_WORDS, Request, Settings, check_request
from diffusionlm.data.sources import Piece, small
from diffusionlm.data.stream import BuildContext, RecordFormat, TokenStream, write_records
from diffusionlm.data.text_files import DigestJob, Files
from diffusionlm.data.tokenizers import Tokenizer
from diffusionlm.errors import UserError
from diffusionlm.ownership.claims import owned_output, whole_directory
from diffusionlm.progress import Bars
from diffusionlm.storage import in_bucket, write_atomically
from diffusionlm.untrusted import printable

PARTS = "parts"  # the folder of unfinished work
CONTAMINATED = "contaminated.jsonl"  # the documents that `decontaminate` left out


def prepare(
    source: str | Sequence[str],
    output: str | os.PathLike,
    *,
    sequence_length: int,
    tokenizer: str | os.PathLike | Tokenizer = "sentencepiece",
    vocab_size: int | None = None,
    validation: str | Sequence[str] | None = None,
    validation_fraction: float | None = None,
    text_field: str = "text",
    where: Sequence[str] = (),
    min_chars: int | None = None,
    max_chars: int | None = None,
    sample: float | None = None,
    format: Literal["text", "sft"] = "text",
    template: str = "auto",
    bos: bool | None = None,
    ignore_fields: Sequence[str] = (),
    pack: bool = False,
    drop_duplicates: bool = False,
    decontaminate: Sequence[str] = (),
    contamination_words: int = DEFAULT_WORDS,
    workers: int = 1,
    runner: Literal["local", "beam"] = "local",
    beam_options: Sequence[str] = (),
    on_error: Literal["stop", "skip"] = "stop",
    progress: bool = True,
) -> Metadata:
    """Prepare a dataset, or find that `output` already holds it; return its metadata, which is also in its `meta.json`.

    Args:
      source: a corpus (`python_docs`), `tfds:NAME[:split]`, or files of documents, directories, glob patterns.
      output: the directory to make, local or mounted; with runner=beam also in a bucket.
      sequence_length: tokens that a model will see; records hold one more.
      tokenizer: `byte`, `sentencepiece` (trained on the data), a file, a model's directory, hf://OWNER/NAME, an object.
      vocab_size: pieces of the `sentencepiece` that is trained; not for other tokenizers.
      validation: a source, like `source`, for the validation split.
      validation_fraction: without that, the share held out by a hash (0.01), or of one text file the end; 0: nothing.
      text_field: the field, column or feature of the text, also a nested one (meta.text), or a template such as
        "{title}: {text}"; not for "sft".
      where: take only documents whose fields fulfil all these conditions: lang=en, lang!=en, score>=3; not for "sft".
      min_chars: documents of fewer characters are left out; not for "sft".
      max_chars: documents of more characters are left out; not for "sft".
      sample: the fraction of the documents to take, chosen by a hash of their text; not for "sft".
      format: "text"; or "sft", instruction data in files of records, of the shapes in docs/sft.md.
      template: of "sft": "llada", "plain", "none" (unchanged), or "auto": llada if the tokenizer has it, else plain.
      bos: of "text", whether BOS precedes each document; None: as in the training of the checkpoint, if any.
      ignore_fields: fields of JSON objects that no text is made of; others are named, and in "sft" refused.
      pack: of "sft", put several dialogues, kept apart, into each training record (data.packing=packed_examples).
      drop_duplicates: keep the first of equal documents; white space and Unicode composition do not count. For "text".
      decontaminate: evaluation files; training documents that share a run of words with them are left out and listed in
        `contaminated.jsonl`. Of records, all fields that are text count. For "text".
      contamination_words: the length of such a run.
      workers: processes; a script that asks for several needs the `if __name__ == "__main__"` guard.
      runner: "local", this machine; or "beam", Apache Beam (extra `beam`), which gives the same dataset. With --dry_run
        the command only shows what would be read, written and used.
      beam_options: of "beam", Beam's options, which follow `--` on the command line, as in -- --runner=DataflowRunner.
      on_error: for a malformed line or file, one without valid UTF-8 text: "stop", or "skip" and count.
      progress: show progress and a summary on stderr.

    Raises:
      UserError: arguments or input are not usable, or `output` holds something else.
    """
    arguments: dict[str, Any] = dict(locals())  # all of this function, by name
    request, options = _checked(source, output, arguments)
    console = Console(stderr=True, quiet=not progress, soft_wrap=True, highlight=False)
    return _prepare(request, int(workers), options, console)


@functools.wraps(prepare)
def show_plan(*args: Any, **settings: Any) -> None:
    """Print what `prepare` would read and write with these arguments, and with which options of Beam."""
    bound = inspect.signature(prepare).bind(*args, **settings)
    bound.apply_defaults()
    request, options = _checked(bound.arguments["source"], bound.arguments["output"], bound.arguments)
    _show_plan(request, int(bound.arguments["workers"]), options, Console(soft_wrap=True, highlight=False))


def _checked(source: Any, output: Any, arguments: Mapping[str, Any]) -> tuple[Request, Any]:
    """Return the request, and Beam's options, of the arguments of `prepare` by name."""
    settings = Settings(**{field.name: arguments[field.name] for field in dataclasses.fields(Settings)})
    request, words = check_request(source, output, settings), arguments["beam_options"]
    if words and settings.runner != "beam":
        raise UserError(f"{' '.join(words)} after -- are options of Beam; add --runner beam, or drop them")
    return request, beam_runner.require_beam(words) if settings.runner == "beam" else None


def _prepare(request: Request, workers: int, options: Any, console: Console) -> Metadata:
    output = request.output
    if (existing := request.find_existing()) is not None:
        console.print(f"{output} already holds this dataset; reusing it")
        return existing
    try:
        with (
            _directory(request, options) as (directory, has_begun),
            _progress(console) as bars,
            ordered_map(workers) as map_jobs,
        ):
            if has_begun:
                console.print(f"{output}: going on with what an earlier command has done", markup=False)
            (directory / PARTS).mkdir(parents=True, exist_ok=True)
            run = local_runner(map_jobs) if options is None else beam_runner.beam_runner(options)
            total = sum(source.total for source in request.sources.values())
            metadata = _build(BuildContext(directory, run, bars, total), request, cut=options is None)
    except BrokenProcessPool as error:
        raise UserError(f"workers={workers}: a worker process died ({WORKER_DEATHS}); use workers=1") from error
    except OSError as error:
        if (existing := request.find_existing()) is not None:  # another process made it meanwhile
            return existing
        raise UserError(f"cannot write the dataset {str(output)!r}: {error}") from error
    _summarise(console, output, metadata)
    return metadata


@contextlib.contextmanager
def _directory(request: Request, options: Any) -> Iterator[tuple[epath.Path, bool]]:
    """Own the output; yield the directory in which it is made, and whether the same request left unfinished work."""
    output, key = request.output, request.key("local" if options is None else "beam")
    if not in_bucket(output):
        with whole_directory(Path(str(output)), key) as directory:
            yield epath.Path(directory), Path(directory, PARTS).exists()
        return
    # In a bucket nothing can be renamed as a whole; a dataset is whole once it has `meta.json`.
    with owned_output(output):
        if (output / metadata_lib.FILE).exists():
            raise FileExistsError(f"{output} was made meanwhile")
        place = output / PARTS / "request.txt"
        if (has_begun := place.exists()) and place.read_text() != key:
            raise UserError(
                f"output {str(output)!r} holds unfinished work of another request; remove it, or name another"
            )
        write_atomically(place, key)
        yield output, has_begun


def _build(context: BuildContext, request: Request, cut: bool) -> Metadata:
    """Fill the directory with the records, what TFDS needs to read them and, at last, `meta.json`."""
    forget_files()
    # Of the sources before they are read, which are looked at again afterwards.
    identity = request.identity(_digests(context, request))
    rules = request.encode_rules()
    pieces = [(split, piece) for split, source in request.sources.items() for piece in source.pieces()]
    tokenizer = request.tokenizer or _train_tokenizer(context, request, pieces, rules)
    write_tokenizer(context.directory, tokenizer)
    template = chat_templates.choose(request.template, tokenizer) if request.format == "sft" else None
    packing = ("packed_examples" if request.pack else "examples") if template else "chunk"
    rules = rules._replace(template=template)
    _look_ahead(context, request, pieces, cut)
    names = [*request.sources, *(["validation"] if rules.held_out else [])]
    encoded = encode_splits(context, small(pieces, cut), names, rules, on_error=request.on_error)
    _report_unread(context.bars, request, encoded.unread)
    _require_taken(encoded)
    if template:
        _require_answers(request, encoded.streams)
    record_format = RecordFormat(request.sequence_length, tokenizer.vocab_size, tokenizers.require_eos(tokenizer))
    metadata = Metadata(
        tokenizer=tokenizer.to_dict(),
        vocab_size=tokenizer.vocab_size,
        sequence_length=request.sequence_length,
        splits=write_records(context, record_format, encoded.streams, packing=packing),
        request=identity,
        malformed=encoded.malformed,
        empty=encoded.empty,
        packing=packing,
        template=template.to_dict() if template else None,
        too_long=sum(stream.counts.too_long for stream in encoded.streams.values()),
        bos=request.bos,
        left_out=dict(encoded.left_out),
    )
    if request.decontaminate:
        lines = "".join(json.dumps(entry) + "\n" for entry in encoded.contaminated)
        write_atomically(context.directory / CONTAMINATED, lines)
    parts = context.directory / PARTS
    if not in_bucket(parts):
        parts = parts.replace(context.directory / f"{PARTS}-done")  # so that what is half removed is not gone on with
        parts.rmtree()
    metadata.write(context.directory)
    if in_bucket(parts):
        parts.rmtree()
    return metadata


def _digests(context: BuildContext, request: Request) -> dict[str, str]:
    """Hash the files of the sources, where there are several; return stamp -> hash."""
    states = [pair for source in request.sources.values() if isinstance(source, Files) for pair in source.states()]
    if len(states) < 2:
        return {}
    jobs = [DigestJob(str(path), state.stamp, i, str(context.directory)) for i, (path, state) in enumerate(states)]
    digests = {}
    with context.bar("hashing", sum(state.bytes for _, state in states)) as advance:
        for receipt in context.run(jobs):
            digests[receipt["stamp"]] = receipt["digest"]
            advance(receipt["progress"])
    return digests


def _look_ahead(context: BuildContext, request: Request, pieces: Sequence[tuple[str, Piece]], cut: bool) -> None:
    """Find the documents that come again, and read the evaluation files, if that is asked for."""
    if request.drop_duplicates:
        with context.bar("comparing") as advance:
            parts, held_out = small(pieces, cut), request.held_out
            for progress in duplicates.find(context.run, parts, request.selection, held_out, context.directory):
                advance(progress)
    if request.decontaminate:
        texts, short = contamination.build(request.decontaminate, request.contamination_words, context.directory)
        if short:
            context.bars.console.print(
                f"{short:,} of {texts:,} texts of decontaminate have fewer than {request.contamination_words} words, "
                "and are not looked for",
                markup=False,
            )


def _show_plan(request: Request, workers: int, options: Any, console: Console) -> None:
    """Print what `prepare` would read and write, and with which options of Beam."""
    for split, source in request.sources.items():
        pieces = source.pieces()
        console.print(f"{split}: {source.total:,} bytes in {len(pieces):,} pieces", markup=False)
    tokenizer = request.tokenizer.kind if request.tokenizer else f"sentencepiece of {request.vocab_size} pieces"
    console.print(f"tokenizer: {tokenizer}; records of {request.sequence_length + 1} tokens", markup=False)
    console.print(f"output: {request.output}", markup=False)
    if options is None:
        console.print(f"runner: local, {workers} processes", markup=False)
        return
    console.print("runner: beam, with", markup=False)
    for name, value in sorted(options.get_all_options(drop_default=True).items()):
        console.print(f"  --{name}={value}", markup=False)


def _train_tokenizer(
    context: BuildContext, request: Request, pieces: Sequence[tuple[str, Piece]], rules: EncodeRules
) -> Tokenizer:
    """Return a tokenizer that is trained on the source of "train", or what an interrupted command has trained."""
    place = context.directory / TOKENIZER_FILE
    if place.exists():
        return tokenizers.from_dict(json.loads(place.read_text()))
    bar = context.bars.add_task("training the tokenizer", total=None)
    train = [piece for split, piece in pieces if split == "train"]
    texts = training_texts(train, rules, sft=request.format == "sft", on_error=request.on_error)
    tokenizer = tokenizers.train_sentencepiece(texts, request.vocab_size)
    context.bars.remove_task(bar)
    return tokenizer


def _report_unread(bars: Bars, request: Request, unread: Counter[str]) -> None:
    """Name the fields that no document is made of; raise `UserError` if they belong to dialogues."""
    if not unread:
        return
    named = [f"{printable(repr(name))} ({count:,} records)" for name, count in unread.most_common(MOST_NAMED)]
    if len(unread) > MOST_NAMED:
        named.append(f"{len(unread) - MOST_NAMED:,} more")
    if request.format == "sft":
        fix = " ".join(printable(name) for name, _ in unread.most_common(MOST_NAMED))
        raise UserError(
            f"no message is made of the fields {', '.join(named)}; to leave them out, --ignore_fields {fix}"
        )
    bars.console.print(
        f"the text is in {request.selection.text_field!r}; not read: {', '.join(named)}",
        markup=False,
    )


def _require_taken(encoded: EncodedSplits) -> None:
    """Raise `UserError` if the selection leaves out all documents."""
    if encoded.left_out and not any(stream.words for stream in encoded.streams.values()):
        reasons = ", ".join(f"{count:,} by {printable(reason)}" for reason, count in encoded.left_out.most_common())
        raise UserError(f"no document is left: {reasons}; drop or loosen a condition")


def _require_answers(request: Request, streams: Mapping[str, TokenStream]) -> None:
    """Raise `UserError` if a split of dialogues has no answer to learn."""
    for split, stream in streams.items():
        if len(stream.lengths()):
            continue
        if too_long := stream.counts.too_long:
            raise UserError(
                f"split {split!r}: all {too_long:,} answers end beyond {request.sequence_length} tokens; use a longer "
                "sequence_length"
            )
        if split == "validation" and request.held_out:
            total = sum(len(stream.lengths()) for stream in streams.values())
            raise UserError(
                f"validation_fraction={request.held_out} holds out none of {total:,} dialogues; use a larger one, or "
                "name a validation source"
            )
        raise UserError(
            f"split {split!r} has no answer: its source has no dialogue in which a user is answered; give another"
        )


def _progress(console: Console) -> Bars:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Bars(*columns, console=console)


def _summarise(console: Console, output: epath.Path, metadata: Metadata) -> None:
    unit = "documents" if metadata.packing == "chunk" else "answers"
    lines = [
        f"{output} {name}: {split.records:,} records of {metadata.sequence_length + 1} tokens, "
        f"{split.documents:,} {unit}, {split.raw_bytes / split.tokens:.2f} bytes/token"
        for name, split in metadata.splits.items()
    ]
    if metadata.too_long:
        lines.append(
            f"{metadata.too_long:,} answers that end beyond {metadata.sequence_length} tokens were left out; a longer "
            "sequence_length keeps them"
        )
    lines += [f"{count:,} documents were left out by {reason}" for reason, count in metadata.left_out.items()]
    if metadata.malformed:
        lines.append(f"{metadata.malformed:,} malformed lines or files were skipped")
    for line in lines:
        console.print(line)
