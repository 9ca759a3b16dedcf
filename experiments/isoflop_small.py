"""IsoFLOP sweeps for what one has at hand: a processor, or one GPU for an hour."""

from dataclasses import replace

from diffusionlm.config import ModelConfig
from diffusionlm.registry import sweeps
from diffusionlm.scaling.recipe import ScalingRecipe, Sweep, grid

BOTH = ("mdm", "arm")


def _size(d_model: int, n_layers: int, head_dim: int, vocab_size: int = 1023, length: int = 128) -> ModelConfig:
    """SMDM's proportions. 1023 pieces and the mask row fill 1024 rows exactly."""
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


# By the parameters that are multiplied, the head's included: at these sizes it is a half to a twentieth of them.
CPU_LADDER = {
    "cpu_65k": _size(32, 2, 16),
    "cpu_123k": _size(48, 2, 16),
    "cpu_262k": _size(64, 3, 16),
    "cpu_389k": _size(80, 3, 16),
    "cpu_688k": _size(96, 4, 32),
    "cpu_1180k": _size(128, 4, 32),
    "cpu_2212k": _size(160, 5, 32),
    "cpu_3735k": _size(192, 6, 32),
}
CPU = ScalingRecipe(
    name="cpu",
    sequence_length=128,
    batch_size=16,
    peak_lr=4e-3,
    convention="model",  # 6ND would leave out what costs most here
    warmup_steps=50,
    warmup_fraction=0.02,
    dtype="float32",
    eval_records=2048,
    eval_draws=4,
)


@sweeps.register("isoflop_cpu_tuning")
def isoflop_cpu_tuning() -> Sweep:
    """Learning rates and batch sizes for `isoflop_cpu`, at one budget and two sizes."""
    sizes = {name: CPU_LADDER[name] for name in ("cpu_123k", "cpu_389k")}
    cells = []
    for batch_size, rates in ((16, (2e-3, 4e-3, 8e-3, 1.6e-2)), (8, (4e-3, 8e-3))):
        for rate in rates:
            recipe = replace(CPU, name=f"lr {rate:g}, batch {batch_size}", batch_size=batch_size, peak_lr=rate)
            cells += grid(recipe, objectives=BOTH, sizes=sizes, budgets=(3e12,))
    return Sweep(tuple(cells))
