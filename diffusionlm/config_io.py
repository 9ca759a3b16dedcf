"""Configs to and from JSON, and overrides by dotted name."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from diffusionlm import schema
from diffusionlm.config import Config
from diffusionlm.config_fields import check_fields, field_types
from diffusionlm.errors import UserError, suggest
from diffusionlm.untrusted import printable

T = TypeVar("T")

FORMAT = 2  # of config.json; 1 had no number, and fingerprints that left some fields out
# Fields that are gone, and the one value that they may have in files that are read: the behaviour that remains.
_REMOVED = {"random_length_scope": "example"}


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain JSON types."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Mapping[str, Any]) -> T:
    """Rebuild a config dataclass from plain JSON types; a missing key takes its default.

    Raises:
      UserError: an unknown key, or a value that its field does not allow.
    """
    config = _build(cls, values)
    check_fields(config)
    return config


def _build(cls: type[T], values: Any) -> T:
    if not isinstance(values, Mapping):
        raise UserError(f"{cls.__name__}={printable(repr(values))[:60]} must be an object of fields")
    hints = field_types(cls)
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name in hints:
            fields[name] = _build(hints[name], value) if dataclasses.is_dataclass(hints[name]) else value
        elif _REMOVED.get(name, ...) != value:
            raise UserError(f"unknown field {name!r} in {cls.__name__}{suggest(name, hints)}")
    return cls(**fields)


def to_json(config: Config) -> str:
    """Return the text of a run's config.json."""
    return json.dumps({"format": FORMAT, **to_dict(config)}, indent=2) + "\n"


def from_json(text: str) -> Config:
    """Read what `to_json` wrote.

    Raises:
      UserError: the text is not a JSON object, another version of diffusionlm wrote it, or a value is not allowed.
    """
    try:  # as Python reads JSON, so that a setting that is NaN is named
        values = json.loads(text, object_pairs_hook=schema.unique_fields)
    except (ValueError, RecursionError) as error:
        raise UserError(f"it is not JSON: {printable(error)}") from error
    if not isinstance(values, dict):
        raise UserError("it is not a JSON object")
    version = values.pop("format", 1)
    if version != FORMAT:
        raise UserError(f"it is of format {version}, and this version of diffusionlm reads format {FORMAT}")
    return from_dict(Config, values)


def flat(config: Any, prefix: str = "", operational: bool = True) -> dict[str, Any]:
    """Return dotted name -> value of every field, with or without the operational ones."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= flat(value, f"{prefix}{field.name}.", operational)
        elif operational or not field.metadata.get("operational"):
            values[prefix + field.name] = value
    return values


def with_fields(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return `config` with other values for some dotted fields, validated."""
    for name, value in changes.items():
        config = _with_field(config, name, value)
    return config.validate()


def _with_field(config: Any, name: str, value: Any) -> Any:
    head, _, rest = name.partition(".")
    inner = _with_field(getattr(config, head), rest, value) if rest else value
    return dataclasses.replace(config, **{head: inner})
