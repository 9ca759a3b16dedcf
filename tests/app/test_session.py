"""What a session does: it generates what the library does, stops, talks and exports; sessions do not mix."""

import dataclasses

import pytest
from support import tiny_chat
from support.slow_cases import slow

from diffusionlm.app import runs
from diffusionlm.app import session as work
from diffusionlm.app.session import Session
from diffusionlm.errors import UserError
from diffusionlm.pretrained.loading import load
from diffusionlm.sampling.config import SamplingConfig

SAMPLING = SamplingConfig(length=16, strategy="low_confidence", block_length=8, temperature=0.7, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny_chat.save(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load(tiny_chat.save(tmp_path_factory.mktemp("plain") / "model", template=None))


def last(views):
    return list(views)[-1]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("model", {"raw": True}), slow(("plain", {}))])
def test_a_text_is_that_of_the_library_with_the_same_seed(name, options, request):
    model = request.getfixturevalue(name)
    view = last(work.complete(model, Session(), "Once", "", [SAMPLING]))
    expected = model.generate("Once", SAMPLING, **options)[0]
    assert view.runs[0].text == expected.text and view.runs[0].states[-1].tokens == expected.tokens


def test_two_settings_give_what_each_gives_alone(model):
    other = SamplingConfig(length=16, strategy="random", seed=6)
    session = Session()
    both = last(work.complete(model, session, "Once", "", [SAMPLING, other])).runs
    alone = [last(work.complete(model, Session(), "Once", "", [one])).runs[0] for one in (SAMPLING, other)]
    assert [run.text for run in both] == [run.text for run in alone]
    assert [run.title for run in both] == ["Settings A", "Settings B"]
    data = work.page_data(model, session.runs)
    assert data["beside"] and [len(s["given"]) for s in data["sections"]] == [16, 16]


def test_pinned_words_stay_at_their_places(model):
    run = last(work.complete(model, Session(), "Once", "2: cat, 9: !", [SAMPLING])).runs[0]
    for draft in run.states:
        assert bytes(draft.tokens[2:6]) == b" cat" and not any(draft.masked[2:6])
        assert bytes(draft.tokens[9:10]) == b"!"
    assert not any(run.states[-1].masked) and sum(run.states[0].masked) == 16 - 5


@pytest.mark.slow
@pytest.mark.parametrize("text", ["Tom{mask:6} ran.", "Tom{mask:2-4} ran{mask:3}"])
def test_gaps_are_filled_as_the_library_fills_them(model, text):
    view = last(work.fill(model, Session(), text, [SAMPLING]))
    expected = model.infill(text, SAMPLING)[0]
    assert view.runs[0].text == expected.text and view.runs[0].states[-1].tokens == expected.tokens


def test_a_dialogue_is_that_of_the_library(model):
    from diffusionlm.pretrained.conversation import Conversation

    session, dialogue = Session(), Conversation(model, SAMPLING, system="Be brief.")
    for text in ("Hello.", "Why?"):
        view = last(work.talk(model, session, text, "Be brief.", "", [SAMPLING]))
        assert view.turns[-1] == ("assistant", dialogue.ask(text))
    again = last(work.talk(model, session, None, "Be brief.", "", [SAMPLING]))
    assert again.turns[-1] == ("assistant", dialogue.regenerate())
    assert again.turns == [(turn.role, turn.content) for turn in dialogue.turns]


def test_dialogues_of_two_sessions_do_not_mix(model, monkeypatch):
    monkeypatch.setattr(runs, "PAUSE", 0.0)  # every state is a view, so that the two take turns
    first, second = Session(), Session()
    a = work.talk(model, first, "I am Ann.", "", "", [SAMPLING])
    b = work.talk(model, second, "I am Bob.", "", "", [SAMPLING])
    for _ in range(3):
        next(a), next(b)
    last(a), last(b)
    assert [work.turns_of(one.dialogue)[0][1] for one in (first, second)] == ["I am Ann.", "I am Bob."]
    assert len(first.dialogue.turns) == len(second.dialogue.turns) == 2


def test_a_second_setting_leaves_the_dialogue_to_the_first(model):
    session, other = Session(), SamplingConfig(length=16, strategy="random", seed=6)
    both = last(work.talk(model, session, "Hello.", "", "", [SAMPLING, other]))
    alone = last(work.talk(model, Session(), "Hello.", "", "", [SAMPLING]))
    assert both.turns == alone.turns and len(both.runs) == 2


def test_what_is_stopped_ends_at_once_and_leaves_the_dialogue_as_it_was(model):
    session = Session()
    views = work.talk(model, session, "Hello.", "", "", [SAMPLING])
    next(views)
    session.stopped = True
    view = last(views)
    assert "Stopped after" in view.message and any(session.runs[0].states[-1].masked)
    assert view.turns == [] and work.turns_of(session.dialogue) == []
    assert work.page_data(model, session.runs)["sections"][0]["steps"]


def test_an_answer_that_has_ended_is_not_kept_if_the_other_setting_is_stopped(model, monkeypatch):
    monkeypatch.setattr(runs, "PAUSE", 0.0)
    session = Session()
    last(work.talk(model, session, "Hello.", "", "", [SAMPLING]))
    dialogue, turns = session.dialogue, work.turns_of(session.dialogue)
    short = dataclasses.replace(SAMPLING, steps=2, seed=9)
    for text in ("Why?", None):
        session.stopped = False
        views = work.talk(model, session, text, "Be brief.", "", [short, SAMPLING])
        while not next(views).runs[0].ended:
            pass
        assert not session.runs[1].ended
        session.stopped = True
        view = last(views)
        assert view.stopped and view.turns == turns
        assert session.dialogue is dialogue and work.turns_of(dialogue) == turns
        assert (dialogue.sampling, dialogue.system) == (SAMPLING, None)


def test_an_answer_counts_that_was_whole_when_stop_was_pressed(model):
    """The user may press the button after the last step, whose view the page shows as the answer."""
    session = Session()
    for view in work.talk(model, session, "Hello.", "", "", [SAMPLING]):
        session.stopped = not view.message and view.runs[0].ended
    assert work.turns_of(session.dialogue) == view.turns and len(view.turns) == 2


@pytest.mark.parametrize(
    "generate, part",
    [
        (lambda model: work.complete(model, Session(), "x" * 100, "", [SAMPLING]), "context"),
        (lambda model: work.complete(model, Session(), "x", "99: far", [SAMPLING]), "position 99"),
        (lambda model: work.complete(model, Session(), "x", "1: abc, 2: d", [SAMPLING]), "lies on"),
        (lambda model: work.fill(model, Session(), "no gap", [SAMPLING]), "no gap"),
        (lambda model: work.fill(model, Session(), "{mask: 3}", [SAMPLING]), "not a gap"),
        (lambda model: work.talk(model, Session(), " ", "", "", [SAMPLING]), "empty message"),
        (lambda model: work.talk(model, Session(), None, "", "", [SAMPLING]), "no answer yet"),
    ],
)
def test_mistakes_are_those_of_the_library(model, generate, part):
    with pytest.raises(UserError, match=part):
        list(generate(model))


def test_files_of_a_trace(model, tmp_path):
    session = Session()
    with pytest.raises(UserError, match="generate a text first"):
        work.export(model, session, "html", tmp_path)
    last(work.complete(model, session, "<script>alert(1)</script>", "", [SAMPLING]))
    page, picture = (work.export(model, session, kind, tmp_path) for kind in ("html", "gif"))
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>") and "<script>alert" not in text and "low_confidence" in text
    assert picture.read_bytes().startswith(b"GIF89a") and page.parent != picture.parent


def test_messages_are_escaped():
    html = work.View(message="<b>'x'</b>", mistake=True).message_html()
    assert "<b>" not in html and "&lt;b&gt;" in html and 'role="alert"' in html


def test_a_dialogue_is_escaped():
    html = work.turns_html([("user", "<b>x</b>"), ("assistant", "a & b")])
    assert "&lt;b&gt;x&lt;/b&gt;" in html and "a &amp; b" in html and html.count("<p ") == 2
