"""The work of a cell as MFU credits it: without the part of the head at positions that are not predicted."""

from diffusionlm import flops
from diffusionlm.diffusion.objectives import predicted_share
from diffusionlm.scaling.sweep.recipe import Cell


def credited_flops(cell: Cell, start: int = 0, stop: int | None = None) -> float:
    """Return the FLOPs of the steps `start` to `stop` of a cell (0-based; None: to its end)."""
    stop = cell.steps if stop is None else stop
    arm_steps, batch = cell.config.diffusion.arm_steps, cell.recipe.batch_size
    autoregressive = max(min(stop, arm_steps) - start, 0)
    return batch * (autoregressive * _sequence(cell, 1.0) + (stop - start - autoregressive) * _sequence(cell))


def evaluation_flops(cell: Cell) -> float:
    """Return the FLOPs of the held-out evaluations of a cell.

    There is one at its end, and where the first steps are autoregressive, one of the exact autoregressive loss after
    these steps and one more at its end.
    """
    draws = cell.recipe.eval_draws if cell.objective == "mdm" else 1
    passes = draws * _sequence(cell) + (2 * _sequence(cell, 1.0) if cell.config.diffusion.arm_steps else 0.0)
    return cell.recipe.eval_records * passes / 3  # a backward pass takes twice as much as a forward one


def _sequence(cell: Cell, share: float | None = None) -> float:
    """Return the FLOPs of training on a sequence of which this share is predicted; None: the share of the objective."""
    share = predicted_share(cell.config) if share is None else share
    return flops.train(cell.config.model, cell.recipe.sequence_length, "model", predicted=share)
