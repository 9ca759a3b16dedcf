"""Prepare data with the tokenizer of a checkpoint, for `diffusionlm.prepare` and `diffusionlm data prepare`."""

import dataclasses
import functools
import inspect
import os
from typing import Any

from etils import epath

from diffusionlm import hub
from diffusionlm.checkpoint import sidecar as sidecar_lib
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.data import prepare as data_prepare
from diffusionlm.data import tokenizers
from diffusionlm.data.metadata import Metadata
from diffusionlm.data.request import Settings, check_values
from diffusionlm.data.tokenizers import Tokenizer
from diffusionlm.errors import UserError
from diffusionlm.storage import run_path


@functools.wraps(data_prepare.prepare)
def prepare(
    *args: Any,
    tokenizer: str | os.PathLike | Tokenizer = "sentencepiece",
    bos: bool | None = None,
    **settings: Any,
) -> Metadata:
    """Prepare a dataset as `data.prepare.prepare` does, also with the tokenizer of a checkpoint."""
    return data_prepare.prepare(*args, **_with_tokenizer(tokenizer, bos, args, settings))


@functools.wraps(data_prepare.prepare)
def show_plan(
    *args: Any, tokenizer: str | os.PathLike | Tokenizer = "sentencepiece", bos: bool | None = None, **settings: Any
) -> None:
    """Print what `prepare` would do with these arguments."""
    data_prepare.show_plan(*args, **_with_tokenizer(tokenizer, bos, args, settings))


def _with_tokenizer(
    tokenizer: str | os.PathLike | Tokenizer, bos: bool | None, args: tuple, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the settings with the tokenizer of the checkpoint or model that is named, and its choice of BOS."""
    if isinstance(tokenizer, str | os.PathLike) and _may_be_checkpoint(tokenizer):
        _check_values(*args, bos=bos, **settings)  # before the work of reading a tokenizer
        name = os.fspath(tokenizer)
        tokenizer, sidecar = _read(name)
        tokenizers.require_eos(tokenizer, repr(name))
        if bos is None and sidecar:
            bos = settings.get("format", "text") == "text" and begins_with_bos(sidecar)
    return {**settings, "tokenizer": tokenizer, "bos": bos}


def named_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer by name (see `tokenizers.load`), or that of the checkpoint in a directory or on the Hub.

    Raises:
      UserError: there is no such tokenizer, or the checkpoint carries none.
    """
    return _read(name)[0] if _may_be_checkpoint(name) else tokenizers.load(name)


def begins_with_bos(sidecar: Sidecar) -> bool:
    """Return True if documents began with BOS in the training of a checkpoint."""
    # Where it is EOS as well, as in GPT-2, the one that ends the document before is enough.
    if sidecar.bos_id in (None, sidecar.eos_id) or sidecar.canvas.get("start_id") != sidecar.bos_id:
        return False
    # Qwen's config.json has one that its tokenizer never writes.
    return sidecar.tokenizer is not None and tokenizers.from_dict(sidecar.tokenizer).bos_id is not None


def _check_values(*args: Any, **settings: Any) -> None:
    """Check those arguments of `prepare` for which nothing needs to be read."""
    bound = inspect.signature(data_prepare.prepare).bind(*args, **settings)
    bound.apply_defaults()
    values = {field.name: bound.arguments[field.name] for field in dataclasses.fields(Settings)}
    check_values(bound.arguments["output"], Settings(**values))


def _may_be_checkpoint(name: str | os.PathLike) -> bool:
    return hub.is_address(name) or run_path(name).is_dir()


def _read(name: str) -> tuple[Tokenizer, Sidecar | None]:
    """Return the tokenizer in a directory, or at an address on the Hub; of a checkpoint, its sidecar too.

    Raises:
      UserError: it is neither a released model's nor a checkpoint's, the checkpoint carries no tokenizer, or the Hub
        refuses.
    """
    path, address = name, None
    if hub.is_address(name):  # without the parameters, which no tokenizer needs
        path, address = hub.fetch(name, (*tokenizers.HUB_FILES, *hub.SIDECAR_FILES))
    if (tokenizer := tokenizers.load_directory(path)) is not None:
        return tokenizer, None
    sidecar = _read_sidecar(epath.Path(path), address)
    if sidecar.tokenizer is None:
        raise UserError(f"the checkpoint {name} carries no tokenizer; give a tokenizer file")
    return tokenizers.from_dict(sidecar.tokenizer), sidecar


def _read_sidecar(path: epath.Path, address: hub.Address | None) -> Sidecar:
    """Return the sidecar of the checkpoint in a directory; of one that is at an address, only that needs to be there.

    Raises:
      UserError: there is none, or it is damaged.
    """
    from diffusionlm.checkpoint import integrity, store  # here, because they import JAX

    if address is None:
        return store.load_sidecar(path)
    if not (path / sidecar_lib.FILE).exists():
        raise tokenizers.no_tokenizer(address)
    return integrity.read_sidecar(path)
