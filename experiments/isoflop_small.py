"""IsoFLOP sweeps for small machines: a processor, or one GPU for an hour."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from diffusionlm.config import ModelConfig
from diffusionlm.registry import sweeps
from diffusionlm.scaling.sweep.recipe import Cell, ScalingRecipe, Sweep, grid

Objective = Literal["mdm", "arm"]


def _size(d_model: int, n_layers: int, head_dim: int, vocab_size: int = 1023, length: int = 128) -> ModelConfig:
    """Return a network of SMDM's proportions. 1023 pieces and the mask row fill 1024 rows exactly."""
    return ModelConfig(
        d_model=d_model,
        n_layers=n_layers,
        n_heads=d_model // head_dim,
        n_kv_heads=d_model // head_dim,
        head_dim=head_dim,
        d_ff=4 * d_model,
        vocab_size=vocab_size,
        max_length=length,
        head_chunk=256,  # what a processor's caches hold
    )


# Named by the parameters that are multiplied, including the head: at these sizes two thirds to a twelfth of them.
CPU_LADDER = {
    "cpu_10k": _size(8, 2, 8),
    "cpu_17k": _size(12, 2, 12),
    "cpu_25k": _size(16, 2, 8),
    "cpu_43k": _size(24, 2, 8),
    "cpu_65k": _size(32, 2, 16),
    "cpu_123k": _size(48, 2, 16),
    "cpu_197k": _size(64, 2, 16),
    "cpu_262k": _size(64, 3, 16),
    "cpu_389k": _size(80, 3, 16),
    "cpu_688k": _size(96, 4, 32),
    "cpu_1180k": _size(128, 4, 32),
    "cpu_2212k": _size(160, 5, 32),
}
CPU = ScalingRecipe(
    name="cpu_arm",
    sequence_length=128,
    batch_size=8,
    peak_lr=8e-3,
    lr_width=64,
    lr_exponent=-0.75,
    convention="model",  # 6ND would leave out what costs most here
    warmup_steps=50,
    warmup_fraction=0.02,
    dtype="float32",
    eval_records=2048,
    eval_draws=4,
)
CPU_RECIPES: dict[Objective, ScalingRecipe] = {
    "arm": CPU,
    "mdm": replace(CPU, name="cpu_mdm", batch_size=16, peak_lr=3.2e-3),
}
# Sizes around the optimum. None of the 40 million tokens of books, textbooks and stories is seen twice, except by the
# smallest MDMs of the three largest budgets, which repeat the text up to 4 times; the report says which.
CPU_SIZES = {
    "arm": {
        1.6e12: ("cpu_25k", "cpu_43k", "cpu_65k", "cpu_123k", "cpu_197k", "cpu_389k"),
        5e12: ("cpu_43k", "cpu_65k", "cpu_123k", "cpu_197k", "cpu_389k", "cpu_688k"),
        1.6e13: ("cpu_65k", "cpu_123k", "cpu_197k", "cpu_389k", "cpu_688k", "cpu_1180k"),
        5e13: ("cpu_197k", "cpu_389k", "cpu_688k", "cpu_1180k", "cpu_2212k"),
    },
    "mdm": {
        1.6e12: ("cpu_25k", "cpu_43k", "cpu_65k", "cpu_123k", "cpu_197k"),
        5e12: ("cpu_10k", "cpu_17k", "cpu_25k", "cpu_43k", "cpu_65k", "cpu_123k", "cpu_197k", "cpu_389k"),
        1.6e13: ("cpu_25k", "cpu_43k", "cpu_65k", "cpu_123k", "cpu_197k", "cpu_389k"),
        5e13: ("cpu_43k", "cpu_65k", "cpu_123k", "cpu_197k", "cpu_262k", "cpu_389k", "cpu_688k"),
    },
}
CPU_REPEATED = {  # with three seeds
    "arm": {1.6e12: ("cpu_65k", "cpu_197k"), 5e12: ("cpu_123k", "cpu_389k")},
    "mdm": {
        1.6e12: ("cpu_43k", "cpu_65k", "cpu_123k"),
        5e12: ("cpu_65k", "cpu_197k"),
        1.6e13: ("cpu_65k", "cpu_123k"),
    },
}


@sweeps.register("isoflop_cpu")
def isoflop_cpu() -> Sweep:
    """Both objectives at 1.6e12 to 5e13 FLOPs, on two processor cores; give the prepared text with --data.path."""
    cells = []
    for objective, recipe in CPU_RECIPES.items():
        for chosen, seeds in ((CPU_SIZES, (0,)), (CPU_REPEATED, (1, 2))):
            for budget, names in chosen[objective].items():
                cells += _at(recipe, CPU_LADDER, budget, names, (objective,), seeds)
    return Sweep(tuple(cells), overlay=("smdm_mdm", "smdm_arm"))


@sweeps.register("isoflop_cpu_tuning")
def isoflop_cpu_tuning() -> Sweep:
    """Learning rates and batch sizes for `isoflop_cpu`, at one budget and two sizes."""
    sizes, cells = ("cpu_123k", "cpu_389k"), []
    for batch_size, rates in ((16, (2e-3, 4e-3, 8e-3, 1.6e-2)), (8, (4e-3, 8e-3))):
        for rate in rates:
            name = f"lr {rate:g}, batch {batch_size}"
            recipe = replace(CPU, name=name, batch_size=batch_size, peak_lr=rate, lr_width=0, lr_exponent=0.0)
            cells += _at(recipe, CPU_LADDER, 3e12, sizes)
    return Sweep(tuple(cells))


# Millions of non-embedding parameters; 4095 pieces and the mask row fill 4096 rows exactly.
GPU_LADDER = {
    f"gpu_{millions}m": replace(_size(d_model, n_layers, 64, vocab_size=4095, length=256), head_chunk=8192)
    for millions, d_model, n_layers in (
        (1, 128, 4),
        (4, 192, 6),
        (6, 256, 6),
        (13, 320, 8),
        (19, 384, 8),
        (34, 512, 8),
        (66, 640, 10),
        (113, 768, 12),
    )
}
# The learning rates extrapolate those of `isoflop_cpu` to larger widths; they are not tuned for a GPU's batches.
GPU_RECIPES: dict[Objective, ScalingRecipe] = {
    objective: replace(
        recipe, name=f"gpu_{objective}", sequence_length=256, batch_size=64, dtype="bfloat16", eval_draws=8
    )
    for objective, recipe in CPU_RECIPES.items()
}
GPU_SIZES = {
    1e15: ("gpu_1m", "gpu_4m", "gpu_6m", "gpu_13m", "gpu_19m"),
    3e15: ("gpu_1m", "gpu_4m", "gpu_6m", "gpu_13m", "gpu_19m", "gpu_34m"),
    1e16: ("gpu_4m", "gpu_6m", "gpu_13m", "gpu_19m", "gpu_34m", "gpu_66m"),
    3e16: ("gpu_6m", "gpu_13m", "gpu_19m", "gpu_34m", "gpu_66m", "gpu_113m"),
}


@sweeps.register("isoflop_h200")
def isoflop_h200() -> Sweep:
    """Both objectives at 1e15 to 3e16 FLOPs, on one GPU: 22 minutes of an H200 at 40% MFU.

    With 616 million tokens no text is seen twice; with 340 million, only gpu_6m at 3e16 FLOPs repeats it. The report
    says where text was repeated.
    """
    cells = []
    for objective, recipe in GPU_RECIPES.items():
        for budget, names in GPU_SIZES.items():
            cells += _at(recipe, GPU_LADDER, budget, names, (objective,))
        cells += _at(recipe, GPU_LADDER, 1e15, ("gpu_4m", "gpu_6m"), (objective,), seeds=(1, 2))
    return Sweep(tuple(cells), overlay=("smdm_mdm", "smdm_arm"))


def _at(
    recipe: ScalingRecipe,
    ladder: Mapping[str, ModelConfig],
    budget: float,
    names: Sequence[str],
    objectives: Sequence[Objective] = ("mdm", "arm"),
    seeds: Sequence[int] = (0,),
) -> list[Cell]:
    """Return the cells of some sizes at one budget."""
    sizes = {name: ladder[name] for name in names}
    return grid(recipe, objectives=objectives, sizes=sizes, budgets=(budget,), seeds=seeds)
