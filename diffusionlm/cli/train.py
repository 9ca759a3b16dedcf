"""The verb `train`, over `diffusionlm.training.loop.train`."""

import math
from typing import Annotated, Any

from etils import epath

from diffusionlm.cli.experiments import experiment_first
from diffusionlm.cli.output import PROGRAM, fail, short_count
from diffusionlm.config import Config
from diffusionlm.console import write
from diffusionlm.errors import UserError
from diffusionlm.options import SETTINGS, parse


def train(args: list[str], prog: str) -> int:
    """Train an experiment, or resume a run: train EXPERIMENT [--workdir DIR] [--FIELD.SUBFIELD VALUE ...]."""
    cfg, words = experiment_first(args, prog, f"{prog} EXPERIMENT [--workdir DIR] [--FIELD.SUBFIELD VALUE ...]")
    if cfg is None:
        return 0

    def bind(config: Annotated[Config, *SETTINGS] = cfg, workdir: str | None = None) -> tuple[Config, str]:
        """Train this experiment, or resume the run that is in the directory.

        Args:
          config: the experiment.
          workdir: the run directory; None: runs/NAME.
        """
        return config, workdir or f"runs/{config.name}"

    return _train(*parse(bind, words, f"{prog} {args[0]}")())


def _train(cfg: Config, workdir: str) -> int:
    import jax

    from diffusionlm.evaluation.training import show_finished
    from diffusionlm.training.loop import DivergenceError
    from diffusionlm.training.loop import train as run_training

    try:
        run = run_training(cfg, workdir)
    except DivergenceError as error:
        return fail(str(error), 1)
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise UserError(f"cannot use the run directory {workdir}: {error.strerror}") from error
    if jax.process_index():  # process 0 reports for all
        return 0
    if run.result is None:
        write(f"stopped and saved at step {run.step} of {cfg.run.steps} in {run.workdir}; the same command resumes it")
        return 0
    show_finished(run)
    write(_result_text(run.result, run.done_before, run.workdir, cfg))
    return 0


def _duration(seconds: float) -> str:
    """Return a duration such as "3 min 46 s" or "26 h 4 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _result_text(result: dict[str, Any], done_before: bool, workdir: epath.Path, cfg: Config) -> str:
    held_out = result["eval"]
    if not math.isfinite(held_out["nelbo_nats_per_token"]):
        figures = "the evaluation is not finite"
    else:
        error = f" +/- {held_out['nelbo_stderr']:.3f}" if held_out["nelbo_stderr"] else ""
        nats = f"{held_out['nelbo_nats_per_token']:.3f}{error} nats per token"
        figures = f"{held_out['bits_per_byte']:.3f} bits per byte, {nats}"
    return (
        f"{cfg.name} {'was done before' if done_before else 'is done'}: {result['step']} steps, "
        f"{short_count(result['tokens'])} tokens, {_duration(result['seconds'])}; held out: {figures}\n"
        f"run directory: {workdir}; next: {PROGRAM} sample {workdir}"
    )
