"""Files of settings for `--config FILE`: JSON or TOML with some or all fields of an experiment.

A file holds the fields in groups (`[optim]`, `peak_lr = 1e-3`). It may also be what `diffusionlm experiments NAME
--json` prints or the config.json of a run, which have all of them.
"""

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from diffusionlm import config_io, schema, untrusted
from diffusionlm.config import Config
from diffusionlm.config_fields import check_fields, field_types
from diffusionlm.errors import UserError, suggest
from diffusionlm.registry import experiments
from diffusionlm.storage import disk_path
from diffusionlm.untrusted import printable

T = TypeVar("T")


class _Described(schema.Record, frozen=True):
    """The output of `diffusionlm experiments NAME --json`; only the fields count, and the counts follow from them."""

    name: str
    description: str
    objective: str
    fingerprint: str
    parameters: dict[str, int]
    tokens: int
    flops: dict[str, float]
    memory_bytes: dict[str, int]
    config: dict[str, Any]
    data: dict[str, Any] | None = None


def apply(path: str, recipe: Config | None = None) -> Config:
    """Return an experiment with the fields of a file.

    Args:
      path: a .json or .toml file.
      recipe: the experiment whose other fields stay; None: the one that the file names, if it is registered, and else
        the file must have every field.

    Raises:
      UserError: the file is missing or neither JSON nor TOML, an unknown field, a value that its field does not allow,
        a file without a recipe that lacks fields, or the name of another experiment than the recipe's.
    """
    values = _read(path)
    name = values.get("name")
    if recipe is None and isinstance(name, str) and experiments.knows(name):
        recipe = experiments.get(name)
    elif recipe is not None and name not in (None, recipe.name):
        raise UserError(
            f"{printable(path)} is of the experiment {printable(repr(name))}, and not of {recipe.name!r}; name that "
            "experiment or none on the command line, or take the name out of the file"
        )
    if recipe is None:
        _require_all(path, values)
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise UserError(
                f"{printable(path)}: name={printable(repr(name))} must be usable as that of a directory in runs"
            )
        recipe = Config()
    cfg = _merged(recipe, values, path)
    try:
        check_fields(cfg)
    except UserError as error:
        raise UserError(f"{printable(path)}: {error}") from error
    return cfg


def _read(path: str) -> dict[str, Any]:
    """Return the fields of a file."""
    file, shown = disk_path(path), printable(path)
    if file.suffix not in (".json", ".toml"):
        raise UserError(f"config={shown!r} must end in .json or .toml")
    try:
        text = untrusted.read_text(file)
    except OSError as error:
        raise UserError(f"cannot read config={shown!r}: {error.strerror or error}") from error
    try:
        values = tomllib.loads(text) if file.suffix == ".toml" else _from_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{shown} is not {file.suffix[1:].upper()}: {printable(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f'{shown} must be an object of fields, such as {{"optim": {{"peak_lr": 1e-3}}}}')
    if "config" in values:
        return dict(schema.convert(values, _Described, path).config)
    version = values.pop("format", config_io.FORMAT)
    if version != config_io.FORMAT:
        raise UserError(f"{shown} is of format {version}, and this version of diffusionlm reads {config_io.FORMAT}")
    return values


def _from_json(text: str) -> Any:
    msgspec.json.decode(text)  # refuses what is no JSON, such as NaN, which Python's reader takes
    return json.loads(text, object_pairs_hook=schema.unique_fields)


def _merged(recipe: T, values: Any, path: str, prefix: str = "") -> T:
    """Return a config dataclass with other values for some of its fields, groups included."""
    if not isinstance(values, Mapping):
        raise UserError(f"{printable(path)}: {prefix[:-1]}={printable(repr(values))[:60]} must be a group of fields")
    hints, changes = field_types(type(recipe)), {}
    for name, value in values.items():
        if name not in hints:
            known = [f"{prefix}{each}" for each in hints]
            raise UserError(f"{printable(path)}: unknown field {prefix + name!r}{suggest(prefix + name, known)}")
        inner = getattr(recipe, name)
        is_group = dataclasses.is_dataclass(inner)
        changes[name] = _merged(inner, value, path, f"{prefix}{name}.") if is_group else value
    return dataclasses.replace(recipe, **changes)  # pyright: ignore[reportArgumentType]: a dataclass


def _require_all(path: str, values: Mapping[str, Any]) -> None:
    """Raise `UserError` unless a file has every field, since there is no experiment to take others from."""
    missing = [name for name in config_io.flat(Config()) if not _has(values, name.split("."))]
    if missing:
        named = f"its name {printable(values['name'])!r} is not registered" if "name" in values else "it names none"
        raise UserError(
            f"{printable(path)} lacks {missing[0]}, and there is no experiment to take it from, since {named}; name "
            "one on the command line: EXPERIMENT --config FILE"
        )


def _has(values: Any, parts: list[str]) -> bool:
    return isinstance(values, Mapping) and parts[0] in values and (not parts[1:] or _has(values[parts[0]], parts[1:]))
