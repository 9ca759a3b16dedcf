"""Sources of documents: text, jsonl and json files, TFDS datasets and named corpora, as one stream of raw items.

A source only reads; the workers decode and check (`items`).
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from diffusionlm.data import corpora
from diffusionlm.data.items import Item
from diffusionlm.data.text_files import DIALOGUE_KINDS, TEXT_ENDINGS, Files, expand
from diffusionlm.errors import UserError
from diffusionlm.scalars import real

TFDS_NAME = re.compile(r"tfds:(?P<name>[^:]+(:[\d*]+\.[\d*]+\.[\d*]+)?)(:(?P<split>.+))?")
DEFAULT_FRACTION = 0.01  # held out if neither a validation source nor a fraction is given


class Source(Protocol):
    """A finite stream of items in a fixed order."""

    @property
    def total(self) -> int:
        """The sum of the items' progress, for the progress bar; an estimate for TFDS."""
        ...

    def describe(self, known: Mapping[str, str] | None = None) -> Any:
        """Return what identifies the content, in JSON types; see `identity.known_digests` for `known`."""
        ...

    def __iter__(self) -> Iterator[Item]: ...


class Texts:
    """Documents that a function makes when they are first needed.

    Args:
      describe: returns what identifies them, as `Source.describe` does.
      make: returns them.
    """

    def __init__(self, describe: Callable[[Mapping[str, str] | None], Any], make: Callable[[], Sequence[Item]]):
        self._describe, self._make = describe, functools.cache(make)

    @property
    def total(self) -> int:
        """The sum of the items' progress."""
        return sum(item.progress for item in self._make())

    def describe(self, known: Mapping[str, str] | None = None) -> Any:
        """Return what identifies the documents."""
        return self._describe(known)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._make())


class Tfds:
    """The text feature of a split of any TFDS dataset, which is downloaded and prepared as ArrayRecord if need be.

    Raises:
      UserError: the split cannot be loaded, or has no such feature.
    """

    def __init__(self, name: str, split: str, text_field: str):
        import tensorflow_datasets as tfds  # here, because the workers of a file source do not need it

        self._name, self._split, self._field = name, split, text_field
        try:
            builder: Any = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
            self._examples = builder.as_data_source(split)
        except Exception as error:  # builders of third parties raise anything
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"cannot load split {split!r} of tfds:{name}: {reason or type(error).__name__}") from error
        if text_field not in builder.info.features:
            known = ", ".join(builder.info.features)
            raise UserError(f"tfds:{name} has no feature {text_field!r}; choose one of {known} with --text_field")
        self._version = str(builder.version)
        self._bytes = builder.info.dataset_size // max(1, sum(s.num_examples for s in builder.info.splits.values()))
        self.total = self._bytes * len(self._examples)

    def describe(self, known: Mapping[str, str] | None = None) -> Any:
        """Return the dataset, its version and the split."""
        return {"tfds": self._name, "version": self._version, "split": self._split}

    def __iter__(self) -> Iterator[Item]:
        for i in range(len(self._examples)):
            text = self._examples[i][self._field]
            location = f"tfds:{self._name}:{self._split}[{i}]"
            if not isinstance(text, str | bytes):
                raise UserError(
                    f"{location}: feature {self._field!r} is {type(text).__name__}, not text; choose another with "
                    "--text_field"
                )
            yield Item(location, text.encode() if isinstance(text, str) else text, False, self._bytes)


def resolve(spec: str | Sequence[str], text_field: str | None) -> Mapping[str, Source]:
    """Return the sources of a specification by split; only corpora have a validation split of their own.

    Args:
      spec: a registered corpus, `tfds:NAME[:split]`, or one or several files, directories (their text and jsonl files,
        not those of directories below) or glob patterns.
      text_field: the TFDS feature that holds the text; None: dialogues, of jsonl and json files, also those of a
        directory.

    Raises:
      UserError: there is nothing, or nothing of a known kind.
    """
    if text_field is None and isinstance(spec, str) and (TFDS_NAME.fullmatch(spec) or spec in corpora.CORPORA.names()):
        raise UserError(f"format=sft reads {DIALOGUE_KINDS} files, not {spec}; give such files")
    if text_field is not None and isinstance(spec, str) and (match := TFDS_NAME.fullmatch(spec)):
        return {"train": Tfds(match["name"], match["split"] or "train", text_field)}
    if isinstance(spec, str) and spec in corpora.CORPORA.names():
        load = functools.cache(functools.partial(corpora.get, spec))
        return {split: _corpus_source(spec, split, load) for split in ("train", "validation")}
    specs = [spec] if isinstance(spec, str) else spec
    dialogues = text_field is None
    files = [path for name in specs for path in expand(str(name), dialogues=dialogues, or_corpus=not dialogues)]
    return {"train": Files(files)}


def resolve_splits(
    source: str | Sequence[str], validation: str | Sequence[str] | None, fraction: float | None, text_field: str | None
) -> tuple[Mapping[str, Source], float]:
    """Return the sources by split, and the fraction of the documents of "train" to hold out by their hash.

    A single text file is only one document: its last part is held out instead, from a line break on.

    Args:
      source: a specification (see `resolve`).
      validation: another for the validation split, or None.
      fraction: of the documents to hold out, or None.
      text_field: as in `resolve`.

    Raises:
      UserError: the arguments contradict each other, or as in `resolve`.
    """
    if fraction is not None and not 0 <= (fraction := real("validation_fraction", fraction)) < 1:
        raise UserError(f"validation_fraction={fraction} must lie in [0, 1)")
    if fraction and validation is not None:
        raise UserError(f"validation={validation!r} and validation_fraction={fraction} exclude each other; drop one")
    sources = resolve(source, text_field)
    train = sources["train"]
    if validation is not None:
        held_out = resolve(validation, text_field)
        return {"train": train, "validation": held_out.get("validation", held_out["train"])}, 0.0
    if "validation" in sources:
        if fraction is not None:
            raise UserError(f"{source} has its own validation split; drop validation_fraction={fraction}")
        return sources, 0.0
    fraction = DEFAULT_FRACTION if fraction is None else fraction
    if fraction and isinstance(train, Files) and len(train.paths) == 1 and train.paths[0].name.endswith(TEXT_ENDINGS):
        return _head_and_tail(train, fraction), 0.0
    return sources, float(fraction)


def _corpus_source(name: str, split: str, load: Callable[[], dict[str, list[corpora.Document]]]) -> Texts:
    def items() -> list[Item]:
        texts = [(document.name, document.text.encode()) for document in load()[split]]
        return [Item(f"{name}:{title}", text, False, len(text)) for title, text in texts]

    return Texts(lambda known: {"corpus": name, "split": split}, items)


def _head_and_tail(source: Files, fraction: float) -> Mapping[str, Source]:
    (item,) = source
    text = item.payload
    cut = text.rfind(b"\n", 0, int(len(text) * (1 - fraction))) + 1
    if not cut:
        raise UserError(f"{item.location} has no line break to hold out its end at; name a validation file instead")
    parts = {"train": text[:cut], "validation": text[cut:]}
    items = {split: [item._replace(payload=part, progress=len(part))] for split, part in parts.items()}

    def describe(known: Mapping[str, str] | None) -> Any:
        return {"files": source.describe(known), "tail": fraction}

    return {split: Texts(describe, functools.partial(items.__getitem__, split)) for split in parts}
