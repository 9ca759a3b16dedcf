"""IsoFLOP sweeps as the papers ran them: many sizes at each of several budgets, for MDMs and autoregressive twins."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

from diffusionlm import flops, presets
from diffusionlm.config import ModelConfig
from diffusionlm.registry import sweeps
from diffusionlm.scaling.laws import published as laws
from diffusionlm.scaling.sweep.recipe import Cell, ScalingRecipe, Sweep, grid

BOTH: tuple[Literal["mdm", "arm"], ...] = ("mdm", "arm")
SMDM_LAWS = {"mdm": "smdm_mdm", "arm": "smdm_arm"}
SMDM_BUDGETS = (6e18, 1e19, 3e19, 6e19, 1e20)
LLADA_BUDGETS = (1e20, 3e20, 1e21, 3e21, 1e22, 3e22, 1e23)

SMDM = ScalingRecipe(
    name="smdm",
    sequence_length=2048,
    batch_size=256,
    peak_lr=4e-4,  # the paper's, at every size; its released code has half of it
    warmup_steps=100,
    warmup_fraction=0.01,
    decay_mask="all",
    eval_records=12_800,
)
LLADA = ScalingRecipe(
    name="llada",
    sequence_length=4096,
    batch_size=1280,
    peak_lr=4e-4,
    schedule="constant",
    warmup_steps=2000,
    random_length=0.01,
    mask_id=126336,
    eval_records=10_240,
)


def _cells(
    recipe: ScalingRecipe, sizes: Mapping[str, ModelConfig], budgets: Iterable[float], *, near: bool = True
) -> tuple[Cell, ...]:
    """Return the cells within a factor of 4 of SMDM's optimal size for their budget and objective, or all others."""
    cells: list[Cell] = []
    for objective in BOTH:
        for budget in budgets:
            optimum = laws.get(SMDM_LAWS[objective]).params(budget)
            assert optimum is not None  # both laws were published
            chosen = {
                name: model for name, model in sizes.items() if (1 / 4 <= recipe.params(model) / optimum <= 4) == near
            }
            cells += grid(recipe, objectives=(objective,), sizes=chosen, budgets=(budget,))
    return tuple(cells)


def _smdm(recipe: ScalingRecipe) -> Sweep:
    # As in `smdm.pretraining`: without recomputation, activations of the larger sizes fill a slice.
    names = [name for name in presets.names() if name.startswith("smdm_")]
    sizes = {name: replace(presets.get(name), remat="attention") for name in names}
    near, far = (_cells(recipe, sizes, SMDM_BUDGETS, near=near) for near in (True, False))
    return Sweep(near, others=far, overlay=tuple(SMDM_LAWS.values()))


@sweeps.register("smdm_isoflop")
def smdm_isoflop() -> Sweep:
    """SMDM's law (2410.18514, Section 3): its 30 sizes, 6e18 to 1e20 FLOPs, both objectives, the paper's 4e-4."""
    return _smdm(SMDM)


@sweeps.register("smdm_isoflop_code")
def smdm_isoflop_code() -> Sweep:
    """Run `smdm_isoflop` with the learning rate of SMDM's released code, 2e-4."""
    return _smdm(replace(SMDM, name="smdm_code", peak_lr=2e-4))


def _llada_size(d_model: int) -> ModelConfig:
    """Return a trunk with the proportions of LLaDA 8B; at width 4096 it is LLaDA 8B."""
    base = presets.get("llada_8b")
    heads = d_model // base.head_dim
    return replace(
        base, d_model=d_model, n_layers=heads, n_heads=heads, n_kv_heads=heads, d_ff=3 * d_model, remat="full"
    )


@sweeps.register("llada_isoflop")
def llada_isoflop() -> Sweep:
    """LLaDA's recipe (2502.09992, Section 3.2) at 1e20 to 1e23 FLOPs, on trunks with the proportions of its 8B."""
    widths = (768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 10240, 12288)
    sizes = {f"llada_{_millions(size)}m": size for size in map(_llada_size, widths)}
    return Sweep(_cells(LLADA, sizes, LLADA_BUDGETS), overlay=tuple(SMDM_LAWS.values()))


def _millions(model: ModelConfig) -> int:
    return round(flops.parameters(model).non_embedding / 1e6)
