"""What it costs that a run owns its directory: the speed of a tiny run with its lease, relative to one without.

    python experiments/benchmarks/locks.py --repeats 8

trains the same tiny model with and without a lease in turn, and prints the ratio of their times per step. The model is
small enough that a step takes about a millisecond, and `--lease-seconds 0.4` renews the lease 300 times as often as a
run does; a checkpoint, before which the lease is confirmed, is not saved.
"""

import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import tyro
from etils import epath

import diffusionlm as dlm
from diffusionlm import config_io
from diffusionlm.data.prepare import prepare
from diffusionlm.ownership import claims
from diffusionlm.ownership.lease import LEASE_SECONDS
from diffusionlm.training import fence
from diffusionlm.training.metrics import read

SIZE = {"model.d_model": 16, "model.n_layers": 1, "model.n_heads": 1, "model.n_kv_heads": 1, "model.head_dim": 16}
SIZE |= {"model.d_ff": 32, "model.vocab_size": 257, "data.sequence_length": 16, "model.max_length": 16}
RUN = {
    "diffusion.arm_steps": 0,
    "optim.arm_peak_lr": 0.0,
    "data.batch_size": 8,
    "run.log_every": 1,
    "run.eval_every": 0,
    "run.eval_records": 8,
    "run.eval_draws": 2,
}
RUN |= {"diffusion.arm_steps": 0, "optim.arm_peak_lr": 0.0}
RUN |= {"run.checkpoint_every": 10**6, "run.checkpoint_minutes": 0, "run.showcase": False}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Runs of each kind, steps of a run, and how long a lease lasts."""

    repeats: int = 8
    steps: int = 1000
    lease_seconds: float = LEASE_SECONDS


@contextlib.contextmanager
def no_owner(workdir: epath.Path, outer: fence.Fence | None) -> Iterator[fence.Fence]:
    """Stand in for `owned_run`: nobody owns the directory."""
    yield fence.Fences()


def seconds_a_step(dataset: Path, steps: int) -> float:
    """Train once; return the time that a tenth of the logged steps beats: of a busy machine, the undisturbed ones."""
    fields = {**SIZE, **RUN, "data.path": str(dataset), "run.steps": steps}
    with tempfile.TemporaryDirectory() as workdir:
        dlm.train(config_io.with_fields(dlm.experiment("demo"), fields), workdir)
        lines = [line["step_seconds"] for line in read(workdir) if "step_seconds" in line]
    return statistics.quantiles(lines[steps // 10 :], n=10)[0]


def renewal_seconds(directory: Path, count: int = 50) -> float:
    """Return the median time of a renewal, which a thread of its own does four times in the life of a lease."""
    with claims.owned(directory / claims.FILE, "it", "") as lease:
        assert lease is not None
        times = []
        for _ in range(count):
            began = time.perf_counter()
            lease.confirm()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def main(arguments: Arguments) -> None:
    """Measure, and print a line of JSON."""
    from diffusionlm.training import loop

    owned = loop.owned_run
    claims.Claimant.__init__.__kwdefaults__["seconds"] = arguments.lease_seconds
    times: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as directory:
        text = Path(directory) / "text.txt"
        text.write_text("\n".join(str(n) for n in range(20_000)))
        dataset = Path(directory) / "data"
        prepare(str(text), dataset, sequence_length=16, tokenizer="byte", progress=False)
        seconds_a_step(dataset, 100)  # compiles
        began, renewal = time.monotonic(), renewal_seconds(Path(directory))
        for repeat in range(arguments.repeats):
            for kind in ("with", "without")[:: 1 if repeat % 2 else -1]:
                loop.owned_run = owned if kind == "with" else no_owner
                times[kind].append(seconds_a_step(dataset, arguments.steps))
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
    print(
        json.dumps(
            {
                **dataclasses.asdict(arguments),
                "milliseconds_a_step": {kind: round(1e3 * statistics.median(t), 4) for kind, t in times.items()},
                "renewal_milliseconds": round(1e3 * renewal, 2),
                "ratio": round(statistics.median(ratios), 4),
                "ratios": [round(ratio, 3) for ratio in ratios],
                "seconds": round(time.monotonic() - began),
            }
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Arguments))
