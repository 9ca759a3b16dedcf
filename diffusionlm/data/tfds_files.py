"""The two files beside the records that TFDS reads, checked whole before it does.

TFDS imports any module that features.json names, and finds the records by what dataset_info.json says. So both must be
what `prepare` writes for the dataset that meta.json describes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from etils import epath

from diffusionlm import schema, untrusted
from diffusionlm.errors import UserError

DATASET_NAME = "diffusionlm"  # as TFDS sees it
FEATURES, INFO = "features.json", "dataset_info.json"

_LIMIT = 1 << 20  # bytes; a dataset of 10,000 shards has an INFO of 200 kB
_CLASSES = "tensorflow_datasets.core.features"
_Digits = Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{1,18}\Z")]


class _Split(schema.Record, frozen=True):
    name: str
    filepathTemplate: Literal["{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"]
    shardLengths: list[_Digits]
    numBytes: _Digits = "0"


class _Info(schema.Record, frozen=True):
    name: Literal["diffusionlm"]
    version: Literal["1.0.0"]
    fileFormat: Literal["array_record"]
    splits: list[_Split]
    description: str = ""


def record_dtypes(vocab_size: int, length: int) -> dict[str, np.dtype]:
    """Return the dtypes of the arrays of a record, by name, each as narrow as its values allow."""
    limits = {"tokens": vocab_size, "segment_ids": length}
    return {name: np.dtype(np.uint16 if limit < 1 << 16 else np.uint32) for name, limit in limits.items()}


def features(vocab_size: int, length: int) -> dict[str, Any]:
    """Return the content of features.json for records of `length` tokens."""
    tensors = {
        name: {
            "pythonClassName": f"{_CLASSES}.tensor_feature.Tensor",
            "tensor": {"shape": {"dimensions": [str(length)]}, "dtype": dtype.name, "encoding": "bytes"},
        }
        for name, dtype in record_dtypes(vocab_size, length).items()
    }
    return {"pythonClassName": f"{_CLASSES}.features_dict.FeaturesDict", "featuresDict": {"features": tensors}}


def serialize(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Return the record of these arrays, which TFDS reads: a `tf.train.Example` whose features are sorted by name.

    TFDS' own serializer gives the same bytes in an order that differs from process to process.
    """
    features = b""
    for name, array in sorted(arrays.items()):
        feature = _field(1, _field(1, array.tobytes()))  # a list of bytes, of one member
        features += _field(1, _field(1, name.encode()) + _field(2, feature))
    return _field(1, features)


def _field(number: int, content: bytes) -> bytes:
    """Return a field of a protocol buffer message that has a length."""
    head, size = bytearray([number << 3 | 2]), len(content)
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head) + content


def shard_names(split: str, shards: int) -> list[str]:
    """Return the names of the files of a split."""
    return [f"{DATASET_NAME}-{split}.array_record-{i:05d}-of-{shards:05d}" for i in range(shards)]


def digests(directory: epath.Path) -> dict[str, str]:
    """Return the sha256 of both files by name."""
    return {name: hashlib.sha256(_read(directory, name)).hexdigest() for name in (FEATURES, INFO)}


def check(directory: epath.Path, vocab_size: int, length: int, splits: Mapping[str, tuple[int, Sequence[str]]]) -> None:
    """Refuse a dataset that TFDS would read in another way than meta.json describes it.

    Args:
      directory: the dataset.
      vocab_size: of its tokenizer.
      length: tokens of a record.
      splits: the number of records and the names of the shards of each.

    Raises:
      UserError: a file is missing, or is not what `prepare` writes.
    """
    stored = schema.decode(_read(directory, FEATURES), dict[str, Any], directory / FEATURES)
    if stored != features(vocab_size, length):
        raise UserError(
            f"{directory / FEATURES} is not what `diffusionlm data prepare` writes for records of {length} tokens of "
            f"a vocabulary of {vocab_size}, and TFDS would run the classes that it names; copy or prepare the dataset "
            "again"
        )
    info = schema.decode(_read(directory, INFO), _Info, directory / INFO)
    described = {split.name: split for split in info.splits}
    if len(described) < len(info.splits) or set(described) != set(splits):
        names = ", ".join(untrusted.printable(split.name) for split in info.splits)
        raise UserError(f"{directory / INFO} has the splits {names}, and meta.json {', '.join(splits)}; prepare again")
    for name, (records, shards) in splits.items():
        lengths = [int(number) for number in described[name].shardLengths]
        if list(shards) != shard_names(name, len(lengths)) or sum(lengths) != records:
            raise UserError(
                f"{directory / INFO} has {sum(lengths)} records in {len(lengths)} shards of split {name!r}, and "
                f"meta.json {records} in {len(shards)}; copy or prepare the dataset again"
            )


def _read(directory: epath.Path, name: str) -> bytes:
    try:
        return untrusted.read_bytes(directory / name, _LIMIT)
    except FileNotFoundError as error:
        raise UserError(f"dataset {str(directory)!r} is damaged: it lacks {name}; copy or prepare it again") from error
