"""What a notebook shows of a model and of its completions."""

import html
from typing import TYPE_CHECKING

import jax
import numpy as np

from diffusionlm import notebook
from diffusionlm.console import KEPT
from diffusionlm.pretrained import terminal
from diffusionlm.untrusted import printable

if TYPE_CHECKING:
    from diffusionlm.pretrained.completion import Completion
    from diffusionlm.pretrained.model import LoadedModel

SHADES = ("rgba(80,140,220,.18)", "rgba(80,140,220,.34)")  # of neighbouring tokens, on a light or a dark page
TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7"
FRAME = "width:100%;height:24rem;border:1px solid rgba(128,128,128,.4)"


def model_html(model: "LoadedModel") -> str:
    """Return what a model is, as a table."""
    spec, tokenizer = model.config, model.tokenizer
    kind = "autoregressive" if spec.autoregressive else "masked diffusion"
    rows = {
        "kind": f"{kind} ({model.sidecar.objective})",
        "parameters": f"{sum(leaf.size for leaf in jax.tree.leaves(model.params)):,}",
        "context": f"{spec.max_length} tokens",
        "tokenizer": "none" if tokenizer is None else f"{tokenizer.vocab_size:,} tokens",
        "answers dialogues": "yes" if model.has_chat_template else "no",
        "devices": ", ".join(sorted({device.device_kind for device in model.mesh.devices.flat})),
    }
    return notebook.table(str(model.location.path), rows)


def completion_html(completion: "Completion") -> str:
    """Return the text with its tokens shaded, and above it, if there is a trace, the denoising as an animation."""
    from diffusionlm.pretrained.webpage import page, section_of  # which imports the module of completions

    parts = []
    if completion.trace is not None and completion.reader is not None:
        animation = page([section_of(1, completion)], completion.reader, ends=completion.ends)
        source = html.escape(animation, quote=True)
        parts.append(f'<iframe sandbox="allow-scripts" style="{FRAME}" srcdoc="{source}"></iframe>')
    text = _shaded(completion) if completion.reader is not None else _escaped(completion.text)
    passes = f"{completion.nfe} forward passes, {completion.seconds:.2f} s"
    parts.append(f'<p style="{TEXT}"><b>{_escaped(completion.before)}</b>{text}<br><small>{passes}</small></p>')
    return "".join(parts)


def _shaded(completion: "Completion") -> str:
    """Return the tokens of a completion up to the end of its text, or of the whole row where gaps were filled."""
    assert completion.reader is not None
    pieces = terminal.token_texts(np.array(completion.tokens, np.int32), completion.reader)
    if not completion.infilled:
        pieces = _until(pieces, completion.text)
    shaded = (
        f'<span title="token {completion.tokens[n]}" style="background:{SHADES[n % 2]}">{_escaped(piece)}</span>'
        for n, piece in enumerate(pieces)
        if piece
    )
    return "".join(shaded)


def _until(pieces: list[str], text: str) -> list[str]:
    """Return the pieces that make up a text: what follows is the end of text, and what is behind it."""
    count, shown, wanted = 0, "", len(text.lstrip())  # a decoder drops a space at the start of a text
    while count < len(pieces) and len(shown.lstrip()) < wanted:
        shown += pieces[count]
        count += 1
    return pieces[:count]


def _escaped(text: str) -> str:
    return html.escape(printable(text, KEPT))
