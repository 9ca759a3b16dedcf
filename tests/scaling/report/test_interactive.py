"""The interactive plots: whole in the page, without a network, and nothing in the data can leave its string."""

import dataclasses
import re

import pytest
from support.simulated_sweep import complete

from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.report import interactive, page
from diffusionlm.scaling.report.content import to_json
from diffusionlm.scaling.sweep.points import LeftOut


@pytest.fixture(scope="module")
def elements():
    results = complete()
    wrong = dataclasses.replace(results[0], id="</script><b>\N{GREEK SMALL LETTER ALPHA}", loss=5.0)
    analysis = dataclasses.replace(analyse(results, full=False), left_out=(LeftOut(wrong, "flag outlier"),))
    return analysis, interactive.elements(analysis)


def test_scripts_are_whole_and_nothing_is_loaded(elements):
    analysis, text = elements
    assert text.isascii() and text.count("<script") == text.count("</script>") == 1
    assert not re.search(r"<(script|img|link)[^>]+(src|href)=", text)
    assert "&lt;/script&gt;&lt;b&gt;" in text
    assert len(text) < 2_000_000


def test_the_page_allows_its_own_script_only_where_it_has_one(elements):
    analysis, text = elements
    content = to_json(analysis) | {"title": "A sweep", "context": {}, "cells": 48, "about": ""}
    with_plots, without = page.render(analysis, content, {}, [], text), page.render(analysis, content, {}, [])
    assert "script-src 'unsafe-inline'" in with_plots and "Point by point" in with_plots
    assert "<script" not in without and "script-src" not in without and "Point by point" not in without
    assert "unsafe-eval" not in with_plots


def test_without_bokeh_there_are_none(monkeypatch):
    monkeypatch.setattr(interactive.importlib.util, "find_spec", lambda name: None)
    assert interactive.elements(analyse(complete()[:2], full=False)) == ""
