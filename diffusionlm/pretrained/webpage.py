"""Denoising traces as one animated web page, which needs no network, no library and no server."""

import itertools
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from diffusionlm import templates
from diffusionlm.errors import UserError
from diffusionlm.pretrained import terminal
from diffusionlm.pretrained.completion import Completion, Reader
from diffusionlm.sampling.state import Trace
from diffusionlm.storage import disk_path, write_atomically


@dataclass(frozen=True)
class Section:
    """A trace on the page.

    Attributes:
      title: its heading.
      before: the text before the new one.
      text: all of the text, for readers without scripts.
      trace: its states, arrays (frames, length).
      steps: the changes of each step, which are the `events` of the trace.
      note: said beside the number of its step.
    """

    title: str
    before: str
    text: str
    trace: Trace
    steps: Sequence[list[list]]
    note: str


def save_page(
    completions: Sequence[Completion], tokenizer: Reader, path: str | os.PathLike, *, ends: Collection[int] = ()
) -> None:
    """Write an animated page of the completions' traces, one section each; the file is there whole or not at all.

    Args:
      completions: generated with `trace=True`.
      tokenizer: the model's tokenizer.
      path: the page's file; its directory must exist, and a file that is there is replaced.
      ends: the ids that end a text; the first is shown as a mark, and what is behind it as no part of the text.

    Raises:
      UserError: no completions, one without a trace, or a path that cannot be written.
    """
    if not completions:
        raise UserError("no completions to show; give at least one")
    if any(completion.trace is None for completion in completions):
        raise UserError("a completion has no trace to show; generate with trace=True")
    check_page_path(path)
    sections = [section_of(i, completion) for i, completion in enumerate(completions, start=1)]
    content = page(sections, tokenizer, ends=ends).encode("ascii", "xmlcharrefreplace")
    target = Path(os.path.realpath(path))  # a link stays a link
    try:
        write_atomically(target, content)
    except OSError as error:
        raise UserError(f"cannot write html={str(path)!r}: {error.strerror}") from error


def page(sections: Sequence[Section], tokenizer: Reader, *, ends: Collection[int], beside: bool = False) -> str:
    """Return an animated page of traces; `beside`: in columns, where there is room."""
    data = page_data(sections, tokenizer, ends=ends, beside=beside)
    texts = [section.text for section in sections]
    return _environment().get_template("denoising.html").render(texts=texts, data=data)


def player() -> dict[str, str]:
    """Return what plays the `page_data` in another page: its controls as HTML, a style sheet and a script.

    The controls and an element of the class "sections" belong into one of the class "denoising", which the function
    `denoisingPlayer` of the script takes.
    """
    names = {"controls": "denoising_controls.html", "style": "denoising.css", "script": "denoising.js"}
    return {name: _environment().get_template(file).render() for name, file in names.items()}


def page_data(
    sections: Sequence[Section], tokenizer: Reader, *, ends: Collection[int], beside: bool = False
) -> dict[str, Any]:
    """Return the traces as the script of the page reads them, in JSON types."""
    ids = np.array(sorted(set().union(*(_ids(section) for section in sections))), np.int32)
    return {
        "texts": {
            str(token): text for token, text in zip(ids.tolist(), terminal.single_texts(ids, tokenizer), strict=True)
        },
        "sections": [_section_data(section, tokenizer) for section in sections],
        "ends": sorted(ends),
        "beside": beside,
    }


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
    states = [state(trace, i) for i in range(len(trace.tokens))]
    return [changes(before, after) for before, after in itertools.pairwise(states)]


def state(trace: Trace, frame: int) -> Trace:
    """Return one state of a row, arrays (length,), from a trace of arrays (frames, length)."""
    confidence = None if trace.confidence is None else trace.confidence[frame]
    return Trace(trace.tokens[frame], trace.masked[frame], confidence)


def changes(before: Trace, after: Trace) -> list[list]:
    """List what a step changes, as one of the `events`, from the states around it, arrays (length,)."""
    masked_N, tokens_N = after.masked, after.tokens
    changed_N = (masked_N != before.masked) | (~masked_N & (tokens_N != before.tokens))
    return [
        [n] if masked_N[n] else [n, int(tokens_N[n]), _confidence(after, n)] for n in np.flatnonzero(changed_N).tolist()
    ]


def _confidence(state: Trace, position: int) -> float | None:
    if state.confidence is None or state.confidence[position] == 0:
        return None
    return round(float(state.confidence[position]), 3)


def section_of(number: int, completion: Completion) -> Section:
    """Return the section of a completion that has a trace."""
    trace = completion.trace
    assert trace is not None
    note = f"{completion.nfe} forward passes, its batch took {completion.seconds:.2f} s"
    return Section(f"Text {number}", completion.before, completion.full_text, trace, events(trace), note)


def _ids(section: Section) -> set[int]:
    """Return the ids that are seen in any state."""
    given = section.trace.tokens[0][~section.trace.masked[0]].tolist()
    return {*given, *(change[1] for step in section.steps for change in step if len(change) > 1)}


def _section_data(section: Section, tokenizer: Reader) -> dict[str, Any]:
    trace = section.trace
    return {
        "title": section.title,
        "prompt": section.before,
        "note": section.note,
        "given": np.where(trace.masked[0], -1, trace.tokens[0]).tolist(),  # ids, -1 where it starts as a mask
        "steps": section.steps,
        "characters": terminal.characters(np.asarray(trace.tokens[-1]), tokenizer),
    }


def _environment() -> Environment:
    environment = templates.environment("diffusionlm.pretrained")
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment
