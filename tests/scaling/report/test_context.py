"""What a page says about the sweep that it reports."""

import json

import pytest
from support.tiny_sweep import tiny_sweep

from diffusionlm.scaling.report.context import describe

EVALUATION = {"nelbo_nats_per_token": 4.0, "nelbo_stderr": 0.1, "nelbo_per_draw": [4.0], "bits_per_byte": 2.0}
DONE = {"step": 1, "tokens": 1, "flops": 1.0, "train_loss": 4.0, "seconds": 1.0, "goodput": 1.0}


@pytest.fixture
def described(tmp_path):
    """Describes a tiny sweep of which one cell has finished with so many held-out tokens."""

    def describe_with(tokens):
        sweep = tiny_sweep()
        directory = tmp_path / "cells" / sweep.cells[0].id
        directory.mkdir(parents=True)
        done = DONE | {"eval": EVALUATION | {"tokens": tokens, "bytes": 3 * tokens}}
        (directory / "DONE.json").write_text(json.dumps(done))
        identity = {"sweep": "tiny", "dataset": "abc", "unique_tokens": 12345}
        return describe(sweep, sweep.cells, tmp_path, identity, today="2026-11-25")

    return describe_with


def test_it_says_what_was_measured(described):
    context, warnings = described(10**9)
    recipe = tiny_sweep().cells[0].recipe
    assert not warnings
    assert context["dataset"] == "sha256 abc" and context["training text"] == "12,345 different tokens"
    assert context["held-out text, scored"] == "1,000,000,000 tokens, 3,000,000,000 bytes of text"
    assert context["date of this report"] == "2026-11-25"
    text = " ".join(context.values())
    for value in (
        recipe.dtype,
        f"{recipe.peak_lr:g}",
        f"{recipe.batch_size} sequences of {recipe.sequence_length} tokens",
    ):
        assert value in text


def test_fewer_held_out_records_than_asked_for_are_named(described):
    recipe = tiny_sweep().cells[0].recipe
    _, [line] = described(3 * (recipe.sequence_length - 1))
    assert f"3 of {recipe.eval_records:,} held-out records" in line
