"""Fields of config.json that mean several of ours together: scaled rotary positions and sliding windows."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from diffusionlm import untrusted
from diffusionlm.config import ModelConfig
from diffusionlm.config_io import to_dict
from diffusionlm.config_model import RopeScaling
from diffusionlm.errors import UserError

Fields = Mapping[str, Any]

THETA = 10000.0  # the base that all of our families' readers take for an absent one
ORIGINAL = "original_max_position_embeddings"
# Kind -> numbers that it needs, and numbers that it may have. `ORIGINAL` is the longest text if it is absent.
NUMBERS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (ORIGINAL,)),
    "yarn": (("factor",), (ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")),
}
# Other keys of rotary settings, with the values that change nothing.
INERT: Mapping[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1, None),
    "truncate": (True, None),
    "finetuned": (True, False, None),
}
ALL_KINDS = ("linear", "dynamic", "llama3", "yarn")


class Translation(NamedTuple):
    """A rule for fields of config.json that mean some of ours together.

    Attributes:
      fields: the `ModelConfig` fields.
      keys: the fields of config.json.
      read: maps a config.json, absent fields filled in, and our fields known so far to our fields.
      write: maps a network to the fields of config.json.
    """

    fields: frozenset[str]
    keys: frozenset[str]
    read: Callable[[Fields, Fields], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


def rope(*kinds: str) -> Translation:
    """Return the translation of rotary settings, in the spellings of transformers 4 and 5, scaled by these kinds."""
    keys = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", ORIGINAL}
    return Translation(
        frozenset({"rope_theta", "rope_scaling"}),
        frozenset(keys),
        partial(_read_rope, kinds),
        partial(_write_rope, kinds),
    )


def _read_rope(kinds: tuple[str, ...], fields: Fields, known: Fields) -> dict[str, Any]:
    name, parameters = _parameters(fields)
    theta = _theta(fields, name, parameters)
    kind = parameters.pop("rope_type")
    if kind != "default" and kind not in kinds:
        computed = f"{', '.join(kinds)} only" if kinds else "none for this family"
        raise UserError(f"config.json has {name} of type {_shown(kind)}, and this version computes {computed}")
    _require_inert("partial_rotary_factor", fields.get("partial_rotary_factor"))
    for key in INERT:
        _require_inert(f"{name}.{key}", parameters.pop(key, None))
    needed, optional = NUMBERS[kind]
    if fields.get(ORIGINAL) is not None and ORIGINAL in optional:
        if parameters.setdefault(ORIGINAL, fields[ORIGINAL]) != fields[ORIGINAL]:
            _contradict(ORIGINAL, fields[ORIGINAL], name, parameters[ORIGINAL])
    elif fields.get(ORIGINAL) is not None:
        raise UserError(f"config.json has {ORIGINAL}={_shown(fields[ORIGINAL])}, and no {name} that uses it; remove it")
    if unknown := sorted(set(parameters) - {*needed, *optional}):
        raise UserError(
            f"config.json has {name}.{unknown[0]}={_shown(parameters[unknown[0]])}, which type {kind} does not use; "
            "remove it, or restore the file"
        )
    for key in needed:
        if parameters.get(key) is None:
            raise UserError(f"config.json lacks {name}.{key}, which type {kind} needs; restore the file")
    numbers = {key: _number(f"{name}.{key}", value) for key, value in parameters.items() if value is not None}
    return {"rope_theta": theta} | _scaling(kind, numbers, known["max_length"])


def _parameters(fields: Fields) -> tuple[str, dict[str, Any]]:
    """Return the name of the field that holds the rotary settings, and these with their type spelled `rope_type`.

    Raises:
      UserError: they are no object, have no type, or contradict each other.
    """
    given: dict[str, dict[str, Any]] = {}
    for name in ("rope_parameters", "rope_scaling"):
        value = fields.get(name)
        if value is not None and not isinstance(value, dict):
            raise UserError(
                f"config.json has {name}={_shown(value)}, which must be an object or null; restore the file"
            )
        if value:
            given[name] = dict(value)
    for name, value in given.items():
        kind = value.setdefault(
            "rope_type", value.get("type", "default" if set(value) <= {"rope_theta", *INERT} else None)
        )
        if value.pop("type", kind) != kind or not isinstance(kind, str):
            raise UserError(
                f"config.json has {name}={_shown(fields[name])}, whose rope_type must be one of {', '.join(NUMBERS)}"
            )
    if len(given) == 2 and given["rope_parameters"] != given["rope_scaling"]:
        raise UserError(
            f"config.json has rope_scaling={_shown(fields['rope_scaling'])} and "
            f"rope_parameters={_shown(fields['rope_parameters'])}, of which readers take one or the other; remove one"
        )
    return given.popitem() if given else ("rope_parameters", {"rope_type": "default"})


def _theta(fields: Fields, name: str, parameters: dict[str, Any]) -> float:
    """Return the base of the frequencies, which may stand at the top level or among the rotary settings."""
    outer = fields.get("rope_theta")
    if "rope_theta" in parameters:
        inner = _number(f"{name}.rope_theta", parameters.pop("rope_theta"))
        if outer is not None and outer != inner:
            _contradict("rope_theta", outer, name, inner)
        return inner
    return _number("rope_theta", outer) if "rope_theta" in fields else THETA


def _scaling(kind: str, numbers: dict[str, float], max_length: int) -> dict[str, Any]:
    """Return the scaling, and the longest text where that follows from it."""
    if kind == "default":
        return {"rope_scaling": RopeScaling()}
    if kind == "linear":
        return {"rope_scaling": RopeScaling("linear", numbers["factor"])}
    if kind == "dynamic":  # `max_position_embeddings` is that of the first training
        scaling = RopeScaling("dynamic", numbers["factor"], max_length)
        return {"rope_scaling": scaling, "max_length": _longest(scaling)}
    original = numbers.pop(ORIGINAL, max_length)
    if original != int(original) or original < 1:
        raise UserError(f"config.json has {ORIGINAL}={original}, which must be a whole number of at least 1")
    if kind == "llama3":
        return {"rope_scaling": RopeScaling("llama3", original_length=int(original), **numbers)}
    scale, scale_all = numbers.pop("mscale", 0.0), numbers.pop("mscale_all_dim", 0.0)
    if "attention_factor" in numbers and not numbers["attention_factor"] > 0:
        raise UserError(f"config.json has attention_factor={numbers['attention_factor']}, which must be positive")
    if "attention_factor" not in numbers and scale and scale_all:
        logarithm = 0.1 * math.log(max(numbers["factor"], 1.0))
        numbers["attention_factor"] = (1 + scale * logarithm) / (1 + scale_all * logarithm)
    turns = {key: numbers.pop(key) for key in ("beta_fast", "beta_slow") if numbers.get(key)}  # 0 is absent
    numbers = {key: value for key, value in numbers.items() if key not in ("beta_fast", "beta_slow")}
    scaling = RopeScaling("yarn", original_length=int(original), **numbers, **turns)
    return {"rope_scaling": scaling, "max_length": max(max_length, _longest(scaling))}


def _longest(scaling: RopeScaling) -> int:
    """Return the longest text that a scaling is meant for."""
    return int(scaling.original_length * scaling.factor)


def _write_rope(kinds: tuple[str, ...], cfg: ModelConfig) -> dict[str, Any]:
    scaling = cfg.rope_scaling
    if scaling.kind == "none":
        return {"rope_theta": cfg.rope_theta} | ({"rope_scaling": None} if kinds else {})
    if scaling.kind not in kinds:
        raise UserError(f"this format has no model.rope_scaling.kind={scaling.kind}")
    needed, optional = NUMBERS[scaling.kind]
    values = to_dict(scaling) | {ORIGINAL: scaling.original_length}
    fields: dict[str, Any] = {key: values[key] for key in (*needed, *optional) if values.get(key)}
    fields = {"rope_theta": cfg.rope_theta, "rope_scaling": {"rope_type": scaling.kind, **fields}}
    if scaling.kind == "dynamic":
        if cfg.max_length != _longest(scaling):
            raise UserError(f"this format means max_length={_longest(scaling)}, and the model has {cfg.max_length}")
        fields["max_position_embeddings"] = scaling.original_length
    return fields


# --- sliding windows


def _read_mistral_window(fields: Fields, known: Fields) -> dict[str, Any]:
    return {"sliding_window": _window(fields.get("sliding_window"), known["max_length"])}


def _write_mistral_window(cfg: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": cfg.sliding_window or None}


def _read_qwen_window(fields: Fields, known: Fields) -> dict[str, Any]:
    """Read the windows of Qwen2 and Qwen3, which leave the first `max_window_layers` layers without."""
    used, layers = fields.get("use_sliding_window", False), known["n_layers"]
    if type(used) is not bool:
        raise UserError(f"config.json has use_sliding_window={_shown(used)}, which must be true or false; restore it")
    window = _window(fields.get("sliding_window", 4096), known["max_length"]) if used else 0
    first, kinds = fields.get("max_window_layers", 28), fields.get("layer_types")
    if kinds is None and window:
        if type(first) is not int:
            raise UserError(f"config.json has max_window_layers={_shown(first)}, which must be a whole number")
        kinds = ["full_attention"] * min(max(first, 0), layers) + ["sliding_attention"] * (layers - first)
    if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
        raise UserError(f"config.json has layer_types={_shown(kinds)}, which must name the kind of each of its layers")
    if kinds is None or all(kind == "full_attention" for kind in kinds):
        return {"sliding_window": 0}
    if used and all(kind == "sliding_attention" for kind in kinds):
        return {"sliding_window": window}
    if used and not window and set(map(str, kinds)) <= {"full_attention", "sliding_attention"}:
        return {"sliding_window": 0}  # no text fills the windows of some layers
    source = "layer_types" if fields.get("layer_types") is not None else "max_window_layers"
    raise UserError(
        f"config.json has {source}={_shown(fields.get(source, first))} and use_sliding_window={used}, and this version "
        "computes a window in all layers or in none"
    )


def _write_qwen_window(cfg: ModelConfig) -> dict[str, Any]:
    if not cfg.sliding_window:
        return {"use_sliding_window": False}
    return {"use_sliding_window": True, "sliding_window": cfg.sliding_window, "max_window_layers": 0}


def _window(value: Any, max_length: int) -> int:
    """Return the width of a window; 0 for none, and for one that no text fills."""
    if value is not None and (type(value) is not int or value < 1):
        raise UserError(f"config.json has sliding_window={_shown(value)}, which must be a whole number or null")
    return 0 if value is None or value >= max_length else value


MISTRAL_WINDOW = Translation(
    fields=frozenset({"sliding_window"}),
    keys=frozenset({"sliding_window"}),
    read=_read_mistral_window,
    write=_write_mistral_window,
)
QWEN_WINDOW = Translation(
    fields=frozenset({"sliding_window"}),
    keys=frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}),
    read=_read_qwen_window,
    write=_write_qwen_window,
)


# --- values


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e300:  # nor NaN, nor an integer that no float holds
        raise UserError(f"config.json has {name}={_shown(value)}, which must be a number, and finite; restore the file")
    return float(value)


def _require_inert(name: str, value: Any) -> None:
    allowed = INERT[name.rpartition(".")[2]]
    if not any(type(value) in (type(one), float) and value == one for one in allowed):
        raise UserError(f"config.json has {name}={_shown(value)}, and this version computes {allowed[0]!r} only")


def _contradict(key: str, outer: Any, name: str, inner: Any) -> None:
    raise UserError(
        f"config.json has {key}={_shown(outer)} and {name}.{key}={_shown(inner)}, of which readers take one or the "
        "other; make them equal"
    )


def _shown(value: Any) -> str:
    return untrusted.printable(repr(value))[:120]
