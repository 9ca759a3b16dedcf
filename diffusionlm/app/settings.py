"""What the page asks for, as settings of a generation and as pinned words."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from diffusionlm.errors import UserError
from diffusionlm.model.spec import ModelSpec
from diffusionlm.sampling.config import CHAT, SamplingConfig
from diffusionlm.sampling.strategies import STRATEGIES

SHOWN = ("length", "strategy", "steps", "block_length", "temperature", "seed")  # the settings that the page has
_WHOLE = ("length", "steps", "block_length", "seed")
_PIN = re.compile(r"\s*(\d{1,9})\s*:\s*(\S.*?)\s*", re.DOTALL)


def first_settings(model: ModelSpec, chats: bool, given: Mapping[str, Any]) -> SamplingConfig:
    """Return the settings with which the page begins.

    Args:
      model: the model; its context has room for the new text and as much before it.
      chats: whether it answers questions, as `diffusionlm chat` then begins, or continues texts.
      given: the settings that the user gave; they replace all others.
    """
    start = CHAT if chats else SamplingConfig()
    length = max(1, min(start.length, model.max_length // 2))
    strategy = "left_to_right" if model.autoregressive else "low_confidence" if chats else "ancestral"
    block_length = 0 if model.autoregressive else min(start.block_length, length)
    start = dataclasses.replace(start, length=length, strategy=strategy, block_length=block_length)
    return dataclasses.replace(start, **given)


def other_settings(model: ModelSpec, sampling: SamplingConfig) -> SamplingConfig:
    """Return settings to compare with: another strategy, or for a model with one strategy another seed."""
    if model.autoregressive:
        return dataclasses.replace(sampling, seed=(sampling.seed + 1) % 2**31)
    strategy = "ancestral" if sampling.strategy == "low_confidence" else "low_confidence"
    return dataclasses.replace(sampling, strategy=strategy)


def strategies(model: ModelSpec) -> list[str]:
    """Return the names of the strategies that a model can have."""
    return ["left_to_right"] if model.autoregressive else list(STRATEGIES)


def with_shown(base: SamplingConfig, shown: Sequence[Any]) -> SamplingConfig:
    """Return settings with the values of the page, in the order of `SHOWN`.

    A number of the page may be a float, and an empty field is None. Steps of 0 are one for each new token, as an empty
    field shows a 0.

    Raises:
      UserError: a field is empty, or a value has no meaning.
    """
    values = dict(zip(SHOWN, shown, strict=True))
    for name, value in values.items():
        if value is None and name not in ("steps", "strategy"):
            raise UserError(f"{name} is empty; write a number")
        if name in _WHOLE and isinstance(value, float) and value.is_integer():
            values[name] = int(value)
    values["steps"] = None if values["steps"] == 0 else values["steps"]
    sampling = dataclasses.replace(base, **values)
    sampling.validate()
    return sampling


def parse_pins(text: str) -> dict[int, str]:
    """Return the words that are pinned by a text such as "0: Once, 5: upon", by their positions in tokens.

    A word is set off by a space from what is before it, unless it is at the start or begins with a mark; commas inside
    of words are written twice.

    Raises:
      UserError: a part is not a position with a word, or a position comes twice.
    """
    pins: dict[int, str] = {}
    parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    for part in parts if text.strip() else []:
        match = _PIN.fullmatch(part)
        if match is None:
            raise UserError(
                f"{part.strip()!r} is not a pinned word; write positions in tokens and words, as in 0: Once, 5: upon"
            )
        position, word = int(match[1]), match[2]
        if position in pins:
            raise UserError(f"position {position} has two pinned words, {pins[position].strip()!r} and {word!r}")
        pins[position] = f" {word}" if position and word[0].isalnum() else word
    return pins


def in_words(sampling: SamplingConfig) -> str:
    """Return the settings of the page as one line."""
    steps = f"{sampling.steps} steps" if sampling.steps else "a step a token"
    blocks = f"blocks of {sampling.block_length}" if sampling.block_length else "one block"
    return f"{sampling.strategy}, {steps}, {blocks}, temperature {sampling.temperature:g}, seed {sampling.seed}"
