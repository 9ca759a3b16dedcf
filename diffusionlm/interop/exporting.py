"""Export one of our checkpoints to files that other libraries read."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from diffusionlm import config_io
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.config import ModelConfig
from diffusionlm.data import tokenizers
from diffusionlm.errors import UserError
from diffusionlm.interop import config_json, safetensors
from diffusionlm.interop.families import FAMILIES, Family
from diffusionlm.interop.layouts import paired_views
from diffusionlm.interop.placement import Placement, abstract_leaves, common_dtype, parameter_views, placements
from diffusionlm.interop.sidecars import native_fields
from diffusionlm.model import lora
from diffusionlm.ownership.claims import whole_directory
from diffusionlm.storage import disk_path

GENERATION_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def export_weights(
    path: str | os.PathLike,
    output: str | os.PathLike,
    format: str,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> list[str]:
    """Write a checkpoint as a Hugging Face directory: config.json, safetensors, and the tokenizer's own files.

    Weights above 5 GB are split into several files with an index. LoRA adapters are merged into the weights that they
    adapt. Peak memory is little more than the parameters of one rule. Properties that the format's config.json has no
    fields for are stored in it under `config_json.NATIVE_KEY`.

    Args:
      path: a run directory (its newest step), a step directory, or a params-only model.
      output: a new directory.
      format: llama, gpt2, qwen2, llada, or another family that `import_weights` reads.
      dtype: the dtype of the tensors; None: as they are stored.

    Returns:
      What users of the files should know, a sentence each.

    Raises:
      UserError: there is no checkpoint; the format or the dtype is unknown, or cannot express the model or its values;
        `output` exists, or another process is making it.
    """
    output = disk_path(output)
    if output.exists():
        raise UserError(f"output={output} exists; delete it or choose another directory")
    if format not in FAMILIES:
        raise UserError(f"format={format!r} must be one of {', '.join(FAMILIES)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    path = checkpoint.find(path)  # once: a run may save another step meanwhile
    sidecar = checkpoint.load_sidecar(path)
    cfg = config_io.from_dict(ModelConfig, sidecar.model)
    try:
        fields, placed = _plan(format, sidecar, cfg)
    except UserError as error:
        raise UserError(f"{path} cannot be written as format={format}: {error}") from error
    tensors = _ForeignTensors(path, cfg, placed, dtype)
    specs = {name: safetensors.Spec(place.shape, tensors.dtype_of(place)) for name, place in placed.items()}
    with whole_directory(output) as partial:
        if fields:
            first = next(iter(specs.values())).dtype
            fields["torch_dtype"] = next(name for name, known in DTYPES.items() if known == first)
            (partial / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        if FAMILIES[format].generation_config or sidecar.end_ids:
            ids = {name: fields[name] for name in GENERATION_IDS if name in fields}
            if sidecar.end_ids:
                ids["eos_token_id"] = [i for i in (sidecar.eos_id, *sidecar.end_ids) if i is not None]
            (partial / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
        safetensors.write(partial, specs, tensors.read)
        if sidecar.tokenizer:
            for name, content in tokenizers.from_dict(dict(sidecar.tokenizer)).files().items():
                with (partial / name).open("xb") as file:  # a name of a file that was just written is refused
                    file.write(content)
    return _notes(FAMILIES[format], format, cfg, sidecar.alignment)


def _plan(format: str, sidecar: Sidecar, cfg: ModelConfig) -> tuple[dict[str, Any], dict[str, Placement]]:
    """Return the config.json, empty in a format without one, and the placements of a checkpoint in a format.

    Raises:
      UserError: the format cannot express the model.
    """
    family = FAMILIES[format]
    _require_same_alignment(family, sidecar)
    special_ids = {name: getattr(sidecar, f"{name}_id") for name in ("bos", "eos", "pad", "mask")}
    if sidecar.start_id is not None:  # other libraries begin texts with BOS
        special_ids["bos"] = sidecar.start_id
    fields = config_json.from_model_config(family, cfg, cfg.embedding_rows, special_ids)
    merged = config_io.from_dict(ModelConfig, {**sidecar.model, "lora_rank": 0})
    placed = placements(family, cfg, {name: leaf.shape for name, leaf in abstract_leaves(merged).items()})
    if fields:
        fields[config_json.NATIVE_KEY] = config_io.to_dict(native_fields(format, sidecar, cfg))
    else:
        config_json.require_ladder(cfg, {name: placement.shape for name, placement in placed.items()})
    return fields, placed


def _require_same_alignment(family: Family, sidecar: Sidecar) -> None:
    """Refuse a masked diffusion model whose alignment differs from the one that the format implies."""
    shifted = sidecar.alignment == "shifted"
    if family.mdm and sidecar.objective == "mdm" and family.shifted != shifted:
        implied, actual = ("token i + 1" if value else "token i" for value in (family.shifted, shifted))
        fitting = ", ".join(name for name, other in FAMILIES.items() if other.mdm and other.shifted == shifted)
        raise UserError(
            f"position i predicts {implied} in it, and {actual} in this model; formats that fit are {fitting}"
        )


@dataclass
class _ForeignTensors:
    """The tensors of an export, made one at a time from a checkpoint.

    Attributes:
      path: the checkpoint.
      cfg: its network.
      placed: the placements of the tensors by name.
      dtype: the name of their dtype; None: as the parameters are stored.
    """

    path: str | os.PathLike
    cfg: ModelConfig
    placed: Mapping[str, Placement]
    dtype: str | None
    saved: Mapping[str, jax.ShapeDtypeStruct] = field(init=False)
    loaded: dict[str, np.ndarray] = field(init=False, default_factory=dict)  # the parameters of one rule

    def __post_init__(self):
        self.saved = checkpoint.param_shapes(self.path)

    def dtype_of(self, placement: Placement) -> np.dtype:
        if self.dtype:
            return DTYPES[self.dtype]
        return common_dtype(self.saved[name].dtype for name in placement.rule.parameters)

    def read(self, name: str) -> np.ndarray:
        placement = self.placed[name]
        if not set(placement.rule.parameters) <= set(self.loaded):  # the tensors of a rule follow each other
            self.loaded.clear()
            self.loaded.update(self._load(placement.rule.parameters))
        tensor = np.empty(placement.shape, self.dtype_of(placement))
        views = parameter_views(placement, self.loaded)
        for parameter, target in paired_views(placement.rule.layout, views, tensor, self.cfg):
            with np.errstate(over="ignore"):
                target[...] = parameter
            if self.dtype == "float16" and (np.isinf(target) & np.isfinite(parameter)).any():
                raise UserError(
                    f"dtype=float16 ends at 65,504, and {name} has a value of {np.abs(parameter).max():g}; use bfloat16"
                )
        return tensor

    def _load(self, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Return these parameters with their adapters, if any, merged into them."""
        stored = [name + suffix for name in names for suffix in ("", lora.DOWN, lora.UP) if name + suffix in self.saved]
        params = checkpoint.load_subset(self.path, {name: self.saved[name] for name in stored})
        if len(stored) > len(names):
            merged = jax.jit(lora.merge)(traverse_util.unflatten_dict(params, sep="/"))
            params = {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(merged, sep="/").items()}
        return params


def _notes(family: Family, format: str, cfg: ModelConfig, alignment: str) -> list[str]:
    notes = []
    if cfg.mask_row and family.mask_in_head:
        notes.append(
            f"the mask token is row {cfg.vocab_size} of {cfg.embedding_rows}: the vocabulary grew by one, and the head "
            "can predict it, which readers must suppress"
        )
    if not cfg.causal and not family.mdm:
        predicted = "i + 1" if alignment == "shifted" else "i, not i + 1"
        notes.append(
            f"the model attends in both directions, and readers of the format {format} are causal by default; position "
            f"i predicts token {predicted}"
        )
    if family.code:
        *names, last = family.code
        notes.append(
            f"its readers need {', '.join(names)} and {last} of a released {format} repository in the directory too"
        )
    if cfg.rope_bf16_tables and family.fields:
        notes.append(
            "the model rounds its rotary tables to bfloat16, which the format cannot express: logits differ slightly"
        )
    return notes
