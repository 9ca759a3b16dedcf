"""A generation that is watched: drawing it costs little beside it, and what is drawn is its trace."""

from types import SimpleNamespace

import numpy as np

from diffusionlm.app import runs
from diffusionlm.app import session as work
from diffusionlm.app.runs import Run, watch
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.pretrained import webpage
from diffusionlm.pretrained.completion import Draft
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.state import Trace

MASK_ID, EOS = 300, 256
MODEL = SimpleNamespace(reader=ByteTokenizer(), config=SimpleNamespace(eos_ids=(EOS,)))
# The ids of a row in its states, of which some are masked again and some replaced.
ROWS = np.array(
    [
        [97, 300, 300, 300],
        [97, 300, 99, 300],
        [97, 98, 300, 300],
        [97, 98, 100, 300],
        [97, 101, 100, EOS],
    ],
    np.int32,
)
CONFIDENCE = np.array([[0, 0, 0, 0], [0, 0, 0.5, 0], [0, 0.25, 0, 0], [0, 0.25, 0.125, 0], [0, 0.75, 0.125, 0]])


def a_run() -> Run:
    drafts = (
        Draft(i, row.tolist(), (row == MASK_ID).tolist(), sure.tolist(), "")
        for i, (row, sure) in enumerate(zip(ROWS, CONFIDENCE, strict=True))
    )
    return Run("title", "before", SamplingConfig(), drafts)


def test_each_view_shows_the_changes_so_far():
    """The changes are written down here by hand."""
    expected = [[[2, 99, 0.5]], [[1, 98, 0.25], [2]], [[2, 100, 0.125]], [[1, 101, 0.75], [3, EOS, None]]]
    run = a_run()
    for i in range(len(ROWS)):
        run.advance()
        data = work.page_data(MODEL, [run])
        (section,) = data["sections"]
        assert section["given"] == [97, -1, -1, -1] and section["steps"] == expected[:i]
        seen = {97} | {id for step in expected[:i] for _, *change in step for id in change[:1]}
        assert data["texts"].keys() == {str(id) for id in seen}
    trace = run.section().trace
    assert (trace.tokens == ROWS).all() and (trace.masked == (ROWS == MASK_ID)).all()
    assert (trace.confidence == CONFIDENCE).all()
    assert webpage.events(Trace(ROWS, ROWS == MASK_ID, CONFIDENCE)) == expected


def test_a_step_is_compared_once_however_often_it_is_drawn(monkeypatch):
    """Drawing all steps anew in each view would cost more than generating them."""
    compared = []

    def counting(before, after):
        compared.append(after)
        return webpage.changes(before, after)

    monkeypatch.setattr(runs, "PAUSE", 0.0)
    monkeypatch.setattr(runs, "changes", counting)
    monkeypatch.setattr(webpage, "events", None)
    run = a_run()
    for _ in watch([run]):
        work.page_data(MODEL, [run])
    assert len(compared) == len(ROWS) - 1


def test_a_view_that_is_slow_to_draw_is_not_drawn_at_every_step(monkeypatch):
    """A step takes 0.03 s and a view 1 s, on a clock of the test: the pause passes between two views."""
    clock = SimpleNamespace(now=5.0)
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(runs, "PAUSE", 0.1)
    drawn = []
    run = Run("title", "", SamplingConfig(), iter([Draft(i, [97], [False], [0.0], "") for i in range(21)]))
    for due in watch([run]):
        clock.now += 0.03
        if due and not run.ended:
            drawn.append(run.states[-1].step)
            clock.now += 1.0
    assert drawn == [0, 5, 10, 15, 20]
