"""The price of a checkpoint's checksums: seconds of saves and loads with and without them, in turns, and of processors.

    JAX_PLATFORMS=cpu python experiments/benchmarks/checkpoint_checksums.py [--megabytes 1000] [--directory DIR]

saves random float32 parameters, compressed (as runs do) and not (as `import` does), into DIR. In /dev/shm there is no
disk to wait for, so the share there is the largest.
"""

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import measure
import numpy as np
from orbax.checkpoint._src.serialization import tensorstore_utils

from diffusionlm import config, config_io
from diffusionlm.checkpoint import store
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.options import parse


@contextlib.contextmanager
def checksums(wanted: bool) -> Iterator[None]:
    """Save with checksums, or as Orbax does by itself."""
    chunks = store._checksum_chunks
    chunks()
    built = tensorstore_utils._build_zarr3_metadata
    if not wanted:
        store._checksum_chunks = lambda: "none"
        tensorstore_utils._build_zarr3_metadata = built.__wrapped__
    try:
        yield
    finally:
        store._checksum_chunks, tensorstore_utils._build_zarr3_metadata = chunks, built


def main(megabytes: int = 1000, directory: str = "/dev/shm", repetitions: int = 7) -> None:
    """Print the seconds of each.

    Args:
      megabytes: of the parameters.
      directory: where the checkpoints go, and are deleted again.
      repetitions: turns.
    """
    rng = np.random.default_rng(0)
    arrays = max(1, megabytes // 50)
    params = {f"w{i}": jax.device_put(rng.standard_normal((12_500, 1000), np.float32)) for i in range(arrays)}
    cfg = config.Config()
    sidecar = Sidecar("mdm", config_io.to_dict(cfg.model), config_io.to_dict(cfg.diffusion), cfg.mask_id)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:

        def save(compress: bool, wanted: bool) -> float:
            path = Path(temporary) / f"{compress}-{wanted}"
            shutil.rmtree(path, ignore_errors=True)
            start = time.perf_counter()
            with checksums(wanted):
                store.save_params(path, params, sidecar, compress=compress)
            return time.perf_counter() - start

        def load(compress: bool, wanted: bool) -> float:
            start = time.perf_counter()
            jax.block_until_ready(store.load_params(Path(temporary) / f"{compress}-{wanted}"))
            return time.perf_counter() - start

        for call in (save, load):
            for compress in (True, False):
                contenders = {wanted: lambda c=compress, w=wanted, call=call: call(c, w) for wanted in (True, False)}
                seconds = measure.in_turns(contenders, repetitions)
                ratios = [with_ / without for with_, without in zip(seconds[True], seconds[False], strict=True)]
                both = [measure.spread(seconds[wanted], "{:.2f}") for wanted in (True, False)]
                what = f"{call.__name__}, {'compressed' if compress else 'uncompressed'}"
                ratio = measure.spread(ratios, "{:.3f}")
                print(f"{what}: with {both[0]} s, without {both[1]} s; ratio {ratio}", flush=True)


if __name__ == "__main__":
    parse(main, sys.argv[1:], sys.argv[0])()
