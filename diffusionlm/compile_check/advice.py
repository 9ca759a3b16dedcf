"""Suggest settings that would make a run fit in memory, ranked by a ledger of large tensors.

The ledger counts the tensors that are large on every backend and nothing that a compiler keeps besides. So it is only
used as a ratio: the compiler's number for the run at hand is scaled by the ledger's ratio of the two runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from diffusionlm import flops
from diffusionlm.config import Config
from diffusionlm.diffusion.cross_entropy import head_chunk
from diffusionlm.diffusion.objectives import predicted_share
from diffusionlm.hardware import Topology, larger
from diffusionlm.model.attention_kernels import SPLASH_LENGTHS

MOST = 4  # fixes in a report
_REMAT_SAVING_MORE = {"none": ("dots", "attention", "full"), "dots": ("full",), "attention": ("full",), "full": ()}


@dataclass(frozen=True)
class Fix:
    """A change, and the bytes of HBM that a chip would need with it."""

    change: str
    bytes: int


def fixes(cfg: Config, topology: Topology, needed: float) -> list[Fix]:
    """Return changes of a training run that bring `needed` bytes per chip below the limit, the cheapest in time first.

    Of several changes of the same settings, only the first that suffices is returned.
    """
    limit, current = topology.chip.hbm_bytes, ledger(cfg, topology.devices)
    result: dict[tuple[str, ...], Fix] = {}
    for change, other, where in _candidates(cfg, topology):
        predicted = int(needed * ledger(other, where.devices) / current)
        if predicted <= limit:
            settings = tuple(word for word in change.split() if word.startswith("--"))
            result.setdefault(settings, Fix(change, predicted))
    return list(result.values())[:MOST]


def ledger(cfg: Config, devices: int) -> float:
    """Return the bytes on each device at the worst moment of a training step: state, gradients and activations."""
    model, (data, fsdp, tensor) = cfg.model, cfg.mesh.sizes(devices)
    length = cfg.data.sequence_length
    width = 2 if model.dtype == "bfloat16" else 4  # bytes of an activation
    weights = flops.parameters(model).stored
    D, V, q, kv = model.d_model, model.padded_vocab_size, model.n_heads * model.head_dim, model.n_kv_heads
    shards = fsdp * tensor
    state = (4 + 4 + (2 if cfg.optim.first_moment_dtype == "bfloat16" else 4)) * weights / shards
    gradients = 4 * weights / shards * (2 if cfg.run.microbatches > 1 else 1)
    rows = max(1, cfg.data.batch_size // (data * fsdp * cfg.run.microbatches))
    tokens = rows * length
    stream = tokens * D * width
    matmuls = tokens * width * (q + 2 * kv * model.head_dim + 3 * model.d_ff) / tensor + stream
    kernel = length % SPLASH_LENGTHS == 0  # keeps no scores in memory
    attention = 0 if kernel else tokens * length * model.n_heads / tensor * (4 + width)
    block = (weights - V * D * (1 if model.tied_head else 2)) / model.n_layers / tensor
    kept = {
        "full": stream,
        "attention": stream + tokens * width * q / tensor,
        "dots": 2 * stream + matmuls,
        "none": 4 * stream + 2 * matmuls + attention,
    }[model.remat]
    # The block at work: its gathered weights and their gradients, what it recomputes, and the gradients of that.
    working = 2 * block * width + 2 * matmuls + attention
    projected = head_chunk(rows, length, model.head_chunk, predicted_share(cfg))
    vocabulary = 2 * 4 * projected * V / tensor + V * D / tensor * (4 + width)
    return state + gradients + model.n_layers * kept + working + vocabulary


def _candidates(cfg: Config, topology: Topology) -> Iterator[tuple[str, Config, Topology]]:
    """Yield changes with the run and the topology that they make; those that cost time but no chips come first."""
    data, fsdp, tensor = cfg.mesh.sizes(topology.devices)
    rows = cfg.data.batch_size // (data * fsdp)
    parts = [n for n in range(cfg.run.microbatches + 1, rows + 1) if rows % n == 0]

    def with_microbatches(config: Config, n: int) -> Config:
        return replace(config, run=replace(config.run, microbatches=n))

    for n in parts:
        yield f"--run.microbatches {n}", with_microbatches(cfg, n), topology
    if data > topology.slices:
        sharded = replace(cfg, mesh=replace(cfg.mesh, data=topology.slices, fsdp=-1))
        yield f"--mesh.data {topology.slices} --mesh.fsdp -1", sharded, topology
    for remat in _REMAT_SAVING_MORE[cfg.model.remat]:
        other = replace(cfg, model=replace(cfg.model, remat=remat))
        yield f"--model.remat {remat}", other, topology
        for n in parts[-1:]:
            yield f"--model.remat {remat} --run.microbatches {n}", with_microbatches(other, n), topology
    for ways in (2, 4, 8):
        if ways > tensor and cfg.model.n_kv_heads % ways == 0 and topology.devices % (data * ways) == 0:
            sharded = replace(cfg, mesh=replace(cfg.mesh, fsdp=-1, tensor=ways))
            yield f"--mesh.fsdp -1 --mesh.tensor {ways}", sharded, topology
    more = larger(topology)
    while more and cfg.data.batch_size % (more.devices * cfg.run.microbatches // tensor) == 0:
        yield f"--topology {more.name}", cfg, more
        more = larger(more)
