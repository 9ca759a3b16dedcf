"""TODO: one sentence."""

import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from typing import Any

from diffusionlm.config import Config, check_types
from diffusionlm.errors import UserError, suggest


def to_dict(config: Any) -> dict:
    """A config dataclass as plain JSON types."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict) -> Any:
    """Rebuilds a config dataclass: a missing key takes its default, an unknown one raises `UserError`."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"unknown field {unknown[0]!r} in {cls.__name__}{suggest(unknown[0], hints)}")
    built = {k: from_dict(hints[k], v) if dataclasses.is_dataclass(hints[k]) else v for k, v in values.items()}
    config = cls(**built)
    check_types(config)
    return config


def to_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    return from_dict(Config, json.loads(text))


def flat(config: Any, prefix: str = "", operational: bool = True) -> dict[str, Any]:
    """Dotted name -> value of every field, with or without the operational ones."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            found |= flat(value, f"{prefix}{f.name}.", operational)
        elif operational or not f.metadata.get("operational"):
            found[prefix + f.name] = value
    return found


def scientific_fields(config: Any) -> dict[str, Any]:
    """Dotted name -> value of every field that is part of a run's scientific identity.

    Of a tokenizer that a checkpoint or a released model brings, the path is not: the dataset knows which it is.
    """
    found = flat(config, operational=False)
    named = found.get("data.tokenizer")
    if named and named not in ("byte", "sentencepiece") and not named.endswith(".model"):
        found["data.tokenizer"] = "a checkpoint's"
    return found


def with_fields(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config` with other values for some dotted fields, validated."""
    for name, value in changes.items():
        section, _, field_name = name.rpartition(".")
        if section:
            value = dataclasses.replace(getattr(config, section), **{field_name: value})
        config = dataclasses.replace(config, **{section or name: value})
    return config.validate()


def fingerprint(config: Config) -> str:
    """Twelve hex digits that identify the science of a run, whatever its paths, mesh and logging."""
    told = scientific_fields(config)
    for name, default in _later_fields(type(config)).items():
        if told[name] == default:
            del told[name]
    text = json.dumps(told, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _later_fields(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> default of every field made with `later`."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(f.type):
            found |= _later_fields(f.type, f"{prefix}{f.name}.")
        elif f.metadata.get("later"):
            found[prefix + f.name] = f.default
    return found
