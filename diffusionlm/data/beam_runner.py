"""Jobs on Apache Beam: on the machines of Dataflow, Flink or Spark, or on this one with Beam's own runners.

Each stage of the preparation is one pipeline. Its workers write into the directory of the dataset, which they must all
see: a bucket, or a file system that they share. So what a pipeline leaves when it fails or is preempted is not done
again.
"""

import argparse
import contextlib
import io
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from diffusionlm.data.jobs import FAILED, Failure, Job, Receipt, Runner, checked, perform, read_receipt
from diffusionlm.errors import StorageError, UserError, require_package
from diffusionlm.untrusted import printable

POLL_SECONDS = 5.0  # between two looks at how far a pipeline is
RUNNING = "RUNNING"


class PipelineEnded(StorageError):
    """A pipeline ended before its work was done."""


def require_beam(words: Sequence[str]) -> Any:
    """Return Beam's options of these words, which follow `--` on the command line.

    Raises:
      UserError: Beam is not installed, or does not know one of them.
    """
    require_package("apache_beam", "runner=beam", "apache-beam", "beam")
    from apache_beam.options.pipeline_options import PipelineOptions  # pyright: ignore[reportMissingImports]: an extra

    # Beam itself keeps quiet about what it does not know, so that a misspelled option would have no effect.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, conflict_handler="resolve")
    for options in PipelineOptions.__subclasses__():
        options._add_argparse_args(parser)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            _, rest = parser.parse_known_args(list(words))
    except SystemExit:
        reason = printed.getvalue().strip().rpartition("error: ")[2].partition("\n")[0]
        raise UserError(f"options of Beam after --: {printable(reason)}; correct or drop it") from None
    if rest:
        raise UserError(f"Beam has no option {printable(rest[0])}; see the options of its runner, or drop it")
    return PipelineOptions(list(words))


def beam_runner(options: Any) -> Runner:
    """Return a runner whose stages are pipelines with these options of Beam."""

    def run(jobs: Iterable[Job]) -> Iterator[Receipt]:
        jobs = list(jobs)
        _forget_failures(jobs)
        pending = [job for job in jobs if read_receipt(epath.Path(job.receipt)) is None]
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

    with _in_one_line():
        pipeline = beam.Pipeline(options=options)
        _ = pipeline | "jobs" >> beam.Create(jobs) | "spread" >> beam.Reshuffle() | "work" >> beam.Map(_count)
        return pipeline.run()


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    """Raise `PipelineEnded` for whatever Beam raises."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = printable(" ".join(str(error).split()))[:300] or type(error).__name__
        raise PipelineEnded(
            f"the pipeline of Beam failed ({reason}); see its log, and give the same command again: what is done is "
            "not repeated"
        ) from error


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
    """Yield what the workers wrote about each job, as it appears; cancel the pipeline if nobody asks for the rest.

    Raises:
      PipelineEnded: there is nothing about one of them at the end.
    """
    try:
        for job in jobs:
            receipt, failure = epath.Path(job.receipt), epath.Path(job.receipt + FAILED)
            while not (receipt.exists() or failure.exists()):
                state = _state(result)
                if state != RUNNING and not (receipt.exists() or failure.exists()):
                    raise PipelineEnded(
                        f"the pipeline of Beam ended ({state}) before {receipt} was written; see its log, and give the "
                        "same command again: what is done is not repeated"
                    )
                if state == RUNNING:
                    time.sleep(POLL_SECONDS)
            values = read_receipt(receipt)
            yield Failure(failure.read_text()) if values is None else values
        if result is not None:
            with _in_one_line():
                result.wait_until_finish()
    except BaseException:
        if result is not None and _state(result) == RUNNING:
            with contextlib.suppress(Exception):  # what ended the work matters more
                result.cancel()
        raise


def _state(result: Any) -> str:
    """Return RUNNING, or how a pipeline ended."""
    if result is None:
        return "DONE"
    from apache_beam.runners.runner import PipelineState  # pyright: ignore[reportMissingImports]: an extra

    state = result.state
    return str(state) if PipelineState.is_terminal(state) else RUNNING
