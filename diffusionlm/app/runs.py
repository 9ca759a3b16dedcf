"""Generations that are being watched: the states that they went through so far."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from diffusionlm.app.settings import in_words
from diffusionlm.pretrained.completion import Draft
from diffusionlm.pretrained.mask_notation import split_at_gaps
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.pretrained.webpage import Section, changes
from diffusionlm.sampling.canvas import Span
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.state import Trace

PAUSE = 0.1  # seconds between two views of a generation: a page is not drawn more often than one can see


@dataclass
class Run:
    """A generation.

    Attributes:
      title: names it on the page.
      before: the text before the new one.
      sampling: its settings.
      drafts: the states that are still to come.
      states: those that it went through.
      rows: the same as arrays (length,).
      steps: what changed from each state to the next, for the page.
      ended: whether it has no more of them.
    """

    title: str
    before: str
    sampling: SamplingConfig
    drafts: Iterator[Draft]
    states: list[Draft] = field(default_factory=list)
    rows: list[Trace] = field(default_factory=list)
    steps: list[list[list]] = field(default_factory=list)
    ended: bool = False

    def advance(self) -> None:
        """Go on by one state, if there is one."""
        draft = next(self.drafts, None)
        if draft is None:
            self.ended = True
            return
        row = Trace(
            np.array(draft.tokens, np.int32), np.array(draft.masked, bool), np.array(draft.confidence, np.float32)
        )
        if self.rows:
            self.steps.append(changes(self.rows[-1], row))
        self.states.append(draft)
        self.rows.append(row)

    @property
    def text(self) -> str:
        """The new text so far."""
        return self.states[-1].text if self.states else ""

    def section(self) -> Section:
        """Return the states so far, of which there is one at least, as a part of a page."""
        trace = Trace(*(np.stack(rows) for rows in zip(*self.rows, strict=True)))
        text = self.before + self.text
        return Section(self.title, self.before, text, trace, list(self.steps), in_words(self.sampling))


def watch(runs: Sequence[Run]) -> Iterator[bool]:
    """Advance several runs in turn; after each round yield whether it is time to show them."""
    shown = -math.inf
    while not all(run.ended for run in runs):
        for run in runs:
            if not run.ended:
                run.advance()
        due = time.monotonic() - shown >= PAUSE
        yield due
        if due:
            shown = time.monotonic()  # after the view is drawn, which may take longer than the pause


def infill_drafts(model: LoadedModel, text: str, sampling: SamplingConfig) -> Iterable[Draft]:
    """Yield the states of a text whose gaps are filled.

    Gaps that may have several lengths are filled in all of them as one batch, so their states come all at once when the
    best is known.
    """
    parts = split_at_gaps(text, model.config.max_length)
    if all(part.least == part.most for part in parts if isinstance(part, Span)):
        yield from model.stream_infill(text, sampling)
        return
    (completion,) = model.infill(text, sampling, trace=True)
    trace = completion.trace
    assert trace is not None and trace.confidence is not None  # as asked for
    for i, (tokens, masked, confidence) in enumerate(zip(trace.tokens, trace.masked, trace.confidence, strict=True)):
        text = completion.text if i == len(trace.tokens) - 1 else ""
        yield Draft(i, tokens.tolist(), masked.tolist(), confidence.tolist(), text)
