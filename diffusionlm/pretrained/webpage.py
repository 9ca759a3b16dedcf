"""Denoising traces as one animated web page, which needs no network, no library and no server."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusionlm import templates
from diffusionlm.errors import UserError
from diffusionlm.pretrained import terminal
from diffusionlm.pretrained.completion import Completion, Reader
from diffusionlm.sampling.state import Trace
from diffusionlm.storage import disk_path, write_atomically


def save_page(completions: Sequence[Completion], tokenizer: Reader, path: str | os.PathLike) -> None:
    """Write an animated page of the completions' traces, one section each; the file is there whole or not at all.

    Args:
      completions: generated with `trace=True`.
      tokenizer: the model's tokenizer.
      path: the page's file; its directory must exist, and a file that is there is replaced.

    Raises:
      UserError: no completions, one without a trace, or a path that cannot be written.
    """
    if not completions:
        raise UserError("no completions to show; give at least one")
    if any(completion.trace is None for completion in completions):
        raise UserError("a completion has no trace to show; generate with trace=True")
    check_page_path(path)
    content = _page(completions, tokenizer).encode("ascii", "xmlcharrefreplace")
    target = Path(os.path.realpath(path))  # a link stays a link
    try:
        write_atomically(target, content)
    except OSError as error:
        raise UserError(f"cannot write html={str(path)!r}: {error.strerror}") from error


def check_page_path(path: str | os.PathLike) -> None:
    """Raise `UserError` if `save_page` could not write there; to be called before the work of generating."""
    directory = os.path.dirname(os.path.realpath(disk_path(path)))
    if not os.path.basename(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise UserError(f"html={str(path)!r} is not a file; name one, such as trace.html")
    if not os.path.isdir(directory):
        state = "is a file; choose another" if os.path.exists(directory) else "does not exist; make it first"
        raise UserError(f"html={str(path)!r}: the directory {directory!r} {state}")
    if not os.access(directory, os.W_OK):
        raise UserError(f"html={str(path)!r}: the directory {directory!r} cannot be written to; choose another")


def events(trace: Trace) -> list[list[list]]:
    """List the changes of each step of one row: [position, id, confidence] for a reveal, [position] for a new mask.

    The confidence has three digits; it is None where it is not known, and for the end of text that fills up a row.

    Args:
      trace: arrays (frames, length), as in `Completion.trace`.
    """
    steps = []
    for i in range(1, len(trace.tokens)):
        masked_N, tokens_N = trace.masked[i], trace.tokens[i]
        changed_N = (masked_N != trace.masked[i - 1]) | (~masked_N & (tokens_N != trace.tokens[i - 1]))
        steps.append(
            [
                [n] if masked_N[n] else [n, int(tokens_N[n]), _confidence(trace, i, n)]
                for n in np.flatnonzero(changed_N).tolist()
            ]
        )
    return steps


def _confidence(trace: Trace, frame: int, position: int) -> float | None:
    if trace.confidence is None or trace.confidence[frame, position] == 0:
        return None
    return round(float(trace.confidence[frame, position]), 3)


def _trace(completion: Completion) -> Trace:
    assert completion.trace is not None  # `save_page` has checked it
    return completion.trace


def _section(completion: Completion, tokenizer: Reader) -> dict[str, Any]:
    trace = _trace(completion)
    start = zip(trace.tokens[0].tolist(), trace.masked[0], strict=True)
    start_ids = [-1 if masked else token for token, masked in start]
    return {
        "prompt": completion.before,
        "nfe": completion.nfe,
        "seconds": round(completion.seconds, 2),
        "given": start_ids,  # ids, -1 where a position starts as a mask
        "steps": events(trace),
        "characters": terminal.characters(np.asarray(trace.tokens[-1]), tokenizer),
    }


def _page(completions: Sequence[Completion], tokenizer: Reader) -> str:
    traces = [_trace(completion) for completion in completions]
    ids = np.unique(np.concatenate([trace.tokens[~trace.masked] for trace in traces]))
    data = {
        "texts": dict(zip(ids.tolist(), terminal.single_texts(ids, tokenizer), strict=True)),
        "sections": [_section(completion, tokenizer) for completion in completions],
    }
    texts = [completion.full_text for completion in completions]
    environment = templates.environment("diffusionlm.pretrained")
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.get_template("denoising.html").render(texts=texts, data=data)
