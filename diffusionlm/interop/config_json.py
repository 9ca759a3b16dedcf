"""Translate between a foreign config.json and our `ModelConfig` (`config_keys` says whose config.json it is)."""

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from diffusionlm import config_io, presets, schema, untrusted
from diffusionlm.config import DiffusionConfig, ModelConfig
from diffusionlm.data import jinja_templates
from diffusionlm.errors import UserError
from diffusionlm.interop.config_keys import NATIVE_KEY, require_known
from diffusionlm.interop.families import FAMILIES, Family, equal_head_dim
from diffusionlm.interop.layouts import Shape

ConfigJson = Mapping[str, Any]  # a parsed config.json; empty if there is none
_HUGE = 1e300  # NaN, infinity and integers that no float holds are not below it
# Features that only some networks have, and the values of those that lack them.
_WITHOUT = {"qk_norm": False, "sliding_window": 0, "rope_scaling.kind": "none"}
_OPERATIONAL = {"dtype", "remat", "head_chunk", "lora_rank", "max_length", "rope_bf16_tables"}


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
    end_ids: list = dataclasses.field(default_factory=list)  # tokens besides EOS that end a text

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
                jinja_templates.from_dict(native.template)
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
    if not file.exists():
        return {}
    try:
        return schema.read_json(file, dict[str, Any])
    except OSError as error:
        raise UserError(f"cannot read {file}: {error}") from error
    except UserError as error:
        raise UserError(f"{error}; download it again") from error


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


def to_model_config(family: Family, given: ConfigJson) -> ModelConfig:
    """Return the network that a config.json describes; its `vocab_size` counts all input rows.

    Raises:
      UserError: a field is missing, or has a value that our network does not compute.
    """
    require_known(family, given)
    fields = {**family.absent, **given}
    for name, allowed in family.supported.items():
        if (value := fields.get(name, allowed[0])) not in allowed:
            shown = untrusted.printable(repr(value))
            lacking = name in family.absent and name not in given
            said = f"lacks {name}, which its readers take for {shown}" if lacking else f"has {name}={shown}"
            raise UserError(f"config.json {said}, and this version computes {' or '.join(map(repr, allowed))} only")
    known: dict[str, Any] = {"mask_row": False, "causal": not family.mdm, **family.constants}
    for native_name, foreign_name in family.fields.items():
        known[native_name] = _value(family, fields, known, native_name, foreign_name)
    known.setdefault("n_kv_heads", known["n_heads"])
    known.setdefault("head_dim", equal_head_dim(known, fields))
    for translation in family.translations:
        known |= translation.read(fields, known)
    cfg = ModelConfig(**known)
    try:
        cfg.validate()
    except UserError as error:
        raise UserError(f"config.json describes no network of ours: {error}; restore it") from error
    return cfg


def _value(family: Family, fields: ConfigJson, known: Mapping[str, Any], native_name: str, foreign_name: str) -> Any:
    """Return the value of one of our fields, or the default of one that is absent or that the reference computes."""
    value, default = fields.get(foreign_name), family.optional.get(native_name)
    if value is None and (default is None or (callable(default) and (default := default(known, fields)) is None)):
        raise UserError(f"config.json lacks {foreign_name}, our {native_name}; restore the file")
    computed = value is None and (foreign_name not in fields or callable(family.optional[native_name]))
    return _checked_type(native_name, foreign_name, default if computed else value)


def _checked_type(native_name: str, foreign_name: str, value: Any) -> bool | int | float:
    """Return a value of config.json as the type of our field."""
    kind = typing.get_type_hints(ModelConfig)[native_name]
    if kind is float and type(value) in (int, float) and abs(value) < _HUGE:
        return float(value)
    if type(value) is kind and not (kind is int and value < 1):
        return value
    allowed = {int: "a whole number of at least 1", float: "a number, and finite", bool: "true or false"}[kind]
    shown = untrusted.printable(repr(value))
    raise UserError(f"config.json has {foreign_name}={shown}, which must be {allowed}; restore the file")


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


def require_ladder(cfg: ModelConfig, shapes: Mapping[str, Shape]) -> None:
    """Refuse a network that readers of SMDM's format, who have nothing but the shapes, would take for another.

    Raises:
      UserError: it is not a size of the ladder, or differs from the one that has these shapes.
    """
    ladder = ladder_config(shapes)
    for field in dataclasses.fields(ModelConfig):
        implied, actual = getattr(ladder, field.name), getattr(cfg, field.name)
        if field.name not in _OPERATIONAL and implied != actual:
            raise UserError(
                f"tensors of these shapes mean {field.name}={implied!r} in it, and the model has {actual!r}"
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
    architecture, model_type = next(iter(family.architectures.items()))
    fields: dict[str, Any] = {"architectures": [architecture], "model_type": model_type, **family.exported}
    for native_name, foreign_name in family.fields.items():
        if native_name not in family.unread:
            fields[foreign_name] = rows if native_name == "vocab_size" else getattr(cfg, native_name)
    fields |= {name: allowed[0] for name, allowed in family.supported.items() if allowed[0] is not None}
    for translation in family.translations:
        fields |= translation.write(cfg)
    if "embedding_size" in fields:  # LLaDA has both
        fields["vocab_size"] = rows
    return fields | {f"{name}_token_id": i for name, i in special_ids.items() if i is not None}


def _require_expressible(family: Family, cfg: ModelConfig) -> None:
    for name, value in family.constants.items():
        if name != "rope_bf16_tables" and getattr(cfg, name) != value:
            raise UserError(f"this format has {name}={value!r}, and the model {name}={getattr(cfg, name)!r}")
    if not family.fields:
        return
    if cfg.causal and family.mdm:
        raise UserError("this format is for masked diffusion models, and the model is autoregressive")
    expressed = {*family.constants, *family.fields}.union(*(rule.fields for rule in family.translations))
    for name, value in _WITHOUT.items():
        if name.partition(".")[0] not in expressed and (actual := attrgetter(name)(cfg)) != value:
            raise UserError(f"this format has no field for {name}={actual}")
    implied = {"n_kv_heads": cfg.n_heads, "head_dim": cfg.d_model // cfg.n_heads}
    for name, value in implied.items():
        if (name not in family.fields or name in family.unread) and getattr(cfg, name) != value:
            raise UserError(f"this format has no field for {name}={getattr(cfg, name)}, and means {value}")
