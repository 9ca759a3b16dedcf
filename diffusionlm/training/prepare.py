"""Prepare data with the tokenizer of a checkpoint, for `diffusionlm.prepare` and `diffusionlm data prepare`."""

import functools
import inspect
import os
from typing import Any

from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.data import prepare as data_prepare
from diffusionlm.data import tokenizers
from diffusionlm.data.metadata import Metadata
from diffusionlm.data.request import check_values
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
    if isinstance(tokenizer, str | os.PathLike) and run_path(tokenizer).is_dir():
        _check_values(*args, bos=bos, **settings)  # before the work of reading a tokenizer
        name = os.fspath(tokenizer)
        tokenizer, sidecar = _read_directory(name)
        tokenizers.require_eos(tokenizer, repr(name))
        if bos is None and sidecar:
            bos = settings.get("format", "text") == "text" and begins_with_bos(sidecar)
    return data_prepare.prepare(*args, tokenizer=tokenizer, bos=bos, **settings)


def named_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer by name (see `tokenizers.load`), or that of the checkpoint in a directory.

    Raises:
      UserError: there is no such tokenizer, or the checkpoint carries none.
    """
    return _read_directory(name)[0] if run_path(name).is_dir() else tokenizers.load(name)


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
    names = inspect.signature(check_values).parameters
    check_values(**{name: bound.arguments[name] for name in names})


def _read_directory(path: str) -> tuple[Tokenizer, Sidecar | None]:
    """Return the tokenizer in a directory; of a checkpoint, its sidecar too.

    Raises:
      UserError: the directory is neither a released model's nor a checkpoint, or the checkpoint carries no tokenizer.
    """
    if (tokenizer := tokenizers.load_directory(path)) is not None:
        return tokenizer, None
    from diffusionlm.checkpoint import store  # here, because it imports JAX

    sidecar = store.load_sidecar(path)
    if sidecar.tokenizer is None:
        raise UserError(f"the checkpoint {path} carries no tokenizer; give a tokenizer file")
    return tokenizers.from_dict(sidecar.tokenizer), sidecar
