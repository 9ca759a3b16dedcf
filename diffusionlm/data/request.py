"""Validate the arguments of `prepare`, and compare them with what the directory already holds."""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from etils import epath

from diffusionlm.data import contamination, tokenizers
from diffusionlm.data import metadata as metadata_lib
from diffusionlm.data.encode import EncodeRules
from diffusionlm.data.identity import Stamps, content_of, known_digests, names_and_sizes, summary
from diffusionlm.data.metadata import Metadata
from diffusionlm.data.selection import Selection
from diffusionlm.data.sources import Source, resolve_splits
from diffusionlm.data.tokenizers import SentencePieceTokenizer, Tokenizer
from diffusionlm.errors import UserError
from diffusionlm.scalars import whole
from diffusionlm.storage import disk_path, in_bucket, require_directory, run_path

MOST_WORKERS = 1024
RUNNERS = ("local", "beam")
DEFAULT_WORDS = 13  # of a run that a document may not share with an evaluation file


@dataclass(frozen=True)
class Request:
    """A dataset to prepare; every field has been checked."""

    output: epath.Path
    sources: Mapping[str, Source]  # by split
    held_out: float  # fraction of "train" that goes to "validation"
    sequence_length: int
    tokenizer: Tokenizer | None  # None: a SentencePiece model of `vocab_size` pieces is trained
    vocab_size: int
    selection: Selection  # of the documents of "text", and the fields that they are made of
    format: Literal["text", "sft"]
    template: str  # of "sft"
    bos: bool  # of "text"
    on_error: Literal["stop", "skip"]
    ignore_fields: tuple[str, ...] = ()  # sorted
    pack: bool = False  # of "sft"
    drop_duplicates: bool = False  # of "text"
    decontaminate: tuple[str, ...] = ()  # evaluation files, of "text"
    contamination_words: int = 13

    def encode_rules(self) -> EncodeRules:
        """Return the rules by which documents are encoded, without the template."""
        return EncodeRules(
            self.held_out,
            self.selection,
            self.sequence_length,
            bos=self.bos,
            ignore_fields=self.ignore_fields,
        )

    def identity(self, known: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Return what decides the records, in JSON types; see `data.identity` for files and `known`."""
        tokenizer = self.tokenizer
        identity = {
            "sources": {split: source.describe(known) for split, source in self.sources.items()},
            "held_out": self.held_out,
            "tokenizer": {tokenizer.kind: tokenizer.sha256} if tokenizer else {"sentencepiece": self.vocab_size},
            "sequence_length": self.sequence_length,
            "text_field": self.selection.text_field,
            "on_error": self.on_error,
            **self.selection.identity(),
        }
        if self.format == "sft":
            identity |= {"format": self.format, "template": self.template}
            del identity["text_field"]
            identity |= {"ignore_fields": list(self.ignore_fields)} if self.ignore_fields else {}
            identity |= {"pack": True} if self.pack else {}
        if self.bos:
            identity["bos"] = True
        if self.drop_duplicates:
            identity["drop_duplicates"] = True
        if self.decontaminate:
            described = contamination.files(self.decontaminate).describe(known)
            identity["decontaminate"] = {"files": content_of(described), "words": self.contamination_words}
        return identity

    def key(self, runner: str) -> str:
        """Return a name of the work that makes this dataset, for which no file is read; it changes with every file."""
        values = content_of(self.identity(Stamps()))
        text = json.dumps([_code(), runner, values], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def find_existing(self) -> Metadata | None:
        """Return the metadata of the dataset at `output` if it is the one asked for, None if there is nothing.

        Raises:
          UserError: something else is there.
        """
        output = self.output
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            return None
        if in_bucket(output) and (output / "parts").exists() and not (output / metadata_lib.FILE).exists():
            return None  # unfinished
        require_directory(output, "output")
        try:
            metadata = metadata_lib.read(epath.Path(output))
        except UserError as error:
            raise UserError(
                f"output {str(output)!r} exists and cannot be reused ({error}); name another output"
            ) from error
        stored = metadata.request
        asked = json.loads(json.dumps(self.identity(known_digests(stored.get("sources")))))
        sources = asked.pop("sources"), stored.get("sources")
        differing = [
            f"{name}={reprlib.repr(stored.get(name))}, not {reprlib.repr(asked.get(name))}"
            for name in (asked | stored)
            if name != "sources" and asked.get(name) != stored.get(name)
        ]
        unknown = names_and_sizes(sources[0]) == sources[1] != sources[0]
        if not unknown and content_of(sources[0]) != content_of(sources[1]):
            differing.append(f"sources: made of {summary(sources[1])}, not of {summary(sources[0])}")
        if differing:
            shown = ", ".join(differing)
            raise UserError(f"output {str(output)!r} holds another dataset ({shown}); name another, or remove it")
        if unknown:
            raise UserError(
                f"output {str(output)!r} was made of files of these names and sizes, by a version that did not compare "
                "their content, so that it may hold another text; use it as it is (--data.path), or remove it"
            )
        return metadata


def changed_source(metadata: Metadata, source: str | Sequence[str]) -> str | None:
    """Return in words how the files of a source differ from those that a dataset was made of with default settings.

    Returns:
      The difference; None if there is none, if the files are gone, or if their content was not recorded.
    """
    stored = metadata.request.get("sources")
    if content_of(stored) == stored:  # no file of it has a hash
        return None
    try:
        sources, _ = resolve_splits(source, None, None, text_field=None if metadata.template else "text")
    except UserError:
        return None
    present = json.loads(
        json.dumps({split: source.describe(known_digests(stored)) for split, source in sources.items()})
    )
    return None if content_of(present) == content_of(stored) else f"{summary(stored)}, not of {summary(present)}"


@dataclass(frozen=True)
class Settings:
    """The arguments of `prepare` beside its source and output, which describes them."""

    sequence_length: int
    tokenizer: str | os.PathLike | Tokenizer
    vocab_size: int | None
    validation: str | Sequence[str] | None
    validation_fraction: float | None
    text_field: str
    where: Sequence[str]
    min_chars: int | None
    max_chars: int | None
    sample: float | None
    format: Literal["text", "sft"]
    template: str
    bos: bool | None
    ignore_fields: Sequence[str]
    pack: bool
    drop_duplicates: bool
    decontaminate: Sequence[str]
    contamination_words: int
    on_error: Literal["stop", "skip"]
    workers: int
    runner: Literal["local", "beam"]


@functools.cache
def _code() -> list[str]:
    """Return what identifies the code that makes datasets: that of this package, and the versions of tokenizers."""
    content = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        content.update(file.read_bytes())
    versions = [unicodedata.unidata_version, np.__version__]
    for package in ("sentencepiece", "tokenizers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(importlib.metadata.version(package))
    return [content.hexdigest(), *versions]


def check_request(source: str | Sequence[str], output: str | os.PathLike, settings: Settings) -> Request:
    """Check and resolve the arguments of `prepare`.

    Raises:
      UserError: an argument is not usable, or there is no such source or tokenizer.
    """
    selection, bos = check_values(output, settings), bool(settings.bos)
    chosen, pieces = _resolve_tokenizer(settings.tokenizer, settings.vocab_size, bos)
    asked = (None, None) if settings.format == "sft" else (settings.text_field, selection.columns)
    sources, held_out = resolve_splits(source, settings.validation, settings.validation_fraction, *asked)
    return Request(
        output=run_path(output) if in_bucket(output) else epath.Path(disk_path(output)),
        sources=sources,
        held_out=held_out,
        sequence_length=int(settings.sequence_length),
        tokenizer=chosen,
        vocab_size=pieces,
        selection=selection,
        format=settings.format,
        template=settings.template,
        bos=bos,
        on_error=settings.on_error,
        ignore_fields=tuple(sorted(set(settings.ignore_fields))),
        pack=settings.pack,
        drop_duplicates=settings.drop_duplicates,
        decontaminate=tuple(settings.decontaminate),
        contamination_words=int(settings.contamination_words),
    )


def check_values(output: str | os.PathLike, settings: Settings) -> Selection:
    """Check the arguments of `prepare` for which nothing needs to be read; return those that select documents.

    Raises:
      UserError: an argument is not usable.
    """
    format, workers = settings.format, settings.workers
    whole("sequence_length", settings.sequence_length, 1)
    if whole("workers", workers, 1) > MOST_WORKERS:
        raise UserError(f"workers={workers} must be at most {MOST_WORKERS}; use as many as there are cores")
    if settings.on_error not in ("stop", "skip"):
        raise UserError(f"on_error={settings.on_error!r} must be 'stop' or 'skip'")
    _check_format(format, settings.template, settings.text_field, settings.bos)
    selection = Selection.of(
        settings.text_field, settings.where, settings.min_chars, settings.max_chars, settings.sample
    )
    if format == "sft" and (given := selection.identity()):
        raise UserError(f"{next(iter(given))} is for format=text; choose the dialogues before, or drop it")
    if settings.pack and format != "sft":
        raise UserError(f"pack={settings.pack} is for format=sft, and texts are always packed; drop it")
    _check_choices(format, settings.drop_duplicates, settings.decontaminate, settings.contamination_words)
    _check_runner(settings.runner, workers, str(output))
    return selection


def _check_choices(format: str, drop_duplicates: bool, decontaminate: Sequence[str], words: int) -> None:
    if isinstance(decontaminate, str):
        raise UserError(f"decontaminate={decontaminate!r} must be a list of files; write [{decontaminate!r}]")
    for name, given in (("drop_duplicates", drop_duplicates), ("decontaminate", decontaminate)):
        if given and format == "sft":
            raise UserError(f"{name} is for format=text; choose the dialogues before, or drop it")
    whole("contamination_words", words, 2)
    if words != DEFAULT_WORDS and not decontaminate:
        raise UserError(f"contamination_words={words} is for decontaminate; drop it, or name evaluation files")


def _check_runner(runner: str, workers: int, output: str) -> None:
    if runner not in RUNNERS:
        raise UserError(f"runner={runner!r} must be 'local' or 'beam'")
    if runner == "beam" and workers != 1:
        raise UserError(
            f"workers={workers} is for runner=local; give Beam's own options after --, such as -- --direct_num_workers "
            f"{workers} --direct_running_mode multi_processing"
        )
    if runner == "local" and "://" in output:
        raise UserError(
            f"output {output!r} must be a local or mounted directory; prepare there and copy it, or use --runner beam"
        )


def _check_format(format: str, template: str, text_field: str, bos: bool | None) -> None:
    if format not in ("text", "sft"):
        raise UserError(f"format={format!r} must be 'text' or 'sft'")
    if format == "text" and template != "auto":
        raise UserError(f"template={template!r} is for format=sft; drop it, or add format=sft")
    if format == "sft" and text_field != "text":
        raise UserError(f"text_field={text_field!r} is for format=text, and format=sft has its own fields; drop it")
    if format == "sft" and bos:
        raise UserError("bos=True is for format=text, and a template says how format=sft begins; drop it")


def _resolve_tokenizer(
    tokenizer: str | os.PathLike | Tokenizer, vocab_size: int | None, bos: bool
) -> tuple[Tokenizer | None, int]:
    """Return the tokenizer that was named, or None if one is to be trained, and of how many pieces; else 0."""
    if vocab_size is not None:
        vocab_size = whole("vocab_size", vocab_size, 1, "be at least 1, and in practice a thousand or more")
    if isinstance(tokenizer, os.PathLike):
        tokenizer = os.fspath(tokenizer)
    if tokenizer == SentencePieceTokenizer.kind:
        if vocab_size is None:
            raise UserError("tokenizer=sentencepiece is trained on the data and needs vocab_size, such as 2048")
        return None, vocab_size
    name = repr(tokenizer) if isinstance(tokenizer, str) else f"of kind {tokenizer.kind}"
    if vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} is for tokenizer=sentencepiece only; drop it with the tokenizer {name}"
        )
    chosen = tokenizers.load(tokenizer) if isinstance(tokenizer, str) else tokenizer
    tokenizers.require_eos(chosen, name)
    if bos and chosen.bos_id is None:
        raise UserError(f"bos=True needs a tokenizer with a BOS piece, which {chosen.kind} has not; drop it")
    return chosen, 0
