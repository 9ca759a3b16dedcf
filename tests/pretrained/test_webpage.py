"""The web page is complete, and written atomically."""

import contextlib
import dataclasses
import errno
import json
import os
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from support.browser import browser
from support.random_params import draw_params

from diffusionlm import storage
from diffusionlm.config import Config, ModelConfig
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.errors import UserError
from diffusionlm.model.spec import ModelSpec
from diffusionlm.pretrained.completion import Completion
from diffusionlm.pretrained.webpage import check_page_path, save_page
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import generate
from diffusionlm.sampling.state import Trace

MASK_ID = 300
MODEL = ModelConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, vocab_size=257, max_length=64)


class Words:
    """A tokenizer of a few texts, some of which mean something to a browser."""

    words = ["a", "</script>", "<b>", " & <!--", "\n", "", "\"'\\", "\u2028", "]]>"]

    def decode(self, ids, inside=False):
        return "".join(self.words[i] for i in ids)


class Page(HTMLParser):
    """Every element with its attributes, and the text inside the paragraphs of the sections and inside each script."""

    def __init__(self, source: str):
        super().__init__()
        self.elements, self.texts, self.scripts, self._into = [], [], [], None
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        kept = {"script": self.scripts, "p": self.texts if ("class", "text") in attrs else None}.get(tag)
        if kept is not None:
            kept.append("")
            self._into = kept

    def handle_endtag(self, tag):
        if tag in ("script", "p"):
            self._into = None

    def handle_data(self, data):
        if self._into is not None:
            self._into[-1] += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def completion(final: list[int], left: list[set[int]], prompt: str = "> ", **changes) -> Completion:
    """One whose positions in `left[i]` are masks in frame i."""
    masked = np.array([[n in positions for n in range(len(final))] for positions in left])
    trace = Trace(np.where(masked, MASK_ID, final), masked, np.where(masked, 0, 0.5).astype(np.float32))
    return dataclasses.replace(Completion(prompt, "text", final, len(left) - 1, 0.25, trace), **changes)


def saved(path, completions, tokenizer, **options) -> Page:
    save_page(completions, tokenizer, path, **options)
    return Page(path.read_text(encoding="utf-8"))


def state(section: dict, step: int) -> tuple[list, list, list]:
    """Ids, masks and confidences after so many steps, by going through all events one by one; no id for a mask."""
    ids = [None if token < 0 else token for token in section["given"]]
    confidence = [0.0] * len(ids)
    for changes in section["steps"][:step]:
        for position, *revealed in changes:
            ids[position], confidence[position] = revealed if revealed else (None, 0.0)
    return ids, [token is None for token in ids], confidence


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["remdm", "low_confidence"])
def test_the_events_give_every_state_of_the_trace(strategy, tmp_path):
    params = draw_params(MODEL)
    sampling = SamplingConfig(length=24, steps=16, strategy=strategy, remask=0.3, seed=1)
    spec = ModelSpec.of(Config(model=MODEL))
    result = generate(params, spec, [[1, 2], [7]], sampling, trace=True)
    completions = [
        Completion("p", "t", [], int(nfe), 1.0, Trace(*(states[: nfe + 1, r] for states in result.trace)))
        for r, nfe in enumerate(result.nfe)
    ]
    sections = saved(tmp_path / "page.html", completions, ByteTokenizer()).data["sections"]
    taken_back = 0
    for section, one in zip(sections, completions, strict=True):
        trace = one.trace
        assert len(section["steps"]) == len(trace.tokens) - 1 and f"{one.nfe} forward passes" in section["note"]
        for i in range(len(trace.tokens)):
            ids, masked, confidence = state(section, i)
            assert masked == trace.masked[i].tolist()
            shown = ~trace.masked[i]
            assert np.array(ids)[shown].tolist() == trace.tokens[i][shown].tolist()
            np.testing.assert_allclose(confidence, trace.confidence[i], atol=5.1e-4)
        taken_back += (trace.masked[1:] & ~trace.masked[:-1]).sum()
    assert (taken_back > 0) == (strategy == "remdm")


def test_a_page_has_a_section_a_text_and_needs_nothing_else(tmp_path):
    two = [completion([0, 0], [{0, 1}, {1}, set()]), completion([0], [{0}, set()])]
    page = saved(tmp_path / "page.html", two, Words())
    assert [tag for tag, _ in page.elements].count("section") == len(page.data["sections"]) == 2
    assert not {name for _, attrs in page.elements for name in attrs} & {"src", "href", "srcset", "action"}
    assert not {tag for tag, _ in page.elements} & {"link", "img", "iframe", "base", "object"}
    source = (tmp_path / "page.html").read_text()
    assert "://" not in source and "url(" not in source and "@import" not in source
    policy = next(attrs for tag, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy["content"]


def test_whoever_uses_the_page_finds_names_and_may_refuse_motion(tmp_path):
    page = saved(tmp_path / "page.html", [completion([0], [{0}, set()])], Words())
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert sorted(ids) == ["data", "play", "shown", "speed", "step"]
    assert all(f'"{name}"' in page.scripts[1] for name in ids)
    assert ("html", {"lang": "en"}) in page.elements
    assert all(attrs["aria-label"] for tag, attrs in page.elements if tag == "section")
    source = (tmp_path / "page.html").read_text()
    assert "prefers-reduced-motion: no-preference" in source and "prefers-reduced-motion: reduce" in page.scripts[1]
    assert "color-scheme: light dark" in source


def test_no_text_can_break_out_of_the_page(tmp_path):
    words = list(range(len(Words.words)))
    bare = saved(tmp_path / "bare.html", [completion([0], [{0}, set()], prompt="")], Words())
    nasty = completion(words, [set(words), set()], prompt="</script><script>alert(1)</script><i>&amp;\u00e9")
    page = saved(tmp_path / "page.html", [dataclasses.replace(nasty, text="".join(Words.words))], Words())
    assert page.elements == bare.elements  # no text became an element
    assert page.texts == [nasty.prompt + "".join(Words.words)]
    assert page.data["sections"][0]["prompt"] == nasty.prompt
    assert [page.data["texts"][str(n)] for n in words] == Words.words
    assert len(page.scripts) == 2 and "<" not in page.scripts[0]


def test_of_a_text_with_gaps_all_is_position_and_what_was_given_is_no_event(tmp_path):
    filled = completion([0, 2, 0], [{1}, set()], prompt="a{mask:1}a", text="a<b>a", infilled=True)
    page = saved(tmp_path / "page.html", [filled], Words())
    section = page.data["sections"][0]
    assert (section["prompt"], section["given"], section["steps"]) == ("", [0, -1, 0], [[[1, 2, 0.5]]])
    assert page.texts == ["a<b>a"]


def test_the_page_knows_what_ends_a_text(tmp_path):
    page = saved(tmp_path / "page.html", [completion([0, 5, 0], [{0, 1, 2}, set()])], Words(), ends=(5,))
    assert page.data["ends"] == [5]


@pytest.mark.slow
def test_a_browser_marks_the_end_and_crosses_out_what_is_behind_it(tmp_path):
    """The first position is given; 4 ends the text in step 1, and 2 in step 3. A gap behind a given token is text."""
    end = 5
    final, left = [0, 0, end, 3, end, 0, 0, 0], [{1, 2, 3, 4, 5, 7}, {1, 2, 3, 5, 7}, {2, 3}, set()]
    save_page([completion(final, left, infilled=True)], Words(), path := tmp_path / "page.html", ends=(end,))
    with browser() as started:
        page = started.new_page(reduced_motion="reduce")
        page.goto(path.as_uri())
        spans = page.locator(".text span:not(.prompt)")

        def state(step):
            page.locator("#step").fill(str(step))
            texts, classes = spans.all_inner_texts(), [span.get_attribute("class").split() for span in spans.all()]
            return texts, [
                "".join(sorted({"end": "e", "behind": "b", "mask": "m"}.get(c, "") for c in names)) for names in classes
            ]

        assert state(0)[1] == ["", "m", "m", "m", "m", "m", "", "m"]
        assert state(1)[1] == ["", "m", "m", "m", "e", "bm", "", "m"] and state(1)[0][4] == "\u27e8eos\u27e9"
        assert state(2)[1] == ["", "", "m", "m", "e", "b", "", ""]
        texts, kinds = state(3)
        assert kinds == ["", "", "e", "b", "b", "b", "", ""] and texts[2] == "\u27e8eos\u27e9" and texts[4] == ""
        crossed_out = spans.nth(5).evaluate("e => getComputedStyle(e).textDecorationLine")
        assert crossed_out == "line-through" and spans.nth(4).bounding_box()["width"] > 1


def test_a_character_of_several_tokens_is_one(tmp_path):
    final = list("aéb€".encode())
    page = saved(tmp_path / "page.html", [completion(final, [set(range(7)), set()])], ByteTokenizer())
    assert page.data["sections"][0]["characters"] == [[1, 2, "é"], [4, 3, "€"]]
    assert page.data["texts"]["195"] == "\ufffd"


def test_a_confidence_that_is_not_known_is_null(tmp_path):
    known = completion([0, 0], [{0, 1}, set()])
    filled_up = known.trace._replace(confidence=np.array([[0, 0], [0.25, 0]], np.float32))
    without = known.trace._replace(confidence=None)
    traces = [dataclasses.replace(known, trace=trace) for trace in (filled_up, without)]
    sections = saved(tmp_path / "page.html", traces, Words()).data["sections"]
    assert [section["steps"][0] for section in sections] == [[[0, 0, 0.25], [1, 0, None]], [[0, 0, None], [1, 0, None]]]


@pytest.mark.parametrize("fails", ["write", "replace"])
def test_a_full_disk_leaves_the_old_page_and_nothing_else(fails, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("the old page")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    @contextlib.contextmanager
    def opened(*args, **options):
        with open(*args, **options) as file:
            file.write(b"a part")
            yield SimpleNamespace(write=full)

    monkeypatch.setattr(*{"write": (storage, "open", opened), "replace": (os, "replace", full)}[fails], raising=False)
    with pytest.raises(UserError, match="cannot write html='.*page.html': No space left on device"):
        save_page([completion([0], [{0}, set()])], Words(), path)
    assert path.read_text() == "the old page" and os.listdir(tmp_path) == ["page.html"]


def test_a_page_replaces_the_one_before(tmp_path):
    path = tmp_path / "page.html"
    for prompt in ("first", "second"):
        page = saved(path, [completion([0], [{0}, set()], prompt=prompt)], Words())
    assert page.data["sections"][0]["prompt"] == "second" and os.listdir(tmp_path) == ["page.html"]


def test_a_link_stays_and_its_file_becomes_the_page(tmp_path):
    for directory in ("here", "there"):
        (tmp_path / directory).mkdir()
    (tmp_path / "there" / "page.html").write_text("the old page")
    link = tmp_path / "here" / "link.html"
    link.symlink_to(tmp_path / "there" / "page.html")
    saved(link, [completion([0], [{0}, set()])], Words())
    assert link.is_symlink() and (tmp_path / "there" / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert os.listdir(tmp_path / "there") == ["page.html"]


@pytest.mark.parametrize(
    "name, parts",
    [
        ("none/page.html", ["none/page.html", "does not exist"]),
        ("", ["is not a file", "trace.html"]),
        ("file/page.html", ["file", "is a file"]),
    ],
)
def test_a_path_that_cannot_be_written_is_refused(name, parts, tmp_path):
    (tmp_path / "file").write_text("")
    for refuse in (check_page_path, lambda path: save_page([completion([0], [{0}, set()])], Words(), path)):
        with pytest.raises(UserError) as caught:
            refuse(f"{tmp_path}/{name}")
        assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["file"]


def test_what_has_no_trace_is_refused(tmp_path):
    with pytest.raises(UserError, match="trace=True"):
        save_page([completion([0], [{0}, set()], trace=None)], Words(), tmp_path / "page.html")
    with pytest.raises(UserError, match="no completions"):
        save_page([], Words(), tmp_path / "page.html")
    assert os.listdir(tmp_path) == []
