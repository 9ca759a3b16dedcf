"""The safetensors format, read and written one tensor at a time, so that only one is in memory.

A file is a length (8 bytes, little-endian), a JSON header {name: {"dtype", "shape", "data_offsets"}} of that many
bytes, and the tensors. Larger models are several files with an index {"weight_map": {name: file}}.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from diffusionlm import schema
from diffusionlm.errors import UserError, naming
from diffusionlm.interop import safetensors_header
from diffusionlm.untrusted import kind_of, plain_name

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SHARD_BYTES = 5 * 10**9


class Tensor(NamedTuple):
    """A tensor in a file, not read yet."""

    file: Path
    name: str
    kind: str  # its dtype, as the format names it
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def dtype(self) -> np.dtype:
        """The dtype; raise `UserError` if it is not in `DTYPES`."""
        if self.kind not in DTYPES:
            raise UserError(
                f"{self.file} has {self.name!r} in {self.kind}, and this version reads {', '.join(DTYPES)}; convert it "
                "to one"
            )
        return DTYPES[self.kind]

    def read(self) -> np.ndarray:
        """Return the tensor.

        Raises:
          UserError: the file is cut short, or the dtype is not in `DTYPES`.
        """
        out = np.empty(self.shape, self.dtype)
        with naming(self.file), self.file.open("rb") as file:
            file.seek(self.offset)
            if file.readinto(out.reshape(-1).view(np.uint8).data) != out.nbytes:
                raise UserError(f"{self.file} ends within a tensor; download it again")
        return out


def find(source: Path) -> dict[str, Tensor]:
    """Return every tensor of a .safetensors file, or of a directory with one or with an index of several.

    Raises:
      UserError: there is no such file, it has another format or a damaged header, or a shard is missing or cut short.
    """
    files: Mapping[Path, set[str] | None]  # the tensors to take from each file; None: all of them
    if source.is_file():
        files = {source: None}
    elif (source / SINGLE).is_file():
        files = {source / SINGLE: None}
    elif (source / INDEX).is_file():
        files = _read_index(source / INDEX)
    else:
        pickles = sorted(file.name for file in source.glob("*") if file.suffix in PICKLES)
        if pickles:
            raise UserError(_pickle_message(source / pickles[0]))
        if source.is_dir():
            reason = f"holds neither {SINGLE} nor {INDEX}"
        else:
            reason = f"is {kind_of(source)}" if source.exists() else "does not exist"
        raise UserError(
            f"no weights at {source}: it {reason}; give a directory that holds one of them, or a .safetensors "
            "file (nothing is downloaded from a hub)"
        )
    tensors: dict[str, Tensor] = {}
    for file, names in files.items():
        stored = _read_header(file)
        if names is not None:
            if missing := sorted(names - set(stored)):
                raise UserError(f"{file} lacks the tensor {missing[0]!r}, which {INDEX} says it has; download it again")
            stored = {name: tensor for name, tensor in stored.items() if name in names}  # the index decides
        tensors |= stored
    return tensors


def _read_index(index: Path) -> dict[Path, set[str]]:
    try:
        weight_map = schema.convert(schema.read_json(index, dict[str, Any]).get("weight_map"), dict[str, str], index)
    except OSError as error:
        raise UserError(f"cannot read {index}: {error.strerror or error}; download it again") from error
    except UserError as error:
        raise UserError(f"{error}; the index is damaged: download it again") from error
    files: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(index.parent / plain_name(file, str(index)), set()).add(name)
    if missing := sorted(file.name for file in files if not file.is_file()):
        raise UserError(
            f"{index.parent} lacks {len(missing)} of its {len(files)} shards, first {missing[0]}; download them again"
        )
    return files


def _pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle, which runs code when it is read; convert it to safetensors first (load it with the "
        "library that wrote it, and save_pretrained(..., safe_serialization=True))"
    )


def _read_header(path: Path) -> dict[str, Tensor]:
    if path.suffix in PICKLES:
        raise UserError(_pickle_message(path))
    entries, start = safetensors_header.read(path)
    return {
        name: Tensor(path, name, entry.dtype, entry.shape, start + entry.data_offsets[0])
        for name, entry in entries.items()
    }


class Spec(NamedTuple):
    """The shape and dtype of a tensor that will be written."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    directory: Path, specs: Mapping[str, Spec], make: Callable[[str], np.ndarray], shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write tensors into a directory and return the names of the files.

    Args:
      directory: an existing directory.
      specs: the shape and dtype of each tensor by name, in the order in which they are written.
      make: returns the tensor of a name; called when it is that tensor's turn.
      shard_bytes: the most bytes of tensors in a file; larger models get several files and an index.
    """
    shards: list[list[str]] = [[]]
    filled = 0  # bytes in the last shard
    for name, spec in specs.items():
        if filled and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0  # bytes in the last shard
        shards[-1].append(name)
        filled += spec.nbytes
    if len(shards) == 1:
        _write_file(directory / SINGLE, specs, shards[0], make)
        return [SINGLE]
    files = [f"model-{s:05d}-of-{len(shards):05d}.safetensors" for s in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        _write_file(directory / file, specs, names, make)
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [*files, INDEX]


def _write_file(path: Path, specs: Mapping[str, Spec], names: Sequence[str], make: Callable[[str], np.ndarray]) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    offset = 0
    for name in names:
        shape, dtype = specs[name]
        end = offset + specs[name].nbytes
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    with naming(path), path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            tensor = np.ascontiguousarray(make(name))
            if (tensor.shape, tensor.dtype) != specs[name]:
                raise ValueError(f"{name} is {tensor.dtype}{tensor.shape}, but its header says {specs[name]}")
            file.write(tensor.reshape(-1).view(np.uint8).data)
