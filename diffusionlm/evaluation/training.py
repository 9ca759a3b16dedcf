"""A training run as `diffusionlm.train` offers it: it ends with a showcase if the experiment wants one."""

import jax
from etils import epath

from diffusionlm.config import Config
from diffusionlm.console import write
from diffusionlm.training import loop
from diffusionlm.training.loop import Run


def train(cfg: Config | str, workdir: epath.PathLike | None = None, *, wandb: bool = False) -> Run:
    """Train `cfg` in `workdir` (default: runs/NAME), or resume the run that is there.

    A notebook shows the loss as a curve that grows. Ctrl-C, or the button that interrupts a cell, saves the run after
    the current step and returns; the same call resumes it. After the last step, experiments with `run.showcase` show
    the bound beside baselines, a sample and an infilling.

    On several hosts, every process calls this; see `diffusionlm.runtime.initialize` for how they find each other.

    Args:
      cfg: a configuration, or the name of an experiment.
      workdir: the run directory.
      wandb: also log the metrics to Weights & Biases.

    Raises:
      UserError: the configuration is inconsistent, the directory holds another run or another process trains there,
        or the data do not fit the model; of several processes, all raise it if one must.
      DivergenceError: a batch gave a loss or gradient that cannot be used.
    """
    run = loop.train(cfg, workdir, wandb=wandb)
    if not run.done and jax.process_index() == 0:
        write(
            f"stopped and saved at step {run.step} of {run.config.run.steps} in {run.workdir}; the same call resumes it"
        )
    show_finished(run)
    return run


def show_finished(run: Run) -> None:
    """Show what a run can do that has just been finished, if its experiment wants that."""
    # Other processes would not wait for it.
    if run.config.run.showcase and run.done and not run.done_before and jax.process_count() == 1:
        from diffusionlm.evaluation import showcase

        showcase.show(run)
