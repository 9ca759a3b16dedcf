"""Preparing data with the tokenizer of a checkpoint: behind `diffusionlm.prepare` and `diffusionlm data prepare`."""

import functools
import os
from typing import Any

from etils import epath

from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.data import prepare as data_prepare
from diffusionlm.data import tokenizers
from diffusionlm.data.metadata import Metadata
from diffusionlm.data.tokenizers import Tokenizer
from diffusionlm.errors import UserError


@functools.wraps(data_prepare.prepare)
def prepare(
    *args: Any,
    tokenizer: str | os.PathLike | Tokenizer = "sentencepiece",
    bos: bool | None = None,
    **settings: Any,
) -> Metadata:
    """Prepare a dataset as `data.prepare.prepare` does, also with the tokenizer of a checkpoint."""
    if isinstance(tokenizer, str | os.PathLike) and (checkpoint := _in_checkpoint(os.fspath(tokenizer))):
        tokenizer, sidecar = checkpoint
        if bos is None:
            bos = settings.get("format", "text") == "text" and begins_with_bos(sidecar)
    return data_prepare.prepare(*args, tokenizer=tokenizer, bos=bos, **settings)


def named_tokenizer(name: str) -> Tokenizer:
    """Return a tokenizer by name (see `tokenizers.load`), or that of the checkpoint in a directory.

    Raises:
      UserError: there is no such tokenizer, or the checkpoint carries none.
    """
    checkpoint = _in_checkpoint(name)
    return checkpoint[0] if checkpoint else tokenizers.load(name)


def begins_with_bos(sidecar: Sidecar) -> bool:
    """Return whether documents began with BOS in the training of a checkpoint."""
    # Where it is EOS as well, as in GPT-2, the one that ends the document before is enough.
    if sidecar.bos_id in (None, sidecar.eos_id) or sidecar.canvas.get("start_id") != sidecar.bos_id:
        return False
    # Qwen's config.json has one that its tokenizer never writes.
    return sidecar.tokenizer is not None and tokenizers.from_dict(sidecar.tokenizer).bos_id is not None


def _in_checkpoint(name: str) -> tuple[Tokenizer, Sidecar] | None:
    """Return the tokenizer and the sidecar of the checkpoint in a directory; None for the names of other tokenizers."""
    if not epath.Path(name).is_dir() or tokenizers.load_directory(name) is not None:
        return None
    from diffusionlm.checkpoint import store  # here, because it imports JAX

    sidecar = store.load_sidecar(name)
    if sidecar.tokenizer is None:
        raise UserError(f"the checkpoint {name} carries no tokenizer; give a tokenizer file")
    return tokenizers.from_dict(sidecar.tokenizer), sidecar
