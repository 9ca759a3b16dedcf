"""What a notebook shows of a model and of a completion: every token, and texts as they are."""

import dataclasses
import html
import re

import pytest

from diffusionlm.console import KEPT
from diffusionlm.pretrained.completion import Completion
from diffusionlm.untrusted import printable


def text_of(page):
    """Return the text that a reader sees, without the animation."""
    return html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<iframe.*?</iframe>", "", page, flags=re.DOTALL)))


@pytest.mark.parametrize("prompt", ["", "<b>He said & "])
def test_every_token_of_a_completion_is_shown(model, prompt):
    (completion,) = model.generate(prompt, length=8)
    page = completion._repr_html_()
    assert text_of(page).startswith(printable(completion.full_text, KEPT))
    assert f"{completion.nfe} forward passes" in page and "<iframe" not in page
    spans = re.findall(r'<span title="token (\d+)"', page)
    assert spans and set(map(int, spans)) <= set(completion.tokens)


def test_nothing_behind_the_end_of_a_text_is_shown(model):
    reader = model.reader
    completion = Completion("", "ab", [*map(ord, "ab"), model.sidecar.eos_id, *map(ord, "cd")], 5, 0.1, reader=reader)
    assert text_of(completion._repr_html_()).startswith("ab5 forward") and "cd" not in completion._repr_html_()


@pytest.mark.slow
def test_a_trace_is_shown_as_an_animation_of_its_own(model):
    (completion,) = model.infill("a {mask:4} b", trace=True)
    page = completion._repr_html_()
    (frame,) = re.findall(r'srcdoc="([^"]*)"', page)
    assert html.unescape(frame).startswith("<!DOCTYPE html>") and "<script" not in page
    assert text_of(page).startswith(completion.text[:2])


def test_a_completion_without_a_reader_is_its_text():
    page = Completion("<Hi>", " <Yo>", [5, 6], 8, 0.5)._repr_html_()
    assert text_of(page).startswith("<Hi> <Yo>") and "<Yo>" not in page


def test_a_model_is_a_table(model):
    page = model._repr_html_()
    assert "masked diffusion (mdm)" in page and f"{model.config.max_length} tokens" in page
    assert "<td" in dataclasses.replace(model, tokenizer=None)._repr_html_()
