"""Jobs on Apache Beam: on the machines of Dataflow, Flink or Spark, or on this one with Beam's own runners.

Each stage of the preparation is one pipeline. Its workers write into the directory of the dataset, which they must all
see: a bucket, or a file system that they share. So what a pipeline leaves when it fails or is preempted is not done
again.
"""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from diffusionlm.data.jobs import FAILED, Failure, Job, Receipt, Runner, checked, perform
from diffusionlm.errors import UserError, require_package

POLL_SECONDS = 5.0  # between two looks at how far a pipeline is


class PipelineEnded(UserError):
    """A pipeline ended before its work was done."""


def require_beam(options: Sequence[str]) -> Any:
    """Return Beam's options of these words, which follow `--` on the command line.

    Raises:
      UserError: Beam is not installed, or does not know one of them.
    """
    require_package("apache_beam", "runner=beam", "apache-beam", "beam")
    from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]: an extra

    parsed = PipelineOptions(list(options))
    # Beam keeps quiet about what it does not know, so that a misspelled option would have no effect.
    known = parsed.get_all_options(retain_unknown_options=False)
    for word in options:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and name not in known and name.removeprefix("no_") not in known:
            raise UserError(f"Beam has no option --{name}; see the options of its runner, or drop it")
    return parsed


def beam_runner(options: Any) -> Runner:
    """Return a runner whose stages are pipelines with these options of Beam."""

    def run(jobs: Iterable[Job]) -> Iterator[Receipt]:
        jobs = list(jobs)
        _forget_failures(jobs)
        pending = [job for job in jobs if not epath.Path(job.receipt).exists()]
        return checked(_receipts(_start(pending, options), jobs))

    return run


def _forget_failures(jobs: Sequence[Job]) -> None:
    """Remove what earlier pipelines said of jobs that failed."""
    for job in jobs:
        epath.Path(job.receipt + FAILED).unlink(missing_ok=True)


def _start(jobs: Sequence[Job], options: Any) -> Any:
    """Start a pipeline that does the jobs; return its result, or None if there is nothing to do."""
    if not jobs:
        return None
    import apache_beam as beam  # pyright: ignore[reportMissingImports]: an extra

    pipeline = beam.Pipeline(options=options)
    _ = pipeline | "jobs" >> beam.Create(jobs) | "spread" >> beam.Reshuffle() | "work" >> beam.Map(_count)
    return pipeline.run()


def _count(job: Any) -> None:  # a `Job`, a protocol, with which Beam cannot deal
    """Do a job on a worker, and add its counts to those that the runner shows."""
    from apache_beam.metrics import Metrics  # pyright: ignore[reportMissingImports]: an extra

    receipt = perform(job)
    if isinstance(receipt, Failure):
        Metrics.counter("prepare", "failed").inc()
        return
    for name, value in receipt.items():
        if isinstance(value, int):
            Metrics.counter("prepare", name).inc(value)


def _receipts(result: Any, jobs: Sequence[Job]) -> Iterator[Receipt | Failure]:
    """Yield what the workers wrote about each job, as it appears.

    Raises:
      PipelineEnded: there is nothing about one of them at the end.
    """
    for job in jobs:
        receipt, failure = epath.Path(job.receipt), epath.Path(job.receipt + FAILED)
        while not (receipt.exists() or failure.exists()):
            state = _state(result)
            if state != "RUNNING" and not (receipt.exists() or failure.exists()):
                raise PipelineEnded(
                    f"the pipeline of Beam ended ({state}) before {receipt} was written; see its log, and give "
                    "the same command again: what is done is not repeated"
                )
            if state == "RUNNING":
                time.sleep(POLL_SECONDS)
        yield json.loads(receipt.read_text()) if receipt.exists() else Failure(failure.read_text())
    if result is not None:
        result.wait_until_finish()


def _state(result: Any) -> str:
    """Return RUNNING, or how a pipeline ended."""
    if result is None:
        return "DONE"
    if type(result).is_in_terminal_state(result.state):
        return str(result.state)
    return "RUNNING"
