"""Weights in safetensors files: one file, or shards with an index, read and written a tensor at a time."""

import json
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffusionlm.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


class Weights:
    """The tensors of a model in a directory or a file, by name.

    Raises:
      UserError: no safetensors there, a shard is missing, truncated or damaged, or a tensor is of another type.
    """

    def __init__(self, source: Path):
        self.source = source
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        dtypes = set()
        for file in _files(source):
            with _reading(file) as f:
                for name in f.keys():
                    one = f.get_slice(name)
                    self._files[name], self.shapes[name] = file, tuple(one.get_shape())
                    dtypes.add(one.get_dtype())
        if strange := sorted(dtypes - set(DTYPES)):
            raise UserError(f"{source} holds tensors of type {strange[0]}; convert them to one of {', '.join(DTYPES)}")

        self.half = dtypes != {"F32"}  # whether any is in 16 bits

    def __getitem__(self, name: str) -> np.ndarray:
        # Opened anew each time: the pages of a mapped file would otherwise stay in memory beside what is made of them.
        with _reading(self._files[name]) as f:
            return f.get_tensor(name)


class _reading:
    """An open file, whose damage is one line."""

    def __init__(self, file: Path):
        self._file = file

    def __enter__(self):
        try:
            self._open = safe_open(self._file, framework="numpy")
            return self._open.__enter__()
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self._file} is damaged or truncated ({error}); download or copy it again") from error

    def __exit__(self, *error: object) -> None:
        self._open.__exit__(*error)


def _files(source: Path) -> list[Path]:
    if source.is_file():
        if source.suffix != ".safetensors":
            raise UserError(f"{source} is no .safetensors file; convert pickles such as pytorch_model.bin first")
        return [source]
    if not source.is_dir():
        raise UserError(f"{source} does not exist; give a model's directory, or a .safetensors file")
    if (index := source / INDEX).exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{index} is damaged ({error!r}); download or copy it again") from error
        if missing := [name for name in names if not (source / name).exists()]:
            raise UserError(f"{source} lacks {missing[0]}, one of {len(names)} shards in {INDEX}; download it")
        return [source / name for name in names]
    if found := sorted(source.glob("*.safetensors")):
        return found
    pickles = [path.name for path in sorted(source.glob("*.bin"))]
    why = f"only {pickles[0]}, a pickle; convert it to safetensors" if pickles else "no weights; is it complete?"
    raise UserError(f"{source} holds no .safetensors file and {why}")


def write(directory: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> int:
    """Writes tensors as one file, or above SHARD_BYTES as shards with an index; returns their bytes."""
    shards: list[list[str]] = []
    part: dict[str, np.ndarray] = {}
    total = size = 0

    def flush() -> None:
        save_file(part, directory / f"part-{len(shards):05d}.safetensors", metadata={"format": "pt"})
        shards.append(list(part))
        part.clear()

    for name, tensor in tensors:
        if part and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        part[name] = np.ascontiguousarray(tensor)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        (directory / "part-00000.safetensors").rename(directory / SINGLE)
        return total
    found: dict[str, str] = {}
    for i, names in enumerate(shards):
        final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"part-{i:05d}.safetensors").rename(directory / final)
        found |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": found}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total
