"""Sweeps of the road from an autoregressive to a diffusion model: which share of the compute to spend on each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from diffusionlm.config import ModelConfig
from diffusionlm.registry import sweeps
from diffusionlm.scaling.sweep.recipe import Cell, ScalingRecipe, Sweep, grid

from . import isoflop_small

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)  # evenly spaced in the logarithm of share / (1 - share)


def _recipe(arm: ScalingRecipe, share: float) -> ScalingRecipe:
    """Return a recipe whose first part is that of an autoregressive sweep; batches cannot change on the way.

    3e-3 at width 128 is the best rate of `adapt_tinystories`, at the same batch; it is not tuned for each share.
    """
    name = f"{arm.name.removesuffix('_arm')}_road{100 * share:g}"
    return replace(arm, name=name, arm_share=share, arm_peak_lr=arm.peak_lr, peak_lr=5e-3)


def _cells(
    arm: ScalingRecipe,
    ladder: Mapping[str, ModelConfig],
    sizes: Mapping[float, Mapping[float, Sequence[str]]],
    seeds: Sequence[int] = (0,),
) -> list[Cell]:
    """Return the cells of some sizes, given by budget and share."""
    return [
        cell
        for budget, by_share in sizes.items()
        for share, names in by_share.items()
        for cell in grid(
            _recipe(arm, share),
            objectives=("mdm",),
            sizes={name: ladder[name] for name in names},
            budgets=(budget,),
            seeds=seeds,
        )
    ]


# Between the best sizes of MDMs and ARMs at each budget, which differ by a factor of 5; larger ones for larger shares.
# Large shares lost at 5e12 FLOPs, by 0.2 to 0.3 nats per token, so the other budgets leave them out.
CPU_SIZES = {
    1.6e12: dict.fromkeys(SHARES[:3], ("cpu_43k", "cpu_65k", "cpu_123k")),
    5e12: {
        0.1: ("cpu_65k", "cpu_123k", "cpu_197k"),
        **dict.fromkeys(SHARES[1:], ("cpu_65k", "cpu_123k", "cpu_197k", "cpu_389k")),
    },
    1.6e13: {
        0.1: ("cpu_65k", "cpu_197k", "cpu_389k"),
        0.25: ("cpu_65k", "cpu_197k", "cpu_389k"),
        0.5: ("cpu_123k", "cpu_262k", "cpu_688k"),
        0.75: ("cpu_123k", "cpu_262k", "cpu_688k"),
    },
    5e13: {
        0.02: ("cpu_389k", "cpu_688k"),
        0.05: ("cpu_389k", "cpu_688k"),
        0.1: ("cpu_197k", "cpu_389k", "cpu_688k"),
        0.25: ("cpu_197k", "cpu_389k", "cpu_688k", "cpu_1180k"),
        0.5: ("cpu_389k", "cpu_688k"),
    },
}
CPU_REPEATED = {5e12: {0.5: ("cpu_123k",), 0.75: ("cpu_197k",)}, 1.6e13: {0.25: ("cpu_197k",)}}  # with three seeds


@sweeps.register("road_cpu")
def road_cpu() -> Sweep:
    """ARM first, then MDM, at 1.6e12 to 5e13 FLOPs on two processor cores; give `isoflop_cpu`'s text with --data.path.

    With --all it has the cells of `isoflop_cpu` too. Give the report their results with --reuse.
    """
    arm, ladder = isoflop_small.CPU_RECIPES["arm"], isoflop_small.CPU_LADDER
    cells = _cells(arm, ladder, CPU_SIZES) + _cells(arm, ladder, CPU_REPEATED, seeds=(1, 2))
    return Sweep(tuple(cells), others=isoflop_small.isoflop_cpu().cells)


GPU_SHARES = (0.1, 0.25, 0.5)
GPU_SIZES = {
    1e15: dict.fromkeys(GPU_SHARES, ("gpu_4m", "gpu_6m", "gpu_13m")),
    3e15: dict.fromkeys(GPU_SHARES, ("gpu_4m", "gpu_6m", "gpu_13m", "gpu_19m")),
    1e16: dict.fromkeys(GPU_SHARES, ("gpu_6m", "gpu_13m", "gpu_19m", "gpu_34m")),
    3e16: dict.fromkeys(GPU_SHARES, ("gpu_13m", "gpu_19m", "gpu_34m", "gpu_66m")),
}
GPU_REPEATED = {1e15: {0.25: ("gpu_6m",), 0.5: ("gpu_6m",)}, 3e15: {0.25: ("gpu_13m",)}}


@sweeps.register("road_h200")
def road_h200() -> Sweep:
    """ARM first, then MDM, at 1e15 to 3e16 FLOPs on one GPU; with --all it has the cells of `isoflop_h200` too."""
    arm, ladder = isoflop_small.GPU_RECIPES["arm"], isoflop_small.GPU_LADDER
    cells = _cells(arm, ladder, GPU_SIZES) + _cells(arm, ladder, GPU_REPEATED, seeds=(1, 2))
    return Sweep(tuple(cells), others=isoflop_small.isoflop_h200().cells)
