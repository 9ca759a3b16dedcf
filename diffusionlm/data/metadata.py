"""The description of a prepared dataset: `meta.json`, beside the files that TFDS reads.

It is written last, so a directory without it is not a dataset.
"""

import functools
import hashlib
import json
import logging
from typing import Annotated, Any, Literal

import msgspec
from etils import epath

from diffusionlm import schema, untrusted
from diffusionlm.data import tfds_files
from diffusionlm.errors import UserError
from diffusionlm.schema import Count, Positive, Sha256
from diffusionlm.storage import write_atomically

log = logging.getLogger(__name__)

FILE = "meta.json"
FORMATS = {"chunk": 1, "examples": 2, "packed_examples": 3}  # by packing

_SplitName = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_]+\Z")]


class SplitMetadata(schema.Record, frozen=True):
    """Counts of one split, over all its documents; what follows the last whole record is counted but not stored.

    With packing "examples" or "packed_examples" records hold dialogues, and the counts are of their answers.
    """

    records: Positive  # rows of sequence_length + 1 tokens
    documents: Positive
    tokens: Positive  # with one EOS a document
    raw_bytes: Positive  # UTF-8 bytes of the documents
    token_bytes: Positive  # bytes that the tokens stand for: equal to raw_bytes where the tokenizer is lossless
    sha256: Sha256  # of the token stream (see `words`), and of the lengths of its dialogues
    shards: dict[str, Count]  # file name -> its size in bytes


class Metadata(schema.Record, frozen=True):
    """The description of a prepared dataset, beside its records."""

    tokenizer: dict[str, Any]  # whole: `tokenizers.from_dict` rebuilds it
    vocab_size: Positive
    sequence_length: Positive  # tokens that a model sees; a record holds one more
    splits: dict[_SplitName, SplitMetadata]
    request: dict[str, Any]  # what `prepare` was asked for, to recognise the same request
    malformed: Count  # input lines or files skipped on request
    empty: Count  # documents without text, which are always skipped
    # chunk: documents, each with its EOS, concatenated in order and cut; examples: a dialogue a record;
    # packed_examples: several dialogues a record in the training split
    packing: Literal["chunk", "examples", "packed_examples"] = "chunk"
    template: dict[str, Any] | None = None  # of dialogues: `Template.from_dict` rebuilds it
    too_long: Count = 0  # answers left out because they end beyond sequence_length, with all that follows them
    bos: bool = False  # of texts: BOS precedes each document
    left_out: dict[str, Count] = {}  # option that selects documents -> those that it left out

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

    def write(self, directory: epath.Path) -> None:
        """Write `meta.json` into `directory`, in which the files of TFDS are, with the digests of both."""
        values = msgspec.to_builtins(self) | {"format": self.format, "sha256": self.sha256}
        values["files"] = tfds_files.digests(directory)
        values["checksum"] = _checksum(values)
        write_atomically(directory / FILE, json.dumps(values, indent=2) + "\n")


def _checksum(values: dict[str, Any]) -> str:
    """Return the sha256 of everything in `meta.json` but the checksum itself."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read(directory: epath.Path) -> Metadata:
    """Read the metadata of the dataset in `directory`.

    Raises:
      UserError: the directory holds no dataset, an incomplete one, or one of another format.
    """
    file = directory / FILE
    try:
        values = schema.decode(untrusted.read_bytes(file), object, file)
    except (FileNotFoundError, NotADirectoryError) as error:
        if directory.is_dir():
            state = "has no meta.json, so it is not a (whole) prepared dataset"
        else:
            state = f"is {untrusted.kind_of(directory)}, not a directory" if directory.exists() else "does not exist"
        raise UserError(f"dataset {str(directory)!r} {state}; make one with `diffusionlm data prepare`") from error
    except OSError as error:
        raise UserError(f"cannot read {str(file)!r}: {error.strerror or error}") from error
    metadata = _parse(values, directory)
    described = {name: (split.records, list(split.shards)) for name, split in metadata.splits.items()}
    tfds_files.check(directory, metadata.vocab_size, metadata.sequence_length + 1, described)
    for split in metadata.splits.values():
        for shard, expected in split.shards.items():
            size = (directory / shard).stat().length if (directory / shard).exists() else 0
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
    values = dict(values)
    checksum, digests = values.pop("checksum", None), values.pop("files", None)
    described = dict(values)
    sha256, _ = values.pop("sha256", None), values.pop("format")
    try:
        metadata = schema.convert(values, Metadata, file)
    except UserError as error:
        raise UserError(f"{error}; it is not the metadata of a prepared dataset, so prepare it again") from error
    _require_counts(metadata, file)
    if checksum is None and digests is None:
        _warn_of_no_checksum(str(directory))
    elif checksum != _checksum(described | {"files": digests}):
        raise UserError(f"{str(file)!r} was changed after it was written; copy or prepare the dataset again")
    if metadata.sha256 != sha256:
        raise UserError(f"{str(file)!r} was changed after it was written (sha256 differs); prepare the dataset again")
    if digests is not None and digests != tfds_files.digests(directory):
        raise UserError(
            f"dataset {str(directory)!r} is damaged: {tfds_files.FEATURES} or {tfds_files.INFO} was changed after it "
            "was written; copy or prepare it again"
        )
    return metadata


@functools.cache
def _warn_of_no_checksum(directory: str) -> None:
    log.warning(
        "dataset %s was prepared by an earlier version, without checksums: its counts cannot be verified",
        untrusted.printable(directory),
    )


def _require_counts(metadata: Metadata, file: epath.Path) -> None:
    """Refuse counts that contradict one another."""
    length = metadata.sequence_length + 1
    if not isinstance(metadata.tokenizer.get("sha256"), str):
        raise UserError(f"{file}: tokenizer has no sha256; it is not a prepared dataset's, so prepare it again")
    if (metadata.template is not None) != (metadata.packing != "chunk"):
        raise UserError(f"{file}: a template belongs to dialogues, not to packing={metadata.packing}; prepare it again")
    for name, split in metadata.splits.items():
        chunks = split.tokens // length
        if split.records != chunks if metadata.packing == "chunk" else split.documents < split.records:
            raise UserError(
                f"{file}: split {name!r} has records={split.records}, documents={split.documents} and "
                f"tokens={split.tokens}, which contradict; prepare it again"
            )
        if list(split.shards) != tfds_files.shard_names(name, len(split.shards)) or not split.shards:
            raise UserError(
                f"{file}: split {name!r} has the shards {untrusted.printable(', '.join(split.shards))[:200]}, which "
                "are not named as `diffusionlm data prepare` names them; prepare it again"
            )
