"""What the page asks for becomes settings and pinned words, or a mistake in one line."""

import dataclasses

import pytest
from support.tiny_pretrained import MODEL, SPEC

from diffusionlm.app.settings import SHOWN, first_settings, in_words, other_settings, parse_pins, with_shown
from diffusionlm.config import Config
from diffusionlm.errors import UserError
from diffusionlm.model.spec import ModelSpec
from diffusionlm.sampling.config import CHAT, SamplingConfig


def test_the_page_begins_as_the_command_line_does_and_fits_the_context():
    """The context of 64 leaves half for the prompt; what the user gave is taken as it is."""
    for chats, defaults in ((True, CHAT), (False, SamplingConfig())):
        start = first_settings(SPEC, chats, {"top_p": 0.5})
        assert (start.temperature, start.top_p, start.seed) == (defaults.temperature, 0.5, defaults.seed)
        assert start.length == 32 and start.strategy == ("low_confidence" if chats else "ancestral")
    assert first_settings(SPEC, False, {"length": 60}).length == 60
    causal = Config(model=dataclasses.replace(MODEL, causal=True), objective="arm")
    autoregressive = first_settings(ModelSpec.of(causal), True, {})
    assert autoregressive.resolve(autoregressive=True).strategy == "left_to_right"


def test_there_is_something_to_compare_with():
    for strategy in ("ancestral", "low_confidence", "random"):
        base = SamplingConfig(strategy=strategy, top_p=0.5)
        other = other_settings(SPEC, base)
        assert other.strategy != strategy and dataclasses.replace(other, strategy=strategy) == base
    autoregressive = ModelSpec.of(Config(model=dataclasses.replace(MODEL, causal=True), objective="arm"))
    base = SamplingConfig(strategy="left_to_right")
    assert other_settings(autoregressive, base) == dataclasses.replace(base, seed=1)


def test_the_fields_replace_the_settings_that_the_page_shows_and_no_others():
    base = SamplingConfig(top_p=0.5, seed=3)
    sampling = with_shown(base, [8.0, "random", None, 4, 0.5, 7.0])
    assert sampling == SamplingConfig(
        length=8, strategy="random", steps=None, block_length=4, temperature=0.5, seed=7, top_p=0.5
    )
    assert isinstance(sampling.length, int)


def test_no_steps_are_one_a_token():
    """An empty number of a page shows a 0."""
    for steps in (0, 0.0, None):
        sampling = with_shown(SamplingConfig(), [8, "random", steps, 4, 1, 0])
        assert sampling.resolve(autoregressive=False).steps == 8


@pytest.mark.parametrize(
    "name, value, parts",
    [
        ("steps", -1, ["steps=-1", "from 1"]),
        ("steps", 2.5, ["steps=2.5", "integer"]),
        ("seed", None, ["seed is empty", "number"]),
        ("temperature", -1, ["temperature=-1"]),
        ("strategy", "best", ["'best'"]),
    ],
)
def test_a_field_that_has_no_meaning_is_refused(name, value, parts):
    values = {"length": 8, "strategy": "random", "steps": 8, "block_length": 0, "temperature": 1, "seed": 0}
    with pytest.raises(UserError) as caught:
        with_shown(SamplingConfig(), [(values | {name: value})[field] for field in SHOWN])
    assert all(part in str(caught.value) for part in parts)


def test_pinned_words_are_read_with_their_places():
    assert parse_pins(" ") == {}
    assert parse_pins("0: Once, 5:upon a , 10: time") == {0: "Once", 5: " upon a", 10: " time"}
    assert parse_pins("3: a,, b, 7: !") == {3: " a, b", 7: "!"}


@pytest.mark.parametrize(
    "text, part",
    [("Once", "'Once'"), ("0 Once", "'0 Once'"), ("-1: x", "'-1: x'"), ("1: a, 1: b", "position 1"), ("1: a,", "''")],
)
def test_what_is_no_pinned_word_is_refused(text, part):
    with pytest.raises(UserError, match=part):
        parse_pins(text)


def test_settings_are_said_in_words():
    sampling = SamplingConfig(strategy="random", steps=8, block_length=4, temperature=0.5, seed=7)
    assert in_words(sampling) == "random, 8 steps, blocks of 4, temperature 0.5, seed 7"
    assert in_words(SamplingConfig(strategy="random")) == "random, a step a token, one block, temperature 1, seed 0"
