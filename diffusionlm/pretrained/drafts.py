"""Completions that are watched while they are denoised, state by state."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from diffusionlm.errors import UserError
from diffusionlm.pretrained import chat
from diffusionlm.pretrained.completion import Draft
from diffusionlm.pretrained.mask_notation import GappedText
from diffusionlm.sampling.canvas import Template, expand_spans
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import Frame, stream_rows

if TYPE_CHECKING:
    from diffusionlm.pretrained.model import LoadedModel


def completion_drafts(
    model: "LoadedModel", request: chat.Prompt, sampling: SamplingConfig, pinned: Mapping[int, str]
) -> Iterator[Draft]:
    """Yield the states of a completion; the arguments are those of `LoadedModel.stream`."""
    row = [*request.ids, *new_tokens(model, sampling.length, pinned)]
    for frame in _frames(model, row, sampling):
        tokens, masked, confidence = (states[0, len(request.ids) : len(row)].tolist() for states in frame[1:])
        revealed = tokens[: masked.index(True)] if any(masked) else tokens
        yield Draft(frame.step, tokens, masked, confidence, model.decode_after(request.ids, revealed))


def infill_drafts(
    model: "LoadedModel", gapped: GappedText, sampling: SamplingConfig, decode: Callable[[Sequence[int], bool], str]
) -> Iterator[Draft]:
    """Yield the states of a text whose gaps have one length each; `decode` returns the text of the ids of a gap."""
    n = len(expand_spans(gapped.template, gapped.lengths))
    for frame in _frames(model, gapped.template, sampling):
        tokens, masked, confidence = (states[0, :n].tolist() for states in frame[1:])
        yield Draft(frame.step, tokens, masked, confidence, gapped.filled(tokens, gapped.lengths, decode))


def new_tokens(model: "LoadedModel", length: int, pinned: Mapping[int, str]) -> list[int | None]:
    """Return the tokens to come: None, or those of the texts that are pinned at their positions.

    Raises:
      UserError: a pinned text has no tokens, does not fit into the length, or lies on another one.
    """
    row: list[int | None] = [None] * length
    for position, text in sorted(pinned.items()):
        ids = model.require_tokenizer().encode(text, inside=position > 0)
        end = position + len(ids)
        if not ids or position < 0 or end > length:
            raise UserError(
                f"{text!r}, which has {len(ids)} tokens, cannot be pinned at position {position}; it needs at least "
                f"one token, and positions 0 to {length - 1} exist"
            )
        if any(token is not None for token in row[position:end]):
            raise UserError(
                f"{text!r} at position {position} lies on the text that is pinned before it; move it to the right"
            )
        row[position:end] = ids
    return row


def _frames(model: "LoadedModel", row: Template, sampling: SamplingConfig) -> Iterator[Frame]:
    frames = stream_rows(model.params, model.config, [row], sampling)
    while True:
        with model.on_mesh():  # not around the yield, where it would be the caller's mesh too
            frame = next(frames, None)
        if frame is None:
            return
        yield frame
