"""Translate between a foreign config.json and our `ModelConfig`, and detect the family."""

import dataclasses
import json
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from diffusionlm import config_io, presets
from diffusionlm.config import DiffusionConfig, ModelConfig
from diffusionlm.data.chat_templates import Template
from diffusionlm.errors import UserError
from diffusionlm.interop.families import FAMILIES, Family, equal_head_dim
from diffusionlm.interop.layouts import Shape
from diffusionlm.untrusted import read_text

ConfigJson = Mapping[str, Any]  # a parsed config.json; empty if there is none
NATIVE_KEY = "diffusionlm"


@dataclass(frozen=True)
class NativeFields:
    """Settings of a native model without a standard config.json field; exports store them under `NATIVE_KEY`."""

    family: str
    objective: Literal["mdm", "arm"]
    alignment: Literal["same", "shifted"]
    diffusion: DiffusionConfig
    mask_row: bool
    rope_bf16_tables: bool
    bos_id: int | None
    start_id: int | None  # the first token of a text
    max_length: int  # of texts in training, in tokens
    template: dict | None = None  # of chats

    @classmethod
    def read(cls, fields: ConfigJson) -> "NativeFields | None":
        """Return the native fields of a config.json, or None if it has none.

        Raises:
          UserError: they are damaged.
        """
        if NATIVE_KEY not in fields:
            return None
        from diffusionlm.diffusion import schedules  # imports SciPy: 35 MB that other imports do without

        try:
            native = config_io.from_dict(cls, fields[NATIVE_KEY])
            native.diffusion.validate()
            schedules.build(native.diffusion)
            if native.template is not None:
                Template.from_dict(native.template)
        except (UserError, TypeError, AttributeError) as error:
            raise UserError(f"config.json has a damaged {NATIVE_KEY!r}: {error}; export the model again") from error
        if native.family not in FAMILIES:
            raise UserError(
                f"config.json has {NATIVE_KEY}.family={native.family!r}, which must be one of {', '.join(FAMILIES)}"
            )
        return native


def read(directory: Path) -> ConfigJson:
    """Return the config.json of a directory, empty if there is none.

    Raises:
      UserError: the file is damaged.
    """
    file = directory / "config.json"
    if not file.is_file():
        return {}
    try:
        fields = json.loads(read_text(file))
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {file}, it is damaged: {error}; download it again") from error
    return fields


def detect_family(fields: ConfigJson, tensor_names: Iterable[str]) -> str:
    """Return the name of the family that a config.json and the names of the tensors belong to.

    Raises:
      UserError: no known family matches.
    """
    if native := NativeFields.read(fields):
        return native.family
    tensor_names = list(tensor_names)
    architectures = fields.get("architectures") or []
    for name, family in FAMILIES.items():
        if family.marker and any(family.marker in tensor for tensor in tensor_names):
            return name
    for name, family in FAMILIES.items():
        if set(architectures) & set(family.architectures):
            return name
    if not architectures:
        for name, family in FAMILIES.items():
            if family.architectures and fields.get("model_type") == family.model_type:
                return name
    _refuse_unknown_family(fields)


def _refuse_unknown_family(fields: ConfigJson) -> NoReturn:
    names = ", ".join(FAMILIES)
    if not fields:
        raise UserError(f"there is no config.json that names the architecture; name the family with --family ({names})")
    architecture = ", ".join(fields.get("architectures") or []) or fields.get("model_type") or "(none)"
    known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    raise UserError(
        f"config.json names the architecture {architecture}, and this version imports {known}; if another family has "
        f"the same layout, name it with --family ({names})"
    )


def special_id(fields: ConfigJson, key: str) -> int | None:
    """Return the special id `key` of a config.json: the first of several, None for a negative one.

    Raises:
      UserError: it is not an integer.
    """
    value = fields.get(f"{key}_token_id")
    if isinstance(value, list):
        value = value[0] if value else None
    if value is not None and type(value) is not int:
        raise UserError(f"config.json has {key}_token_id={value!r}, which must be a token's id; restore the file")
    return None if value is None or value < 0 else value


def to_model_config(family: Family, fields: ConfigJson) -> ModelConfig:
    """Return the network that a config.json describes; its `vocab_size` counts all input rows.

    Raises:
      UserError: a field is missing, or has a value that our network does not compute.
    """
    fields = _normalized(fields)
    for name, allowed in family.supported.items():
        value = fields.get(name, allowed[0])
        if value not in allowed:
            raise UserError(
                f"config.json has {name}={value!r}, and this version computes {' or '.join(map(repr, allowed))} only"
            )
    known: dict[str, Any] = {"mask_row": False, "causal": not family.mdm, **family.constants}
    for native_name, foreign_name in family.fields.items():
        value = fields.get(foreign_name)
        if value is None:
            if native_name not in family.optional:
                raise UserError(f"config.json lacks {foreign_name}, our {native_name}; restore the file")
            default = family.optional[native_name]
            value = default(known) if callable(default) else default
        known[native_name] = _checked_type(native_name, foreign_name, value)
    known.setdefault("n_kv_heads", known["n_heads"])
    known.setdefault("head_dim", equal_head_dim(known))
    cfg = ModelConfig(**known)
    cfg.validate()
    return cfg


def _checked_type(native_name: str, foreign_name: str, value: Any) -> bool | int | float:
    """Return a value of config.json as the type of our field."""
    kind = typing.get_type_hints(ModelConfig)[native_name]
    if kind is float and type(value) in (int, float):
        return float(value)
    if type(value) is kind and not (kind is int and value < 1):
        return value
    allowed = {int: "a whole number of at least 1", float: "a number", bool: "true or false"}[kind]
    raise UserError(f"config.json has {foreign_name}={value!r}, which must be {allowed}; restore the file")


def _normalized(fields: ConfigJson) -> ConfigJson:
    """Return a config.json with one spelling of its rotary settings, and without a window that no text can fill."""
    fields = dict(fields)
    rope = fields.pop("rope_parameters", None) or {}
    scaling = fields.get("rope_scaling") or rope
    if isinstance(rope, dict):
        fields.setdefault("rope_theta", rope.get("rope_theta"))
    unscaled = isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type", "default")) == "default"
    fields["rope_scaling"] = None if unscaled else scaling
    window, positions = fields.get("sliding_window"), fields.get("max_position_embeddings")
    if isinstance(window, int) and isinstance(positions, int) and window >= positions:
        fields["sliding_window"] = None
    return fields


def ladder_config(shapes: Mapping[str, Shape]) -> ModelConfig:
    """Return the network of SMDM's ladder whose tensors have these shapes.

    Raises:
      UserError: there is none.
    """
    layers = len({name.split(".")[2] for name in shapes if re.match(r"transformer\.h\.\d+\.", name)})
    rows, d_model = shapes.get("transformer.wte.weight", (0, 0))
    d_ff = shapes.get("transformer.h.0.mlp.swiglu.w1.weight", (0, 0))[0]
    for name in presets.names():
        cfg = presets.get(name)
        if name.startswith("smdm_") and (cfg.n_layers, cfg.d_model, cfg.d_ff) == (layers, d_model, d_ff):
            cfg = dataclasses.replace(cfg, **FAMILIES["smdm"].constants)
            return cfg if rows == cfg.embedding_rows else presets.arm_twin(cfg)
    raise UserError(
        f"{layers} layers of width {d_model} and MLP width {d_ff} are not a size of SMDM's ladder "
        "(`diffusionlm.presets`)"
    )


def from_model_config(
    family: Family, cfg: ModelConfig, rows: int, special_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """Return the config.json of a network in a family's format, the inverse of `to_model_config`.

    Args:
      family: the format.
      cfg: the network.
      rows: the number of input rows that are written.
      special_ids: the bos, eos, pad and mask ids; None where there is none.

    Raises:
      UserError: the format cannot express this network.
    """
    _require_expressible(family, cfg)
    if not family.fields:
        return {}
    fields: dict[str, Any] = {"architectures": list(family.architectures[:1]), "model_type": family.model_type}
    for native_name, foreign_name in family.fields.items():
        fields[foreign_name] = rows if native_name == "vocab_size" else getattr(cfg, native_name)
    fields |= {name: allowed[0] for name, allowed in family.supported.items() if allowed[0] is not None}
    if "embedding_size" in fields:  # LLaDA has both
        fields["vocab_size"] = rows
    return fields | {f"{name}_token_id": i for name, i in special_ids.items() if i is not None}


def _require_expressible(family: Family, cfg: ModelConfig) -> None:
    for name, value in family.constants.items():
        if name != "rope_bf16_tables" and getattr(cfg, name) != value:
            raise UserError(f"this format has {name}={value!r}, and the model {name}={getattr(cfg, name)!r}")
    if cfg.causal and family.mdm:
        raise UserError("this format is for masked diffusion models, and the model is autoregressive")
    if not family.fields:
        return
    implied = {"n_kv_heads": cfg.n_heads, "head_dim": cfg.d_model // cfg.n_heads}
    for name, value in implied.items():
        if name not in family.fields and getattr(cfg, name) != value:
            raise UserError(f"this format has no field for {name}={getattr(cfg, name)}, and means {value}")
