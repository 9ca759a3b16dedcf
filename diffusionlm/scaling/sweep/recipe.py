"""From a scaling recipe and a grid to the cells of a sweep: full configurations, each of one budget and one size.

Solving a cell is arithmetic on its config (no tracing), so that a thousand take a moment. This module imports no JAX.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from diffusionlm import flops
from diffusionlm.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, RunConfig, check_types
from diffusionlm.config_io import fingerprint, flat, scientific_fields
from diffusionlm.errors import UserError, suggest
from diffusionlm.presets import arm_twin

LEAST_STEPS = 100  # whole steps then meet the budget to within 1%


@dataclass(frozen=True)
class ScalingRecipe:
    """What turns a size and a budget into a run: the hidden part of a scaling law.

    All else (Adam's constants, clipping, packing, time sampling, the loss's normalisation) is as `Config` has it by
    default, and is written out in the config.json of every cell.
    """

    name: str
    sequence_length: int
    batch_size: int  # sequences a step, in every cell
    peak_lr: float  # at `lr_width`
    # "6nd": C = 6 N D with N non-embedding parameters (SMDM, LLaDA); "model": three times the forward pass's matmuls,
    # attention and head included, with N the parameters that are multiplied, the head's included
    convention: Literal["6nd", "model"] = "6nd"
    lr_width: int = 0  # the width that peak_lr is for, where it depends on the width; 0: it does not
    lr_exponent: float = 0.0  # the peak is peak_lr * (d_model / lr_width) ** lr_exponent
    final_lr_ratio: float = 0.1  # of the peak, reached at the last step (cosine)
    schedule: Literal["cosine", "constant"] = "cosine"
    # linear, for so many steps or, if that is more, for so large a part of all; but never for more than a quarter
    warmup_steps: int = 100
    warmup_fraction: float = 0.01
    weight_decay: float = 0.1
    decay_mask: Literal["matrices", "all"] = "matrices"
    random_length: float = 0.0  # fraction of an MDM's examples cut to a uniform random length
    mask_id: int | None = None  # None: the appended row of the model
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    eval_records: int = 2048  # held-out sequences, the same for all cells
    eval_draws: int = 8  # noise draws, which all MDM cells have in common

    def __post_init__(self) -> None:
        check_types(self, f"recipe {self.name!r}: ")
        if self.lr_exponent and not self.lr_width:
            raise UserError(
                f"recipe {self.name!r}: lr_exponent={self.lr_exponent} needs lr_width, the width that peak_lr is for"
            )
        for name in ("sequence_length", "batch_size"):
            if not getattr(self, name) >= 1:
                raise UserError(f"recipe {self.name!r}: {name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.random_length <= 1:
            raise UserError(f"recipe {self.name!r}: random_length={self.random_length} must lie in [0, 1]")

    def params(self, model: ModelConfig) -> int:
        """The N of this recipe's laws."""
        counts = flops.parameters(model)
        if self.convention == "6nd":
            return counts.non_embedding
        return counts.non_embedding + model.vocab_size * model.d_model

    def tokens_per_sequence(self, objective: str) -> float:
        """Tokens of a sequence that count, on average: what a random length cuts off does not (SMDM, Section 5)."""
        L, cut = self.sequence_length, self.random_length if objective == "mdm" else 0.0
        return L * (1 - cut) + (L + 1) / 2 * cut

    def flops_per_step(self, model: ModelConfig, objective: str) -> float:
        """FLOPs of one optimizer step, as this recipe counts them; of twins alike."""
        share = self.tokens_per_sequence(objective) / self.sequence_length
        twin = arm_twin(model)  # the row of [MASK] could fill up another 128 rows of the head
        return self.batch_size * share * flops.train(twin, self.sequence_length, self.convention)

    def lr(self, model: ModelConfig) -> float:
        """The peak learning rate of that size."""
        return self.peak_lr * ((model.d_model / self.lr_width) ** self.lr_exponent if self.lr_width else 1.0)


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. Its identity is the science of its config; neither hardware nor paths are in it."""

    recipe: ScalingRecipe
    objective: Literal["mdm", "arm"]
    preset: str  # name of the size
    budget: float  # FLOPs
    config: Config

    @cached_property
    def id(self) -> str:
        """Unique, and readable; nothing is ever read back from it."""
        return f"{self.objective}_{self.preset}_{self.budget:.3g}_{fingerprint(self.config)}"

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def params(self) -> int:
        """The N of the recipe's laws."""
        return self.recipe.params(self.config.model)

    @property
    def params_non_embedding(self) -> int:
        return flops.parameters(self.config.model).non_embedding

    @property
    def steps(self) -> int:
        return self.config.run.steps

    @property
    def tokens(self) -> int:
        """That count: those of random lengths' cut-off ends do not."""
        return round(self.steps * self.recipe.batch_size * self.recipe.tokens_per_sequence(self.objective))

    @property
    def flops(self) -> float:
        """Of all steps, in the recipe's convention."""
        return self.steps * self.recipe.flops_per_step(self.config.model, self.objective)


def solve(
    recipe: ScalingRecipe,
    objective: Literal["mdm", "arm"],
    preset: str,
    model: ModelConfig,
    budget: float,
    seed: int = 0,
) -> Cell:
    """The cell that spends `budget` FLOPs on a size: as many whole steps as the budget pays for.

    Args:
      recipe: all other choices.
      objective: mdm, or arm for the autoregressive twin of `model`.
      preset: the name of the size.
      model: the network of an MDM of that size.
      budget: FLOPs, in the recipe's convention.
      seed: of initialisation, data order and noise.

    Raises:
      UserError: the budget is no positive number, or pays for so few steps that whole ones would miss it by more than
        1%.
    """
    if not 0 < budget < math.inf:
        raise UserError(
            f"{objective} {preset}: budget={budget} must be a positive, finite number of FLOPs, such as 1e15"
        )
    model = replace(model, dtype=recipe.dtype, max_length=max(model.max_length, recipe.sequence_length))
    steps = int(budget / recipe.flops_per_step(model, objective))
    if steps < LEAST_STEPS:
        raise UserError(
            f"{objective} {preset} at {budget:.3g} FLOPs: the budget pays for {steps} steps of "
            f"{recipe.batch_size} x {recipe.sequence_length} tokens, and a cell needs {LEAST_STEPS}; use a smaller "
            "model, smaller batches, or a larger budget"
        )
    peak = recipe.lr(model)
    config = Config(
        name=f"{preset}_{objective}",
        objective=objective,
        model=model if objective == "mdm" else arm_twin(model),
        diffusion=DiffusionConfig(random_length=recipe.random_length, mask_id=recipe.mask_id),
        optim=OptimConfig(
            peak_lr=peak,
            final_lr=peak * recipe.final_lr_ratio,
            schedule=recipe.schedule,
            warmup_steps=min(max(recipe.warmup_steps, int(recipe.warmup_fraction * steps)), steps // 4),
            weight_decay=recipe.weight_decay,
            decay_mask=recipe.decay_mask,
        ),
        data=DataConfig(sequence_length=recipe.sequence_length, batch_size=recipe.batch_size),
        run=RunConfig(
            steps=steps,
            seed=seed,
            eval_records=recipe.eval_records,
            eval_draws=recipe.eval_draws,
            log_every=max(1, steps // 400),
            checkpoint_every=steps,  # between them, it is the clock that says when
            keep=1,
        ),
    )
    return Cell(recipe, objective, preset, budget, config.validate())


@dataclass(frozen=True)
class Sweep:
    """A set of cells to run in one directory, and the data that they are trained on."""

    cells: tuple[Cell, ...]
    name: str = ""  # the one it is registered under
    others: tuple[Cell, ...] = ()  # of less use; part of it with `everything`
    overlay: tuple[str, ...] = ()  # published laws that its report shows beside its own
    source: str = ""  # text that is prepared where no dataset is given

    def __post_init__(self) -> None:
        if not self.cells:
            named = f"sweep {self.name!r}" if self.name else "a sweep"
            raise UserError(f"{named} has no cells; make some with diffusionlm.grid")
        for what, values in {
            "data.sequence_length": {cell.config.data.sequence_length for cell in self.cells},
            "model.vocab_size": {cell.config.model.vocab_size for cell in self.cells},
            "convention": {cell.recipe.convention for cell in self.cells},
        }.items():
            if len(values) > 1:
                raise UserError(
                    f"sweep {self.name!r} has cells of {what} {' and '.join(map(str, sorted(values)))}, which are not "
                    "comparable; make two sweeps of it"
                )

    @property
    def convention(self) -> str:
        """Of FLOPs and N, in all its cells."""
        return self.cells[0].recipe.convention

    def select(self, everything: bool = False) -> tuple[Cell, ...]:
        """The cells, each once, cheap ones first: laws can be looked at before the dear ones are done."""
        chosen = {cell.id: cell for cell in (*self.cells, *(self.others if everything else ()))}
        return tuple(sorted(chosen.values(), key=lambda cell: (cell.budget, cell.seed, cell.objective, cell.params)))


def check_operational(settings: Mapping[str, Any]) -> None:
    """Raises `UserError` for a dotted field that is unknown, or part of what a cell measures."""
    known = flat(Config())
    science = {*scientific_fields(Config()), "run.init_from"}  # whose weights a cell starts from is in its run.init_id
    for name, value in settings.items():
        if name not in known:
            raise UserError(f"unknown field {name!r}{suggest(name, known)}")
        if name in science:
            raise UserError(
                f"{name}={value} is part of what a cell measures, so it cannot be set here; register a sweep of your "
                "own with another recipe"
            )


def grid(
    recipe: ScalingRecipe,
    *,
    objectives: Iterable[Literal["mdm", "arm"]],
    sizes: dict[str, ModelConfig],
    budgets: Iterable[float],
    seeds: Iterable[int] = (0,),
) -> list[Cell]:
    """Every combination of them as a cell.

    Raises:
      UserError: as in `solve`; it says how many cells there are like the first.
    """
    cells, refused = [], []
    for objective, budget, name, seed in itertools.product(objectives, budgets, sizes, seeds):
        try:
            cells.append(solve(recipe, objective, name, sizes[name], budget, seed))
        except UserError as error:
            refused.append(str(error))
    if refused:
        raise UserError(refused[0] + (f" (and {len(refused) - 1} more cells like it)" if refused[1:] else ""))
    return cells
