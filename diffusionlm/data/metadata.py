"""The description of a prepared dataset: `meta.json`, beside the files that TFDS reads.

It is written last, so a directory without it is not a dataset.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from diffusionlm.errors import UserError
from diffusionlm.untrusted import plain_name

FILE = "meta.json"
FORMATS = {"chunk": 1, "examples": 2}  # by packing


@dataclass(frozen=True)
class SplitMetadata:
    """Counts of one split, over all its documents; what follows the last whole record is counted but not stored.

    With packing "examples" a record is a dialogue, and the counts are of its answers.
    """

    records: int  # rows of sequence_length + 1 tokens
    documents: int
    tokens: int  # with one EOS a document
    raw_bytes: int  # UTF-8 bytes of the documents
    token_bytes: int  # bytes that the tokens stand for: equal to raw_bytes where the tokenizer is lossless
    sha256: str  # of the token stream (see `words`), and of the lengths of its dialogues
    shards: dict[str, int]  # file name -> its size in bytes


@dataclass(frozen=True)
class Metadata:
    """The description of a prepared dataset, beside its records."""

    tokenizer: dict[str, Any]  # whole: `tokenizers.from_dict` rebuilds it
    vocab_size: int
    sequence_length: int  # tokens that a model sees; a record holds one more
    splits: dict[str, SplitMetadata]
    request: dict[str, Any]  # what `prepare` was asked for, to recognise the same request
    malformed: int  # input lines or files skipped on request
    empty: int  # documents without text, which are always skipped
    # chunk: documents, each with its EOS, concatenated in order and cut; examples: a dialogue a record
    packing: str = "chunk"
    template: dict[str, Any] | None = None  # of dialogues: `Template.from_dict` rebuilds it
    too_long: int = 0  # answers left out because they end beyond sequence_length, with all that follows them
    bos: bool = False  # of texts: BOS precedes each document

    @property
    def format(self) -> int:
        """The version of the format, one of `FORMATS`."""
        return FORMATS[self.packing]

    @property
    def sha256(self) -> str:
        """The identity of the content: equal for equal records, whatever made them and however they are sharded."""
        splits = {name: (split.records, split.sha256) for name, split in self.splits.items()}
        content = (self.format, self.packing, self.tokenizer["sha256"], self.sequence_length, splits)
        content += (self.template,) if self.template else ()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def write(self, directory: Path) -> None:
        """Write `meta.json` into `directory`."""
        values = dataclasses.asdict(self) | {"format": self.format, "sha256": self.sha256}
        (directory / FILE).write_text(json.dumps(values, indent=2) + "\n")


def read(directory: epath.Path) -> Metadata:
    """Read the metadata of the dataset in `directory`.

    Raises:
      UserError: the directory holds no dataset, an incomplete one, or one of another format.
    """
    file = directory / FILE
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError as error:
        state = "has no meta.json, so it is not a (whole) prepared dataset" if directory.is_dir() else "does not exist"
        raise UserError(f"dataset {str(directory)!r} {state}; make one with `diffusionlm data prepare`") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {str(file)!r}: {error}") from error
    metadata = _parse(values, directory)
    for split in metadata.splits.values():
        for shard, expected in split.shards.items():
            path = directory / plain_name(shard, str(file))
            size = path.stat().length if path.exists() else 0
            if size != expected:
                raise UserError(
                    f"dataset {str(directory)!r} is damaged: {shard} has {size} bytes, not {expected}; copy or prepare "
                    "it again"
                )
    return metadata


def _parse(values: Any, directory: epath.Path) -> Metadata:
    file = directory / FILE
    format, packing = (values.get("format"), values.get("packing")) if isinstance(values, dict) else (None, None)
    expected = FORMATS.get(str(packing), FORMATS["chunk"])
    if format != expected:
        raise UserError(
            f"dataset {str(directory)!r} has format {format!r}, not {expected}; prepare it again with this version"
        )
    try:
        sha256, _ = values.pop("sha256"), values.pop("format")
        splits = {name: SplitMetadata(**split) for name, split in values.pop("splits").items()}
        metadata = Metadata(splits=splits, **values)
        unchanged = metadata.sha256 == sha256
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{str(file)!r} is not the metadata of a prepared dataset ({error!r}); prepare it again"
        ) from error
    if not unchanged:
        raise UserError(f"{str(file)!r} was changed after it was written (sha256 differs); prepare the dataset again")
    return metadata
