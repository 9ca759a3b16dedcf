"""From the weights of another system to a checkpoint of ours, one tensor at a time."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from diffusionlm import config_io, flops
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.config import DiffusionConfig, ModelConfig
from diffusionlm.data.tokenizers import kinds as tokenizers
from diffusionlm.errors import UserError, suggest
from diffusionlm.interop import safetensors
from diffusionlm.interop.families import FAMILIES, KEY, Family, Ours, detect, ladder_config, model_config
from diffusionlm.interop.layouts import pairs
from diffusionlm.interop.places import Place, common_dtype, leaves, listed, places, views

Tensors = dict[str, safetensors.Tensor]


def import_weights(
    source: str | os.PathLike,
    output: str | os.PathLike,
    family: str | None = None,
    *,
    tokenizer: str | None = None,
    mask_id: int | None = None,
    suppress_mask: bool | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Path:
    """Turns released weights into a checkpoint to sample, score, fine-tune or adapt.

    Tensors keep their dtype and are bit for bit those of the source. Little more than the model itself is in memory.

    Args:
      source: a Hugging Face directory (config.json, safetensors in one file or several, tokenizer files), or a
        .safetensors file.
      output: the checkpoint, a new directory.
      family: gpt2, llama, qwen2, dream, llada, smdm, diffugpt or diffullama; None: what config.json says.
      tokenizer: a tokenizer file or directory; None: that of the source, if it has one.
      mask_id: the id that stands for [MASK]; None: what config.json says, or the family's published one.
      suppress_mask: whether a mask id from the vocabulary is never predicted; None: as the family's reference does.
      mesh: devices to put the parameters on before they are written, each process its part.

    Returns:
      The path of the checkpoint.

    Raises:
      UserError: a source that is damaged, incomplete or of an architecture that our network does not compute; a
        tokenizer with more ids than the model has rows; `output` exists.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise UserError(f"output={output} exists; delete it or choose another directory")
    if family is not None and family not in FAMILIES:
        raise UserError(f"unknown family {family!r}{suggest(family, FAMILIES)}")
    tensors, directory = safetensors.find(source), source if source.is_dir() else source.parent
    described = _described(directory) if family != "smdm" else {}
    named, family = family, family or detect(described, tensors)
    kind = FAMILIES[family]
    tensors = _named(kind, tensors)
    with _doubting(named, directory, tensors):
        cfg, mask_id = _model(kind, described, tensors, mask_id)
        abstract = leaves(cfg, mesh)
        wanted = places(kind, cfg, {name: leaf.shape for name, leaf in abstract.items()})
        tensors = _checked(kind, cfg, tensors, wanted)
    own = _tokenizer(source, described, tokenizer)
    if own is not None and own.vocab_size > cfg.embedding_rows:
        raise UserError(
            f"the tokenizer has {own.vocab_size} ids, and the model {cfg.embedding_rows} input rows; give the model's "
            "own with --tokenizer"
        )
    sidecar = _sidecar(source.stem if source.is_file() else source.resolve().name, family, cfg, mask_id, own, described)
    if suppress_mask is not None:
        sidecar = _with_suppression(sidecar, cfg, suppress_mask)
    params = _filled(cfg, {name: leaf.shape for name, leaf in abstract.items()}, wanted, tensors)
    if mesh is not None:
        for name, leaf in abstract.items():
            params[name] = jax.make_array_from_callback(leaf.shape, leaf.sharding, params[name].__getitem__)
    checkpoint.save_params(output, traverse_util.unflatten_dict(params, sep="/"), sidecar, compress=False)
    return output


def summary(sidecar: checkpoint.Sidecar) -> str:
    """What an imported checkpoint is, in a few words."""
    cfg = config_io.from_dict(ModelConfig, sidecar.model)
    kind = "autoregressive" if sidecar.objective == "arm" else f"masked diffusion, mask id {sidecar.mask_id}"
    tokenizer = "its tokenizer" if sidecar.tokenizer else "no tokenizer"
    return f"{sidecar.source['family']}, {flops.parameters(cfg).total:,} parameters, {kind}, {tokenizer}"


@contextmanager
def _doubting(named: str | None, directory: Path, tensors: Tensors) -> Iterator[None]:
    """Adds to what is refused that config.json says another family than the user has named, if it does."""
    try:
        yield
    except UserError as error:
        told = named
        with suppress(UserError):
            told = named and detect(_described(directory), tensors)
        if told == named:
            raise
        raise UserError(f"{error}; or is --family {named} wrong? config.json says {told}") from error


def _described(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.is_file():
        return {}
    try:
        described = json.loads(file.read_text())
        if not isinstance(described, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}, it is damaged: {error}; download it again") from error
    return described


def _named(family: Family, tensors: Tensors) -> Tensors:
    """The tensors by the names of the rules, without what is no parameter."""
    kept = {name: one for name, one in tensors.items() if not re.fullmatch(family.ignored, name)}
    if family.prefix and not any(name.startswith(family.prefix) for name in kept):
        kept = {name if name == family.head else family.prefix + name: one for name, one in kept.items()}
    return kept


def _model(
    family: Family, described: Mapping[str, Any], tensors: Tensors, mask_id: int | None
) -> tuple[ModelConfig, int | None]:
    """The network, and the id of its mask."""
    if not family.fields:
        cfg = ladder_config({name: one.shape for name, one in tensors.items()})
        rows = cfg.embedding_rows
    else:
        if not described:
            raise UserError("there is no config.json beside the weights, which says what they mean; restore it")
        stored = tensors.get(family.embedding) or tensors.get(family.head)
        cfg = model_config(family, described)
        rows = stored.shape[0] if stored and family.mask_id else cfg.vocab_size
        cfg = dataclasses.replace(cfg, vocab_size=rows)
    narrow = all(one.dtype.itemsize == 2 for name, one in tensors.items() if name in (family.embedding, family.head))
    cfg = dataclasses.replace(cfg, dtype="bfloat16" if narrow else "float32")
    if ours := Ours.of(described):
        cfg = dataclasses.replace(cfg, causal=ours.objective == "arm", rope_bf16_tables=ours.rope_bf16_tables)
    if cfg.causal:
        if mask_id is not None:
            raise UserError(
                f"mask_id={mask_id} is for masked diffusion models, and this one is autoregressive; drop it"
            )
        return cfg, None
    if cfg.mask_row:  # SMDM's own
        return cfg, cfg.vocab_size
    if mask_id is None:
        mask_id = _id(described, "mask")
    if mask_id is None and family.mask_id:
        mask_id = family.mask_id(rows)
    if mask_id is None:
        raise UserError("config.json has no mask_token_id; give the id of the mask with --mask_id")
    if not 0 <= mask_id < rows:
        raise UserError(f"mask_id={mask_id} must lie in [0, {rows}), the model's input rows; name another")
    appended = ours.mask_row if ours else family.mask_id is not None
    if appended and mask_id == rows - 1:
        cfg = dataclasses.replace(cfg, vocab_size=rows - 1, mask_row=True)
    return cfg, mask_id


def _tokenizer(source: Path, described: Mapping[str, Any], named: str | None) -> tokenizers.Tokenizer | None:
    """The tokenizer that is named, or else that of the source, if it has one."""
    if named is not None:
        return tokenizers.load(named)
    return tokenizers.load_directory(source if source.is_dir() else source.parent, dict(described))


def _checked(family: Family, cfg: ModelConfig, tensors: Tensors, wanted: Mapping[str, Place]) -> Tensors:
    """The tensors that are wanted, all of them; of a tied model, what is stored only as its head under both names."""
    tensors = dict(tensors)
    if cfg.tied_head and family.head in tensors:
        head = tensors.pop(family.head)
        embedding = tensors.setdefault(family.embedding, head)
        if embedding is not head and not np.array_equal(*(one.read().view(np.uint8) for one in (embedding, head))):
            raise UserError(
                f"the model is tied, and its {family.head} differs from {family.embedding}; set its field for tied "
                "heads in config.json to false"
            )
    if missing := sorted(set(wanted) - set(tensors)):
        raise UserError(f"the source lacks {len(missing)} of {len(wanted)} tensors: {listed(missing)}; complete it")
    if unknown := sorted(set(tensors) - set(wanted)):
        raise UserError(
            f"the source has {len(unknown)} tensors that this family does not know: {listed(unknown)}; "
            "restore config.json, or name another family with --family"
        )
    if shaped := [name for name, place in wanted.items() if tensors[name].shape != place.shape]:
        texts = [f"{name} {list(tensors[name].shape)} instead of {list(wanted[name].shape)}" for name in shaped]
        raise UserError(f"{len(shaped)} tensors have other shapes than config.json says: {listed(texts)}; restore it")
    return tensors


def _sidecar(
    name: str,
    family: str,
    cfg: ModelConfig,
    mask_id: int | None,
    tokenizer: tokenizers.Tokenizer | None,
    described: Mapping[str, Any],
) -> checkpoint.Sidecar:
    kind, ours = FAMILIES[family], Ours.of(described)
    ids = {key: _special(key, tokenizer, described, kind.ids) for key in ("bos", "eos", "pad")}
    start_id, max_length, suppress = ids["bos"], cfg.max_length, kind.suppress_mask
    shifted, diffusion = kind.shifted or cfg.causal, DiffusionConfig()
    if ours:
        ids["bos"], start_id, max_length = ours.bos_id, ours.start_id, ours.max_length
        shifted, diffusion, suppress = ours.alignment == "shifted", ours.diffusion, ours.diffusion.suppress_mask
        if not 1 <= max_length <= cfg.max_length:
            raise UserError(
                f"config.json has {KEY}.max_length={max_length}, which must lie in [1, {cfg.max_length}], the model's "
                "positions; export the model again"
            )
    numbers = {f"{key}_token_id": i for key, i in ids.items()} | {f"{KEY}.start_id": start_id}
    if foreign := [f"{key}={i}" for key, i in numbers.items() if i is not None and not 0 <= i < cfg.embedding_rows]:
        raise UserError(
            f"{foreign[0]} must lie in [0, {cfg.embedding_rows}), the model's input rows; restore config.json"
        )
    sidecar = checkpoint.Sidecar(
        objective="arm" if cfg.causal else "mdm",
        model=config_io.to_dict(cfg),
        diffusion=config_io.to_dict(
            dataclasses.replace(
                diffusion,
                mask_id=None if cfg.mask_row else mask_id,
                alignment="shifted" if shifted and not cfg.causal else "same",
            )
        ),
        mask_id=mask_id,
        pad_id=ids["eos"] if ids["pad"] is None else ids["pad"],
        eos_id=ids["eos"],
        bos_id=ids["bos"],
        alignment="shifted" if shifted else "same",
        tokenizer=tokenizer and tokenizer.to_dict(),
        canvas={"max_length": max_length, "start_id": start_id},
        source={"experiment": name, "step": 0, "family": family},
        template=ours and ours.template,
    )
    return sidecar if cfg.causal else _with_suppression(sidecar, cfg, suppress)


def _with_suppression(sidecar: checkpoint.Sidecar, cfg: ModelConfig, suppress: bool) -> checkpoint.Sidecar:
    if sidecar.mask_id is None:
        raise UserError(f"suppress_mask={suppress} is for masked diffusion models, and this one is autoregressive")
    in_vocabulary = sidecar.mask_id < cfg.vocab_size
    return dataclasses.replace(
        sidecar,
        suppressed_ids=(sidecar.mask_id,) if suppress and in_vocabulary else (),
        diffusion=sidecar.diffusion | {"suppress_mask": suppress},
    )


def _special(
    key: str, tokenizer: tokenizers.Tokenizer | None, described: Mapping[str, Any], otherwise: Mapping[str, int]
) -> int | None:
    """A special id: the tokenizer's, else that of config.json (the first of several), else the family's."""
    found = getattr(tokenizer, f"{key}_id", None)
    if found is None:
        found = _id(described, key)
    return otherwise.get(key) if found is None else found


def _id(described: Mapping[str, Any], key: str) -> int | None:
    """A special id of config.json, the first of several; a negative one means that there is none."""
    found = described.get(f"{key}_token_id")
    if isinstance(found, list):
        found = found[0] if found else None
    if found is not None and type(found) is not int:
        raise UserError(f"config.json has {key}_token_id={found!r}, which must be a token's id; restore the file")
    return None if found is None or found < 0 else found


def _filled(
    cfg: ModelConfig, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Place], tensors: Tensors
) -> dict[str, np.ndarray]:
    """The parameters by name, layers stacked, rows that pad the vocabulary zero."""
    dtypes: dict[str, list[np.dtype]] = {}
    for name, place in wanted.items():
        for ours in place.rule.ours:
            dtypes.setdefault(ours, []).append(tensors[name].dtype)
    params = {name: np.zeros(shape, common_dtype(dtypes[name])) for name, shape in shapes.items()}
    # Largest first: pages of the parameters are taken as they are filled, and the others do not need theirs yet.
    for name, place in sorted(wanted.items(), key=lambda one: -math.prod(one[1].shape)):
        for ours, theirs in pairs(place.rule.layout, views(place, params), tensors[name].read(), cfg):
            ours[...] = theirs
    return params
