"""Load checkpoints for sampling and scoring."""

import dataclasses

import jax
import jax.numpy as jnp
from etils import epath

from diffusionlm import config_io
from diffusionlm.checkpoint import store
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.config import DiffusionConfig, MeshConfig, ModelConfig
from diffusionlm.data import tokenizers
from diffusionlm.errors import UserError, suggest
from diffusionlm.model import conversion
from diffusionlm.model.spec import ModelSpec
from diffusionlm.model.transformer import abstract_params
from diffusionlm.parallel import device_memory, processes
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.pretrained import chat
from diffusionlm.pretrained.model import LoadedModel

DTYPES = ("float32", "bfloat16")


def load(path: epath.PathLike, dtype: str | None = None, mesh: jax.sharding.Mesh | None = None) -> LoadedModel:
    """Load a checkpoint for sampling; the optimizer's files are not opened.

    Args:
      path: a run directory (its newest step), a step directory, or a params-only model.
      dtype: "float32" or "bfloat16", of the parameters and the computation; None: what the model computes in.
      mesh: devices to split the model over (`diffusionlm.parallel.mesh.make_mesh`); None: one device.

    Raises:
      UserError: no checkpoint there, one that this version does not understand, an unknown dtype, or no room for it.
    """
    location = store.locate(path)  # once: a run may save another step meanwhile
    path = location.path
    sidecar = store.load_sidecar(path)
    _require_known_template(path, sidecar)
    saved = config_io.from_dict(ModelConfig, sidecar.model)
    model_cfg = dataclasses.replace(saved, lora_rank=0)
    if dtype is not None:
        if dtype not in DTYPES:
            raise UserError(f"unknown dtype {dtype!r}{suggest(str(dtype), DTYPES)}")
        model_cfg = dataclasses.replace(model_cfg, dtype=dtype)
    if mesh is None:  # attention's kernels are chosen by the devices of a mesh, so there is always one
        mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])
    held = jnp.dtype(model_cfg.dtype)
    shapes = abstract_params(saved, mesh, held)
    fix = "use a machine with more memory, or more devices with mesh="
    processes.run_on_all_processes(lambda: device_memory.require_room(f"loading {path}", shapes, {}, fix))
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    params = store.load_params(path, held, shardings, expected=shapes)
    if saved.lora_rank:
        shardings = jax.tree.map(lambda x: x.sharding, abstract_params(model_cfg, mesh))
        params = conversion.convert_on_mesh(saved, model_cfg, params, {}, shardings)
    tokenizer = tokenizers.from_dict(sidecar.tokenizer) if sidecar.tokenizer else None
    return LoadedModel(params, _model_spec(sidecar, model_cfg), sidecar, tokenizer, mesh, location)


def _model_spec(sidecar: Sidecar, model_cfg: ModelConfig) -> ModelSpec:
    return ModelSpec(
        model=model_cfg,
        diffusion=config_io.from_dict(DiffusionConfig, sidecar.diffusion),
        mask_id=None if sidecar.objective == "arm" else sidecar.mask_id,
        suppressed_ids=tuple(sidecar.suppressed_ids),
        shifted=sidecar.alignment == "shifted" or sidecar.objective == "arm",
        max_length=sidecar.canvas.get("max_length", model_cfg.max_length),
        eos_ids=tuple(i for i in (sidecar.eos_id, *sidecar.end_ids) if i is not None),
    )


def _require_known_template(path: epath.PathLike, sidecar: Sidecar) -> None:
    """Raise `UserError` if the sidecar's chat template is not understood: prompts would be written wrongly."""
    try:
        chat.template_of(sidecar)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
