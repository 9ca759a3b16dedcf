"""Scaling recipes, and the cells that they make: complete configurations, each for one size and one budget.

Solving a cell is arithmetic on its config, without tracing, so a thousand cells take a moment. This module imports no
JAX.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal

from diffusionlm import config_mixture, flops
from diffusionlm.config import Config, DataConfig, DiffusionConfig, ModelConfig, OptimConfig, RunConfig
from diffusionlm.config_fields import (
    AtLeastTwo,
    Fraction,
    Hint,
    Must,
    NonNegative,
    NonNegativeReal,
    Positive,
    check_fields,
)
from diffusionlm.config_io import flat
from diffusionlm.errors import UserError, suggest
from diffusionlm.fingerprint import scientific_fields
from diffusionlm.presets import arm_twin
from diffusionlm.scalars import NativeScalars, is_real, native
from diffusionlm.scaling.sweep.identity import digest
from diffusionlm.untrusted import plain_name

Objective = Literal["mdm", "arm"]

Share = Annotated[float, Must("lie in [0, 1)", lambda x: 0 <= x < 1), Hint("all steps are the objective arm")]

LEAST_STEPS = 100  # with fewer, whole steps would miss the budget by more than 1%


@dataclass(frozen=True)
class ScalingRecipe(NativeScalars):
    """The rules that turn a size and a budget into a run: the hidden part of a scaling law.

    All other fields (Adam's constants, clipping, packing, time sampling, the normalisation of the loss) have the
    defaults of `Config`, and are written out in the config.json of every cell.
    """

    name: str
    sequence_length: Positive
    batch_size: Positive  # sequences per step, in every cell
    peak_lr: NonNegativeReal  # at `lr_width`
    # "6nd": C = 6 N D with N non-embedding parameters (SMDM, LLaDA). "model": C is three times the matmuls of the
    # forward pass, attention and head included, and N counts the parameters that are multiplied, the head's included.
    convention: Literal["6nd", "model"] = "6nd"
    lr_width: NonNegative = 0  # the width that peak_lr is tuned for; 0: the learning rate does not depend on the width
    lr_exponent: float = 0.0  # the peak is peak_lr * (d_model / lr_width) ** lr_exponent
    final_lr_ratio: Fraction = 0.1  # final over peak learning rate (cosine)
    schedule: Literal["cosine", "constant"] = "cosine"
    # Linear warm-up lasts the larger of this many steps and this fraction of all steps, but at most a quarter of them,
    # or of the shorter part of those of `arm_share`.
    warmup_steps: NonNegative = 100
    warmup_fraction: Fraction = 0.01
    weight_decay: NonNegativeReal = 0.1
    decay_mask: Literal["matrices", "all"] = "matrices"
    random_length: Fraction = 0.0  # fraction of an MDM's examples that are cut to a uniform random length
    mask_id: int | None = None  # None: a row that is appended to the embedding
    # Share of an MDM's steps that are autoregressive. They come first; then it goes on as a shifted MDM. Each part has
    # the schedule and the warm-up by itself, and both end at the same learning rate.
    arm_share: Share = 0.0
    arm_peak_lr: NonNegativeReal = 0.0  # of these steps, at `lr_width` too; 0: peak_lr
    anneal_steps: NonNegative = 0  # steps after these over which attention opens up; 0: it is full at once
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    mixture: str = ""  # of prepared datasets in the folder of data.path, such as "web=0.7,code=0.3"; empty: one dataset
    eval_records: Positive = 2048  # held-out sequences, the same for all cells
    eval_draws: AtLeastTwo = 8  # noise draws per sequence, the same for all MDM cells

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, f"recipe {self.name!r}: ")
        if self.lr_exponent and not self.lr_width:
            raise UserError(
                f"recipe {self.name!r}: lr_exponent={self.lr_exponent} needs lr_width, the width that peak_lr is for"
            )
        if self.mixture and len(config_mixture.parse(self.mixture).phases) > 1:
            raise UserError(
                f"recipe {self.name!r}: mixture={self.mixture!r} changes at a batch, and cells have different numbers "
                "of them; give one list of shares"
            )
        for name in ("arm_peak_lr", "anneal_steps"):
            if getattr(self, name) and not self.arm_share:
                raise UserError(
                    f"recipe {self.name!r}: {name}={getattr(self, name)} needs arm_share, the share of the steps that "
                    "are autoregressive"
                )

    def params(self, model: ModelConfig) -> int:
        """Return the size N of a model, as the laws of this recipe count it."""
        counts = flops.parameters(model)
        if self.convention == "6nd":
            return counts.non_embedding
        return counts.non_embedding + model.vocab_size * model.d_model

    def tokens_per_sequence(self, objective: str) -> float:
        """Return the mean number of tokens of a sequence that count: those cut off do not (SMDM, Section 5)."""
        L, cut = self.sequence_length, self.random_length * (1 - self.arm_share) if objective == "mdm" else 0.0
        return L * (1 - cut) + (L + 1) / 2 * cut

    def flops_per_step(self, model: ModelConfig, objective: str) -> float:
        """Return the FLOPs of one optimizer step in the recipe's convention, the same for an MDM and its ARM twin."""
        share = self.tokens_per_sequence(objective) / self.sequence_length
        twin = arm_twin(model)  # the row of [MASK] alone could add another 128 padded rows to the head
        return self.batch_size * share * flops.train(twin, self.sequence_length, self.convention)

    def lr(self, model: ModelConfig) -> float:
        """Return the peak learning rate of a model."""
        return self.peak_lr * self._lr_factor(model)

    def arm_lr(self, model: ModelConfig) -> float:
        """Return the peak learning rate of a model's autoregressive steps; 0 without `arm_peak_lr`."""
        return self.arm_peak_lr * self._lr_factor(model)

    def _lr_factor(self, model: ModelConfig) -> float:
        return (model.d_model / self.lr_width) ** self.lr_exponent if self.lr_width else 1.0


@dataclass(frozen=True)
class Cell:
    """One run of a sweep, identified by the scientific fields of its config: neither hardware nor paths are in it."""

    recipe: ScalingRecipe
    objective: Objective
    preset: str  # name of the size
    budget: float  # FLOPs
    config: Config

    @cached_property
    def id(self) -> str:
        """A unique, readable name, which no code parses."""
        return f"{self.road}_{self.preset}_{self.budget:.3g}_{digest(self.config)}"

    @property
    def arm_share(self) -> float:
        """The share of the steps that are autoregressive at first, of a cell that ends as an MDM."""
        return self.recipe.arm_share if self.objective == "mdm" else 0.0

    @property
    def road(self) -> str:
        """Return the name of its training: mdm, arm, or arm50 where half of the steps of an MDM are autoregressive."""
        return f"arm{100 * self.arm_share:g}" if self.arm_share else self.objective

    @property
    def seed(self) -> int:
        """The seed of initialisation, data order and noise."""
        return self.config.run.seed

    @property
    def params(self) -> int:
        """The size N, as the laws of the recipe count it."""
        return self.recipe.params(self.config.model)

    @property
    def params_non_embedding(self) -> int:
        """The number of parameters outside the embedding and the head."""
        return flops.parameters(self.config.model).non_embedding

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return self.config.run.steps

    @property
    def tokens(self) -> int:
        """The number of training tokens that count, without those that random lengths cut off."""
        return round(self.steps * self.recipe.batch_size * self.recipe.tokens_per_sequence(self.objective))

    @property
    def flops(self) -> float:
        """The FLOPs of all steps, in the recipe's convention."""
        return self.steps * self.recipe.flops_per_step(self.config.model, self.objective)


def solve(
    recipe: ScalingRecipe,
    objective: Objective,
    preset: str,
    model: ModelConfig,
    budget: float,
    seed: int = 0,
) -> Cell:
    """Return the cell that trains one size for as many whole steps as a budget pays for.

    Args:
      recipe: every other choice.
      objective: mdm, or arm for the autoregressive twin of `model`.
      preset: the name of the size.
      model: the network of an MDM of this size.
      budget: FLOPs, in the recipe's convention.
      seed: the seed of initialisation, data order and noise.

    Raises:
      UserError: the budget is not a positive, finite number, or pays for fewer than `LEAST_STEPS` steps.
    """
    budget, seed = native(budget), native(seed)
    if not is_real(budget) or not 0 < budget < math.inf:
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
    arm_steps = _arm_steps(recipe, objective, f"{objective} {preset} at {budget:.3g} FLOPs", steps)
    config = Config(
        name=f"{preset}_{objective}",
        objective=objective,
        model=model if objective == "mdm" else arm_twin(model),
        diffusion=DiffusionConfig(
            random_length=recipe.random_length,
            mask_id=recipe.mask_id,
            alignment="shifted" if arm_steps else "same",
            arm_steps=arm_steps,
            anneal_steps=recipe.anneal_steps,
        ),
        optim=_optim(recipe, model, steps, arm_steps),
        data=DataConfig(sequence_length=recipe.sequence_length, batch_size=recipe.batch_size, mixture=recipe.mixture),
        run=RunConfig(
            steps=steps,
            seed=seed,
            eval_records=recipe.eval_records,
            eval_draws=recipe.eval_draws,
            log_every=max(1, steps // 400),
            checkpoint_every=steps,  # before the last step, checkpoint_minutes decides
            keep=1,
        ),
    )
    return Cell(recipe, objective, preset, budget, config.validate())


def _arm_steps(recipe: ScalingRecipe, objective: Objective, cell: str, steps: int) -> int:
    """Return the number of autoregressive steps at the beginning of a cell; messages begin with `cell`."""
    if not recipe.arm_share:
        return 0
    if objective == "arm":
        raise UserError(
            f"{cell}: arm_share={recipe.arm_share} of recipe {recipe.name!r} is for the objective mdm; the objective "
            "arm trains nothing else"
        )
    arm_steps = round(recipe.arm_share * steps)
    if not 0 < arm_steps < steps:
        raise UserError(
            f"{cell}: arm_share={recipe.arm_share} of {steps} steps is {arm_steps}, which leaves no step for one of "
            "the two parts; choose a share further from 0 or 1"
        )
    return arm_steps


def _optim(recipe: ScalingRecipe, model: ModelConfig, steps: int, arm_steps: int) -> OptimConfig:
    peak, shorter = recipe.lr(model), min(arm_steps or steps, steps - arm_steps)
    return OptimConfig(
        peak_lr=peak,
        final_lr=peak * recipe.final_lr_ratio,
        schedule=recipe.schedule,
        warmup_steps=min(max(recipe.warmup_steps, int(recipe.warmup_fraction * steps)), shorter // 4),
        weight_decay=recipe.weight_decay,
        decay_mask=recipe.decay_mask,
        arm_peak_lr=recipe.arm_lr(model),
    )


@dataclass(frozen=True)
class Sweep:
    """A set of cells that run in one directory, and the data that they are trained on."""

    cells: tuple[Cell, ...]
    name: str = ""  # the name that it is registered under
    others: tuple[Cell, ...] = ()  # cells of less use, which are included with `everything`
    overlay: tuple[str, ...] = ()  # published laws that the report shows beside its own
    source: str = ""  # the text to prepare where no dataset is given

    def __post_init__(self) -> None:
        if not self.cells:
            subject = f"sweep {self.name!r}" if self.name else "a sweep"
            raise UserError(f"{subject} has no cells; make some with diffusionlm.grid")
        for cell in (*self.cells, *self.others):  # a cell's id is the name of its directory and of its lease
            plain_name(cell.id, f"sweep {self.name!r}")
        for name, values in {
            "data.sequence_length": {cell.config.data.sequence_length for cell in self.cells},
            "model.vocab_size": {cell.config.model.vocab_size for cell in self.cells},
            "convention": {cell.recipe.convention for cell in self.cells},
        }.items():
            if len(values) > 1:
                raise UserError(
                    f"sweep {self.name!r} has cells of {name} {' and '.join(map(str, sorted(values)))}, which are not "
                    "comparable; make two sweeps of them"
                )

    @property
    def convention(self) -> str:
        """The convention by which all cells count FLOPs and N."""
        return self.cells[0].recipe.convention

    def select(self, everything: bool = False) -> tuple[Cell, ...]:
        """Return each cell once, the cheapest first, so that laws take shape before the expensive cells are done.

        Args:
          everything: include `others`.
        """
        cells = {cell.id: cell for cell in (*self.cells, *(self.others if everything else ()))}
        return tuple(sorted(cells.values(), key=lambda cell: (cell.budget, cell.seed, cell.road, cell.params)))


def check_operational(settings: Mapping[str, Any]) -> None:
    """Refuse settings that would change what a cell measures.

    Args:
      settings: values by dotted field.

    Raises:
      UserError: a field is unknown, or part of a cell's identity.
    """
    known = flat(Config())
    science = {
        *scientific_fields(Config()),
        "run.init_from",
        "run.continue_from",
    }  # what a run starts from is science too
    for name, value in settings.items():
        if name not in known:
            raise UserError(f"unknown field {name!r}{suggest(name, known)}")
        if name in science:
            raise UserError(
                f"{name}={value} is part of what a cell measures, so it cannot be set here; register your own sweep "
                "with another recipe"
            )


def grid(
    recipe: ScalingRecipe,
    *,
    objectives: Iterable[Objective],
    sizes: Mapping[str, ModelConfig],
    budgets: Iterable[float],
    seeds: Iterable[int] = (0,),
) -> list[Cell]:
    """Return a cell for every combination of objective, budget, size and seed.

    Args:
      recipe: every other choice.
      objectives: mdm, arm or both.
      sizes: networks by the name of their size.
      budgets: FLOPs, in the recipe's convention.
      seeds: seeds of initialisation, data order and noise.

    Raises:
      UserError: `solve` refuses a cell; the message counts how many more it refuses.
    """
    cells, refusals = [], []
    for objective, budget, name, seed in itertools.product(objectives, budgets, sizes, seeds):
        try:
            cells.append(solve(recipe, objective, name, sizes[name], budget, seed))
        except UserError as error:
            refusals.append(str(error))
    if refusals:
        raise UserError(refusals[0] + (f" (and {len(refusals) - 1} more cells like it)" if refusals[1:] else ""))
    return cells
