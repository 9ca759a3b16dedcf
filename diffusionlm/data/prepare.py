"""Text into fixed-length token records in ArrayRecord, which TFDS reads back: `diffusionlm data prepare`.

Documents are encoded, each followed by EOS (and after BOS, if asked for), concatenated in the order of the source and
cut into records of sequence_length + 1 tokens, across documents (as SMDM and LLaDA do). A .txt or .md file is one
document; a .jsonl or .json file, or one of them with .gz, holds one a line, or a list. Every record also numbers its
documents (`segment_ids`, from 1), so that a trainer may keep them from attending to each other. The last, partial
record of a split is dropped. Empty documents are skipped and counted. Equal arguments give equal records in equal
order, for any number of workers. The directory appears whole, under its name, or not at all.

With format "sft" documents are dialogues, and each is a record of its own, or several are packed into one (see
`dialogues`).
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Literal

from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from diffusionlm.console import Console
from diffusionlm.data import chat_templates, tokenizers
from diffusionlm.data.encode import EncodeRules, encode_splits, training_texts
from diffusionlm.data.items import MOST_NAMED
from diffusionlm.data.metadata import Metadata
from diffusionlm.data.ordered_map import WORKER_DEATHS, ordered_map
from diffusionlm.data.request import Request, check_request
from diffusionlm.data.stream import BuildContext, RecordFormat, TokenStream, write_records
from diffusionlm.data.tokenizers import Tokenizer
from diffusionlm.errors import UserError
from diffusionlm.ownership.claims import whole_directory
from diffusionlm.progress import Bars
from diffusionlm.untrusted import printable


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
    format: Literal["text", "sft"] = "text",
    template: str = "auto",
    bos: bool | None = None,
    ignore_fields: Sequence[str] = (),
    pack: bool = False,
    workers: int = 1,
    on_error: Literal["stop", "skip"] = "stop",
    progress: bool = True,
) -> Metadata:
    """Prepare a dataset, or find that `output` already holds it; return its metadata, which is also in its `meta.json`.

    Args:
      source: a corpus (`python_docs`), `tfds:NAME[:split]`, or files of text or jsonl, directories, glob patterns.
      output: the directory to make, local or mounted.
      sequence_length: tokens that a model will see; records hold one more.
      tokenizer: `byte`, `sentencepiece` (trained on the data), a file, a model's directory, hf://OWNER/NAME, an object.
      vocab_size: pieces of the `sentencepiece` that is trained; not for other tokenizers.
      validation: a source, like `source`, for the validation split.
      validation_fraction: without that, the share held out by a hash (0.01), or of one text file the end; 0: nothing.
      text_field: the field of JSON, or feature of TFDS, that holds the text; not for "sft".
      format: "text"; or "sft", instruction data in jsonl or json files, of the shapes in docs/sft.md.
      template: of "sft": "llada", "plain", "none" (unchanged), or "auto": llada if the tokenizer has it, else plain.
      bos: of "text", whether BOS precedes each document; None: as in the training of the checkpoint, if any.
      ignore_fields: fields of JSON objects that no text is made of; others are named, and in "sft" refused.
      pack: of "sft", put several dialogues, kept apart, into each training record (data.packing=packed_examples).
      workers: processes; a script that asks for several needs the `if __name__ == "__main__"` guard.
      on_error: for a malformed line or file, one without valid UTF-8 text: "stop", or "skip" and count.
      progress: show progress and a summary on stderr.

    Raises:
      UserError: arguments or input are not usable, or `output` holds something else.
    """
    request = check_request(
        source,
        output,
        sequence_length=sequence_length,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        validation=validation,
        validation_fraction=validation_fraction,
        text_field=text_field,
        format=format,
        template=template,
        bos=bool(bos),
        ignore_fields=ignore_fields,
        pack=pack,
        on_error=on_error,
        workers=workers,
    )
    return _prepare(request, int(workers), Console(stderr=True, quiet=not progress, soft_wrap=True, highlight=False))


def _prepare(request: Request, workers: int, console: Console) -> Metadata:
    output = request.output
    if (existing := request.find_existing()) is not None:
        console.print(f"{output} already holds this dataset; reusing it")
        return existing
    try:
        with whole_directory(output) as directory, _progress(console) as bars, ordered_map(workers) as map_jobs:
            metadata = _build(BuildContext(directory, map_jobs, bars), request)
    except BrokenProcessPool as error:
        raise UserError(f"workers={workers}: a worker process died ({WORKER_DEATHS}); use workers=1") from error
    except OSError as error:
        if (existing := request.find_existing()) is not None:  # another process made it meanwhile
            return existing
        raise UserError(f"cannot write the dataset {str(output)!r}: {error}") from error
    _summarise(console, output, metadata)
    return metadata


def _build(context: BuildContext, request: Request) -> Metadata:
    """Fill the directory with the records, what TFDS needs to read them and, at last, `meta.json`."""
    identity = request.identity()  # of the sources before they are read, which are looked at again afterwards
    rules = request.encode_rules()
    tokenizer = request.tokenizer or _train_tokenizer(context.bars, request, rules)
    template = chat_templates.choose(request.template, tokenizer) if request.format == "sft" else None
    packing = ("packed_examples" if request.pack else "examples") if template else "chunk"
    rules = rules._replace(template=template)
    encoded = encode_splits(context, request.sources, rules, tokenizer, on_error=request.on_error)
    _report_unread(context.bars, request, encoded.unread)
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
    )
    metadata.write(context.directory)
    return metadata


def _train_tokenizer(bars: Bars, request: Request, rules: EncodeRules) -> Tokenizer:
    bar = bars.add_task("training the tokenizer", total=None)
    texts = training_texts(request.sources["train"], rules, sft=request.format == "sft", on_error=request.on_error)
    tokenizer = tokenizers.train_sentencepiece(texts, request.vocab_size)
    bars.remove_task(bar)
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
        f"the text is in {request.text_field!r}; not read: {', '.join(named)}",
        markup=False,
    )


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


def _summarise(console: Console, output: Path, metadata: Metadata) -> None:
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
    if metadata.malformed:
        lines.append(f"{metadata.malformed:,} malformed lines or files were skipped")
    for line in lines:
        console.print(line)
