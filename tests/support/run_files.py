"""The files of a training run, for the tests that compare, copy and cut them."""

import shutil
import warnings
from pathlib import Path

import jax
import numpy as np

from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.training import metrics
from diffusionlm.training.state import abstract_state
from support import tiny_run

TIMES = ("seconds", "step_seconds", "tokens_per_second", "goodput")  # of a line, what no two runs share


def truncated_copy(uninterrupted, workdir, step):
    """A copy of the uninterrupted run as it was after `step`, but for later lines of metrics.jsonl."""
    shutil.copytree(uninterrupted[0].workdir, workdir, dirs_exist_ok=True)
    (workdir / "DONE.json").unlink()
    for saved in checkpoint_steps(workdir):
        if saved > step:
            shutil.rmtree(workdir / "checkpoints" / str(saved))
    return workdir


def checkpoint_steps(workdir):
    """The steps that were saved; what a kill left half-written has another name."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def saved_state(cfg, workdir, step=None):
    with checkpoint.CheckpointManager(workdir, keep=100) as manager:
        return tiny_run.leaves(manager.restore(abstract_state(cfg, make_mesh(cfg.mesh)), step))


def timeless(workdir):
    """The lines of metrics.jsonl without what a clock told."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics.read(workdir)]


def assert_bit_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        found_bits, wanted_bits = np.asarray(found[name]), np.asarray(value)
        assert (found_bits.shape, found_bits.dtype) == (wanted_bits.shape, wanted_bits.dtype), name
        assert found_bits.tobytes() == wanted_bits.tobytes(), name


def content(directory):
    return {path: path.read_bytes() for path in sorted(Path(directory).rglob("*")) if path.is_file()}


def traced_steps(workdir):
    (trace,) = Path(workdir / "profile").rglob("*.xplane.pb")
    found = set()
    with warnings.catch_warnings():  # JAX's reader, which raises a few at its first use, cannot bear them as errors
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
            for line in plane.lines:
                found |= {dict(event.stats)["step_num"] for event in line.events if event.name == "train"}
    return sorted(found)
