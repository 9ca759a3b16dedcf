"""A description of what a sweep measured, for a reader who has only the page."""

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from etils import epath

from diffusionlm.scaling.sweep.directory import Identity, cell_directory
from diffusionlm.scaling.sweep.recipe import Cell, ScalingRecipe, Sweep
from diffusionlm.scaling.sweep.results import read_concurrently
from diffusionlm.storage import run_path
from diffusionlm.training import outcome


def describe(
    sweep: Sweep, cells: Sequence[Cell], workdir: os.PathLike | str, identity: Identity | None, today: str = ""
) -> tuple[dict[str, str], list[str]]:
    """Describe what a sweep measured.

    Args:
      sweep: the sweep.
      cells: the cells that the report is about, finished or not.
      workdir: the directory of the sweep.
      identity: the content of sweep.json.
      today: the date of the report; empty: the clock's.

    Returns:
      The rows of a table, and warnings about the data.
    """
    rows = _describe_grid(sweep, cells)
    recipes: dict[ScalingRecipe, set[str]] = {}
    for cell in cells:  # recipes that differ in nothing but their share are one
        recipe = replace(cell.recipe, name="roads", arm_share=0.5) if cell.arm_share else cell.recipe
        recipes.setdefault(recipe, set()).add(cell.road)
    for recipe, objectives in recipes.items():
        owner = f" of {recipe.name} ({', '.join(sorted(objectives))})" if len(recipes) > 1 else ""
        rows |= {f"{key}{owner}": value for key, value in _describe_recipe(recipe).items()}
    rows["dataset"] = f"sha256 {identity['dataset'] if identity else 'unknown'}"
    if identity:
        rows["training text"] = f"{identity['unique_tokens']:,} different tokens"
    warnings = []
    path = run_path(workdir)
    counts = read_concurrently(lambda cell: _scored_text(cell_directory(path, cell.id)), cells)
    if scored := [count for count in counts if count]:
        tokens, size = min(scored)
        rows["held-out text, scored"] = f"{tokens:,} tokens, {size:,} bytes of text"
        length = next(iter(recipes)).sequence_length  # the same in all cells of a sweep
        records, eval_records = tokens / (length - 1), max(recipe.eval_records for recipe in recipes)
        if records < eval_records:
            warnings.append(
                f"losses are of {records:,.0f} of {eval_records:,} held-out records that the recipe asks for; how much "
                "the choice of so little text matters is in no interval"
            )
    rows["date of this report"] = today or datetime.now(UTC).date().isoformat()
    return rows, warnings


def _describe_grid(sweep: Sweep, cells: Sequence[Cell]) -> dict[str, str]:
    sizes = sorted({(cell.params, cell.preset) for cell in cells})
    budgets = sorted({cell.budget for cell in cells})
    seeds = sorted({cell.seed for cell in cells})
    full = len({(c.road, c.preset, c.budget) for c in cells}) * len(seeds) == len(cells)
    return {
        "sweep": sweep.name,
        "objectives": ", ".join(sorted({cell.road for cell in cells})),
        "model sizes N": f"{len(sizes)}, from {sizes[0][1]} ({sizes[0][0]:,} parameters) to {sizes[-1][1]} "
        f"({sizes[-1][0]:,})",
        "budgets C": f"{len(budgets)}: {', '.join(f'{budget:.3g}' for budget in budgets)} FLOPs",
        "seeds": ", ".join(map(str, seeds)) + ("" if full or len(seeds) == 1 else " (not all of them in every cell)"),
    }


def _describe_recipe(recipe: ScalingRecipe) -> dict[str, str]:
    schedule = (
        "constant" if recipe.schedule == "constant" else f"cosine, to {100 * recipe.final_lr_ratio:g}% of the peak"
    )
    by_width = f" at width {recipe.lr_width}, times (width / {recipe.lr_width})^{recipe.lr_exponent:g}"
    decayed = "matrices" if recipe.decay_mask == "matrices" else "all parameters"
    rows = {
        "batch": f"{recipe.batch_size} sequences of {recipe.sequence_length} tokens a step",
        "peak learning rate": f"{recipe.peak_lr:g}" + (by_width if recipe.lr_width else " at every width"),
        "schedule": schedule,
        "warm-up": f"{recipe.warmup_steps} steps, or {100 * recipe.warmup_fraction:g}% of all if that is more, but at "
        "most a quarter",
        "weight decay": f"{recipe.weight_decay:g} on {decayed}",
        "dtype": recipe.dtype,
        "evaluation": f"{recipe.eval_records:,} held-out records at most, {recipe.eval_draws} noise draws of each for "
        "mdm, one pass for arm",
    }
    if recipe.arm_share:
        opening = f" over {recipe.anneal_steps} steps" if recipe.anneal_steps else " at once"
        rows["autoregressive steps"] = (
            "the first ones, in arm50 50% of all; peak learning rate "
            f"{recipe.arm_peak_lr or recipe.peak_lr:g}, with the same factor of the width; each part has the schedule "
            f"and the warm-up by itself, and both end at the same rate; then attention opens{opening}"
        )
    if recipe.random_length:
        rows["random length"] = f"{100 * recipe.random_length:g}% of the sequences of mdm"
    return rows


def _scored_text(directory: epath.Path) -> tuple[int, int] | None:
    """Return the tokens and bytes of held-out text that a finished cell was scored on, if its file says so."""
    try:
        evaluation = outcome.read(directory / outcome.FILE)["eval"]
        return int(evaluation["tokens"]), int(evaluation["bytes"])
    except (OSError, ValueError, KeyError, TypeError):  # not finished, or an older file
        return None
