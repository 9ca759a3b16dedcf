"""From a released model to a checkpoint of ours: `import_weights`."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from diffusionlm import checkpoint, config
from diffusionlm.config import DiffusionConfig, ModelConfig
from diffusionlm.data import tokenizers
from diffusionlm.errors import UserError
from diffusionlm.interop.families import FAMILIES, Family, Rule
from diffusionlm.interop.weights import Weights
from diffusionlm.model import Transformer
from diffusionlm.registry import suggest
from diffusionlm.sharding import unbox


def import_weights(source: str | Path, output: epath.PathLike, *, family: str | None = None) -> checkpoint.Sidecar:
    """Writes a released model as a params-only checkpoint, in its own dtype, with its tokenizer.

    Args:
      source: a directory with config.json, safetensors (sharded or not) and tokenizer files, as Hugging Face has them,
        or a .safetensors file of a family that needs no config.
      output: the checkpoint's directory, which must not exist.
      family: an entry of `families.FAMILIES`; None: the one that config.json names.

    Returns:
      What the checkpoint says about itself.

    Raises:
      UserError: an unknown architecture or one that we have not, tensors that are unknown, missing or of other shapes,
        a damaged file, a tokenizer with more ids than the model has rows, or an `output` that exists. Nothing is
        written then.
    """
    source = Path(source)
    if checkpoint.absolute(output).exists():
        raise UserError(f"{output} exists; delete it or choose another directory")
    told = _read_config(source)
    name, chosen = _family(family, told, source)
    weights = Weights(source)
    model = _model(chosen, told, weights)
    tensors = _matched(chosen, chosen.rules(model), weights, model.n_layers)
    tokenizer = tokenizers.load_directory(source, dict(told)) if source.is_dir() else None
    if tokenizer and tokenizer.vocab_size > model.vocab_size + model.mask_row:
        raise UserError(
            f"the tokenizer in {source} has {tokenizer.vocab_size} ids, and the model {model.vocab_size} rows; are "
            "they of the same model?"
        )
    sidecar = _sidecar(name, chosen, model, told, tokenizer, source, tensors)
    checkpoint.save_params(output, _params(model, chosen.rules(model), tensors, weights), sidecar)
    return sidecar


def shapes_of(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter."""
    tokens_1x1 = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = unbox(jax.eval_shape(Transformer(model).init, jax.random.key(0), tokens_1x1)["params"])
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}


def expanded(rule: Rule, n_layers: int) -> list[tuple[int | None, tuple[str, ...]]]:
    """The tensors of a rule: the layer, None where there is none, and the names that each may have."""
    if "{i}" not in rule.theirs[0]:
        return [(None, rule.theirs)]
    return [(i, tuple(name.format(i=i) for name in rule.theirs)) for i in range(n_layers)]


def of_one_layer(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Ours without the axis of layers."""
    return shape[1:] if path.startswith("blocks/") else shape


def _read_config(source: Path) -> Mapping[str, Any]:
    file = source / "config.json"
    if not file.exists():
        return {}
    try:
        told = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is no JSON ({error}); download or copy it again") from error
    if not isinstance(told, dict):
        raise UserError(f"{file} is no JSON object; download or copy it again")
    return told


def _family(name: str | None, told: Mapping[str, Any], source: Path) -> tuple[str, Family]:
    if name is not None:
        if name not in FAMILIES:
            raise UserError(f"unknown family {name!r}{suggest(name, FAMILIES)}")
        return name, FAMILIES[name]
    names = told.get("architectures") or []
    for one, family in FAMILIES.items():
        if set(names) & set(family.architectures):
            return one, family
    known = sorted(name for family in FAMILIES.values() for name in family.architectures)
    if names:
        raise UserError(
            f"{source} is of architecture {names[0]!r}{suggest(str(names[0]), known)}; or name one of our families "
            "with --family"
        )
    raise UserError(
        f"{source} has no config.json that names its architecture; name its family with --family, one of "
        f"{', '.join(FAMILIES)}"
    )


def _model(family: Family, told: Mapping[str, Any], weights: Weights) -> ModelConfig:
    try:
        model = family.model(told, weights)
    except KeyError as error:
        raise UserError(f"the config.json of {weights.source} lacks {error}; download or copy it again") from error
    model = dataclasses.replace(
        model, causal=family.objective == "arm" or model.causal, dtype="bfloat16" if weights.half else "float32"
    )
    config.check_types(model, "model.")
    model.validate()
    return model


def _matched(family: Family, rules: Sequence[Rule], weights: Weights, n_layers: int) -> dict[tuple[str, ...], str]:
    """For each tensor that the model has, by the names that it may have, the one that it has.

    Raises:
      UserError: any is missing, there are others, or one that is stored twice differs.
    """
    there = {}
    for name in weights.shapes:
        prefix = next((prefix for prefix in family.prefixes if name.startswith(prefix)), "")
        there[name.removeprefix(prefix)] = name
    found, missing, known = {}, [], set()
    for rule in rules:
        for _, names in expanded(rule, n_layers):
            present = [name for name in names if name in there]
            known.update(present)
            if not present:
                missing.append(names[0])
                continue
            found[names] = there[present[0]]
            for other in present[1:]:
                if not np.array_equal(weights[there[present[0]]], weights[there[other]]):
                    raise UserError(f"{weights.source}: {present[0]} and {other} must be equal where the head is tied")
    unknown = [name for name in there if name not in known and not re.fullmatch(family.ignored, name)]
    for what, names in (("lacks", missing), ("has unknown tensors:", sorted(unknown))):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(
                f"{weights.source} {what} {', '.join(names[:3])}{more}; is it a whole model of this architecture?"
            )
    return found


def _params(
    model: ModelConfig, rules: Sequence[Rule], tensors: Mapping[tuple[str, ...], str], weights: Weights
) -> dict[str, Any]:
    """The tree of parameters, on the host; at no time is a tensor there twice."""
    shapes = shapes_of(model)
    jobs = []
    for rule in rules:
        layered = [of_one_layer(path, shapes[path]) for path in rule.ours]
        for i, names in expanded(rule, model.n_layers):
            wanted, has = rule.layout.shape(layered), weights.shapes[tensors[names]]
            if has != wanted:
                raise UserError(
                    f"{weights.source}: {tensors[names]} is of shape {has}, not {wanted} as the config says"
                )
            jobs.append((rule, layered, i, tensors[names]))
    made: dict[str, np.ndarray] = {}
    for rule, layered, i, name in jobs:
        for path, part in zip(rule.ours, rule.layout.read(weights[name], layered), strict=True):
            if path not in made:
                made[path] = np.empty(shapes[path], part.dtype)
            made[path][... if i is None else i] = part
    return traverse_util.unflatten_dict(made, sep="/")


def _sidecar(
    name: str,
    family: Family,
    model: ModelConfig,
    told: Mapping[str, Any],
    tokenizer: tokenizers.Tokenizer | None,
    source: Path,
    tensors: Mapping[tuple[str, ...], str],
) -> checkpoint.Sidecar:
    objective = "arm" if model.causal else "mdm"
    mask_id = _mask_id(family, model, told) if objective == "mdm" else None
    reused = mask_id is not None and mask_id < model.vocab_size
    diffusion = DiffusionConfig(
        mask_id=mask_id if reused else None,
        suppress_mask=family.suppress_mask or told.get("suppress_mask_token", False),
        alignment=family.alignment if objective == "mdm" else "same",
    )
    ids = {
        kind: _id(told.get(f"{kind}_token_id", family.ids.get(f"{kind}_token_id"))) for kind in ("bos", "eos", "pad")
    }
    if tokenizer:
        theirs = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
        ids = {kind: value if value is not None else theirs[kind] for kind, value in ids.items()}
    start_id = {"bos": ids["bos"], "eos": ids["eos"], "none": None}[family.start]
    embed = next(stored for names, stored in tensors.items() if len(names) > 1) if model.tied_head else None
    return checkpoint.Sidecar(
        objective=objective,
        model=config.to_dict(model),
        diffusion=config.to_dict(diffusion),
        mask_id=mask_id,
        pad_id=ids["eos"] if ids["pad"] is None else ids["pad"],
        eos_id=ids["eos"],
        bos_id=ids["bos"],
        suppressed_ids=(mask_id,) if reused and diffusion.suppress_mask else (),
        alignment="shifted" if objective == "arm" else family.alignment,
        tokenizer=tokenizer.to_dict() if tokenizer else None,
        canvas={"max_length": model.max_length, "start_id": start_id},
        source={
            "experiment": source.stem if source.is_file() else source.resolve().name,
            "step": 0,
            "family": name,
            **({"tied": embed} if embed else {}),
        },
    )


def _mask_id(family: Family, model: ModelConfig, told: Mapping[str, Any]) -> int:
    if model.mask_row:
        return model.vocab_size
    found = told.get("mask_token_id", family.mask_id and family.mask_id(model))
    if not isinstance(found, int) or not 0 <= found < model.vocab_size:
        raise UserError(
            f"config.json has mask_token_id={found!r}, which must be one of the model's {model.vocab_size} ids; add it"
        )
    return found


def _id(value: Any) -> int | None:
    """Of several that end a text, the first."""
    return value[0] if isinstance(value, list) and value else value
