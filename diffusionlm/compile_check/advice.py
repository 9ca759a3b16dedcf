"""What would make a run fit that does not: settings whose memory, by a ledger, is below the limit.

The ledger knows the tensors that are large on every backend and nothing of what a compiler keeps besides, so it is only
used for ratios: what the compiler says of the run at hand, times the ledger's ratio.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from diffusionlm import flops
from diffusionlm.config import Config
from diffusionlm.diffusion.objectives import predicted_share
from diffusionlm.hardware import Topology, larger

MOST = 4  # pieces of advice


@dataclass(frozen=True)
class Fix:
    """A change, and the HBM that a chip would need with it."""

    change: str
    bytes: int


def fixes(cfg: Config, topology: Topology, needed: float) -> list[Fix]:
    """Changes of a training run that bring `needed` bytes per chip below the limit, the cheapest in time first.

    Of changes of the same settings only the first that will do.
    """
    limit, now = topology.chip.hbm_bytes, ledger(cfg, topology.devices)
    found: dict[tuple[str, ...], Fix] = {}
    for change, other, where in _candidates(cfg, topology):
        predicted = int(needed * ledger(other, where.devices) / now)
        if predicted <= limit:
            names = tuple(word for word in change.split() if word.startswith("--"))
            found.setdefault(names, Fix(change, predicted))
    return list(found.values())[:MOST]


def ledger(cfg: Config, devices: int) -> float:
    """Bytes on each device at the worst moment of a training step: the state, gradients and activations."""
    model, (data, fsdp, tensor) = cfg.model, cfg.mesh.sizes(devices)
    width = 2 if model.dtype == "bfloat16" else 4
    weights = flops.parameters(model).stored
    D, V, q, kv = model.d_model, model.padded_vocab_size, model.n_heads * model.head_dim, model.n_kv_heads
    shards = fsdp * tensor
    state = (4 + 4 + (2 if cfg.optim.first_moment_dtype == "bfloat16" else 4)) * weights / shards
    gradients = 4 * weights / shards * (2 if cfg.run.microbatches > 1 else 1)
    rows = max(1, cfg.data.batch_size // (data * fsdp * cfg.run.microbatches))
    tokens = rows * cfg.data.sequence_length
    stream = tokens * D * width
    matmuls = tokens * width * (q + 2 * kv * model.head_dim + 3 * model.d_ff) / tensor + stream
    kernel = cfg.data.sequence_length % flops.SPLASH_LENGTHS == 0  # which has no scores in memory
    attention = 0 if kernel else tokens * cfg.data.sequence_length * model.n_heads / tensor * (4 + width)
    block = (weights - V * D * (1 if model.tied_head else 2)) / model.n_layers / tensor
    kept = {
        "full": stream,
        "attention": stream + tokens * width * q / tensor,
        "dots": 2 * stream + matmuls,
        "none": 4 * stream + 2 * matmuls + attention,
    }[model.remat]
    # One block at work: its gathered weights and their gradients, what it recomputes and the gradients of that.
    working = 2 * block * width + 2 * matmuls + attention
    projected = flops.head_chunk(rows, cfg.data.sequence_length, model.head_chunk, predicted_share(cfg))
    vocabulary = 2 * 4 * projected * V / tensor + V * D / tensor * (4 + width)
    return state + gradients + model.n_layers * kept + working + vocabulary


def _candidates(cfg: Config, topology: Topology) -> Iterator[tuple[str, Config, Topology]]:
    """Changes with the run and the topology that they make; those that cost time and not chips come first."""
    data, fsdp, tensor = cfg.mesh.sizes(topology.devices)
    rows = cfg.data.batch_size // (data * fsdp)

    def split(parts: int) -> Config:
        return replace(cfg, run=replace(cfg.run, microbatches=parts))

    parts = [n for n in range(cfg.run.microbatches + 1, rows + 1) if rows % n == 0]
    for n in parts:
        yield f"--run.microbatches {n}", split(n), topology
    if data > topology.slices:
        wide = replace(cfg, mesh=replace(cfg.mesh, data=topology.slices, fsdp=-1))
        yield f"--mesh.data {topology.slices} --mesh.fsdp -1", wide, topology
    for remat in {"none": ("dots", "attention", "full"), "dots": ("full",), "attention": ("full",), "full": ()}[
        cfg.model.remat
    ]:
        kept = replace(cfg, model=replace(cfg.model, remat=remat))
        yield f"--model.remat {remat}", kept, topology
        for n in parts[-1:]:
            yield f"--model.remat {remat} --run.microbatches {n}", replace(split(n), model=kept.model), topology
    for ways in (2, 4, 8):
        if ways > tensor and cfg.model.n_kv_heads % ways == 0 and topology.devices % (data * ways) == 0:
            cut = replace(cfg, mesh=replace(cfg.mesh, fsdp=-1, tensor=ways))
            yield f"--mesh.fsdp -1 --mesh.tensor {ways}", cut, topology
    more = larger(topology)
    while more and cfg.data.batch_size % (more.devices * cfg.run.microbatches // tensor) == 0:
        yield f"--topology {more.name}", cfg, more
        more = larger(more)
