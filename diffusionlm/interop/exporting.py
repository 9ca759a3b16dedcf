"""From a checkpoint of ours to a model that others load: `export_weights`."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath
from flax import traverse_util

from diffusionlm import checkpoint, config, lora
from diffusionlm.config import ModelConfig
from diffusionlm.data import tokenizers
from diffusionlm.errors import UserError
from diffusionlm.files import whole_directory
from diffusionlm.interop import weights
from diffusionlm.interop.families import FAMILIES, Family
from diffusionlm.interop.importing import expanded, shapes_of
from diffusionlm.registry import suggest

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def export_weights(path: epath.PathLike, output: str | Path, *, format: str, dtype: str | None = None) -> list[str]:
    """Writes a checkpoint as config.json, safetensors and tokenizer files, in the layout of a family.

    It is the inverse of `import_weights`. Adapters go into the weights.

    Args:
      path: what `load` takes.
      output: the directory to make, which must not exist.
      format: a family of `families.FAMILIES`.
      dtype: float32, bfloat16 or float16; None: as saved.

    Returns:
      What a user of the files should know, in sentences.

    Raises:
      UserError: the format cannot express the model, or the directory exists. Nothing is written then.
    """
    if format not in FAMILIES:
        raise UserError(f"unknown format {format!r}{suggest(format, FAMILIES)}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}{suggest(dtype, DTYPES)}")
    output, family = Path(output), FAMILIES[format]
    if output.exists():
        raise UserError(f"{output} exists; delete it or choose another directory")
    sidecar = checkpoint.load_sidecar(path)
    saved = config.from_dict(ModelConfig, sidecar.model)
    _require_kind(format, family, sidecar)
    model, notes = _written_model(format, family, dataclasses.replace(saved, lora_rank=0))
    told = _config(family, model, sidecar, saved) if family.config else None
    if (other := _not_held(family, model)) is not None:
        raise UserError(f"format={format} has no place for {other}; use another format")
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = lora.merge(checkpoint.load_params(path)) if saved.lora_rank else checkpoint.load_params(path)
    flat = {name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(params, sep="/").items()}
    if saved.mask_row and not model.mask_row and not model.tied_head:
        flat["head"] = np.where(np.arange(flat["head"].shape[1]) == saved.vocab_size, 0, flat["head"])
    with whole_directory(output) as directory:
        chosen = DTYPES[dtype] if dtype else None
        weights.write(directory, _tensors(family, model, flat, sidecar, chosen))
        if told is not None:
            stored = dtype or flat["embed"].dtype.name
            text = json.dumps(told | {"torch_dtype": stored}, indent=2)
            (directory / "config.json").write_text(text + "\n")
        if sidecar.tokenizer:
            for name, content in tokenizers.from_dict(sidecar.tokenizer).files().items():
                (directory / name).write_bytes(content)
    return notes


def _require_kind(format: str, family: Family, sidecar: checkpoint.Sidecar) -> None:
    """Refuses a diffusion model where others would run it as an autoregressive one, or the other way round."""
    both = family.ids and family.alignment == "same"  # SMDM
    if sidecar.objective == "arm" and (family.objective == "arm" or both):
        return
    if sidecar.objective == "mdm" and family.objective == "mdm" and sidecar.alignment == family.alignment:
        return
    kind = "an autoregressive model" if sidecar.objective == "arm" else f"a diffusion model ({sidecar.alignment})"
    fitting = [
        name
        for name, one in FAMILIES.items()
        if one.objective == sidecar.objective and (one.objective == "arm" or one.alignment == sidecar.alignment)
    ]
    raise UserError(f"format={format} is not for {kind}; use one of {', '.join(fitting)}")


def _written_model(format: str, family: Family, model: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """The model as the format has it: without a row of its own for the mask, that is one more id."""
    if not model.mask_row or format in ("smdm", "diffugpt"):
        return model, []
    V = model.vocab_size
    note = (
        f"The mask is id {V}, one more than the vocabulary has. Nothing may predict it: set its logit to -inf, unless "
        "the program does so by itself."
    )
    return dataclasses.replace(model, vocab_size=V + 1, mask_row=False), [note]


def _config(family: Family, model: ModelConfig, sidecar: checkpoint.Sidecar, saved: ModelConfig) -> dict[str, Any]:
    told = family.config(model)
    ids = {"bos": sidecar.bos_id, "eos": sidecar.eos_id, "pad": sidecar.pad_id, "mask": sidecar.mask_id}
    told |= {f"{kind}_token_id": value for kind, value in ids.items() if value is not None}
    if sidecar.objective == "mdm" and (saved.mask_row or sidecar.suppressed_ids):
        told["suppress_mask_token"] = True  # ours: importing it again keeps the mask from being predicted
    return told


def _not_held(family: Family, model: ModelConfig) -> str | None:
    """A parameter that no tensor of the format holds."""
    held = {path for rule in family.rules(model) for path in rule.ours}
    return min(set(shapes_of(model)) - held, default=None)


def _tensors(
    family: Family, model: ModelConfig, flat: Mapping[str, np.ndarray], sidecar: checkpoint.Sidecar, dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    tied = sidecar.source.get("tied")
    for rule in family.rules(model):
        for i, names in expanded(rule, model.n_layers):
            ours = [flat[path] if i is None else flat[path][i] for path in rule.ours]
            theirs = rule.layout.write(ours)
            name = tied if tied in names else names[0]
            yield name, theirs if dtype is None else theirs.astype(dtype)
