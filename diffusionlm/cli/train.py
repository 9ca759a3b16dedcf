"""The verb `train`, over `diffusionlm.training.loop.train`."""

import math
from typing import Annotated, Any

from etils import epath

from diffusionlm import shortening
from diffusionlm.cli.experiments import experiment_first
from diffusionlm.cli.output import PROGRAM, fail, short_count
from diffusionlm.config import Config
from diffusionlm.console import write
from diffusionlm.errors import UserError
from diffusionlm.options import SETTINGS, parse


def train(args: list[str], prog: str) -> int:
    """Train an experiment, or resume a run: train EXPERIMENT [--workdir DIR] [--FIELD.SUBFIELD VALUE ...]."""
    usage = f"{prog} EXPERIMENT [--workdir DIR] [--config FILE] [--wandb] [--FIELD.SUBFIELD VALUE ...]"
    cfg, words = experiment_first(args, prog, usage)
    if cfg is None:
        return 0

    def bind(
        settings: Annotated[Config, *SETTINGS] = cfg,
        workdir: str | None = None,
        config: str | None = None,
        wandb: bool = False,
    ) -> int:
        """Train this experiment, or resume the run that is in the directory.

        Args:
          settings: the experiment.
          workdir: the run directory; None: runs/NAME.
          config: a .json or .toml file with fields of the experiment, over which the options go; without EXPERIMENT,
            its field `name` says which one it is, or it has all fields.
          wandb: also log the metrics to Weights & Biases, in the project WANDB_PROJECT or diffusionlm.
        """
        return _train(settings, workdir or f"runs/{settings.name}", wandb)

    return parse(bind, words, f"{prog} {cfg.name}")()


def _train(cfg: Config, workdir: str, wandb: bool) -> int:
    shortening.validate(cfg)  # before JAX is imported, which takes seconds
    import jax

    from diffusionlm.evaluation.training import show_finished
    from diffusionlm.training.loop import DivergenceError
    from diffusionlm.training.loop import train as run_training

    try:
        run = run_training(cfg, workdir, wandb=wandb)
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
    sources = "; ".join(
        f"{name} {source['share']:.1%} of the rows, {source['epochs']:.3g} epochs"
        for name, source in result.get("sources", {}).items()
    )
    return (
        f"{cfg.name} {'was done before' if done_before else 'is done'}: {result['step']} steps, "
        f"{short_count(result['tokens'])} tokens, {_duration(result['seconds'])}; held out: {figures}\n"
        + (f"trained on {sources}\n" if sources else "")
        + f"run directory: {workdir}; next: {PROGRAM} sample {workdir}"
    )
