"""The memory that a run needs, checked before anything is allocated."""

import contextlib

import jax.numpy as jnp
from jax.sharding import Mesh

from diffusionlm import memory
from diffusionlm.config import Config
from diffusionlm.model import lora
from diffusionlm.parallel import device_memory
from diffusionlm.parallel.mesh import bytes_per_device
from diffusionlm.training.state import abstract_state

_FIX = "use a smaller model or batch, run.microbatches, or more devices with --mesh.fsdp N (docs/pods.md)"


def needs(cfg: Config, mesh: Mesh) -> dict[str, int]:
    """Return the bytes that a training step needs on each device, by part; at least.

    The state is counted exactly. Of the activations only the residual stream between the layers is counted, which the
    backward pass needs whatever is rematerialised.
    """
    state = abstract_state(cfg, mesh)
    trained, _ = lora.split(cfg.model, state.params)
    rows = cfg.data.batch_size // cfg.run.microbatches
    # The stream may be split over all devices, along the batch and along the width.
    values = rows * cfg.data.sequence_length * cfg.model.d_model * cfg.model.n_layers // mesh.size
    return {
        "parameters": bytes_per_device(state.params),
        "optimizer": bytes_per_device(state.opt_state),
        "gradients": bytes_per_device(trained),
        "activations": values * jnp.dtype(cfg.model.dtype).itemsize,
    }


def require_room(cfg: Config, mesh: Mesh) -> None:
    """Refuse a run whose state cannot fit.

    Raises:
      UserError: it does not; the message has the estimate.
    """
    memory.require_room(f"training {cfg.name}", needs(cfg, mesh), mesh.local_devices, _FIX)


def refusals(cfg: Config, mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """Return a context in which an allocation that a device refuses is a `UserError` with the estimate."""
    return device_memory.refusals(f"training {cfg.name}", needs(cfg, mesh), _FIX)
