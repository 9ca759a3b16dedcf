"""Completions of texts, and what is reported of them."""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.state import Trace


class Reader(Protocol):
    """A tokenizer, as far as it is needed to show tokens."""

    def decode(self, ids: Sequence[int], *, inside: bool = False) -> str:
        """Return the text of ids; `inside`: the text continues another."""
        ...


@dataclass(frozen=True)
class MaskFree:
    """A tokenizer for which a predicted mask is no text.

    A model whose reference lets it predict its mask may do so, and the id of the mask may have stood for a text before.
    """

    tokenizer: Reader
    mask_id: int | None

    def decode(self, ids: Sequence[int], *, inside: bool = False) -> str:
        """Return the text of ids; `inside`: the text continues another."""
        return self.tokenizer.decode([i for i in ids if i != self.mask_id], inside=inside)


@dataclass(frozen=True)
class Completion:
    """The result for one prompt, or for one text with gaps.

    Attributes:
      prompt: the prompt, or the text with its gaps.
      text: the new text, up to the end-of-text token if there is one; of a text with gaps, all of it, gaps filled.
      tokens: all new ids, also those after the end of the text; of a text with gaps, all ids of its row.
      nfe: forward passes that this row needed.
      seconds: wall time of the batch it was generated in, without compilation.
      trace: the states of `tokens` as arrays (frames, length), if asked for.
      infilled: whether the prompt is a text with gaps.
      mask_tokens: how many of the tokens are the mask, which a model may predict where its reference lets it; they are
        no text.
      templated: whether the model's chat template wrote something around the prompt, so that the text answers it.
      reader: the tokenizer, with which a notebook shows the tokens.
      ends: the ids that end a text.
    """

    prompt: str
    text: str
    tokens: list[int] = dataclasses.field(repr=False)
    nfe: int
    seconds: float
    trace: Trace | None = dataclasses.field(default=None, repr=False)  # arrays would fill pages
    infilled: bool = False
    templated: bool = False
    mask_tokens: int = 0
    reader: Reader | None = dataclasses.field(default=None, repr=False, compare=False)
    ends: Collection[int] = dataclasses.field(default=(), repr=False, compare=False)

    @property
    def before(self) -> str:
        """The text before the new one; an answer is set off from its question."""
        return "" if self.infilled else self.prompt + "\n\n" * self.templated

    @property
    def full_text(self) -> str:
        """The prompt with the text that was generated after it or in its gaps."""
        return self.before + self.text

    def _repr_html_(self) -> str:
        from diffusionlm.pretrained import display  # which imports this module

        return display.completion_html(self)


@dataclass(frozen=True)
class Draft:
    """A completion that is being denoised.

    Attributes:
      step: the number of steps that led to it.
      tokens: the new ids, with the mask id where a token is masked; of a text with gaps, all ids of its row.
      masked: whether each token is masked.
      confidence: the probability of each revealed token when it was revealed, in the distribution that the setting
        `confidence` names; 0 where it is not known.
      text: the text of the tokens before the first one that is masked or ends the text; of a text with gaps, all of it,
        with what is revealed in the gaps.
    """

    step: int
    tokens: list[int]
    masked: list[bool]
    confidence: list[float]
    text: str


def row_trace(trace: Trace | None, r: int, length: int) -> Trace | None:
    """Return the states of one row of a batch, up to the last that differs from the one before."""
    if trace is None:
        return None
    row = Trace(*(states[:, r, :length] for states in trace if states is not None))
    changed = (row.tokens[1:] != row.tokens[:-1]).any(-1) | (row.masked[1:] != row.masked[:-1]).any(-1)
    frames = int(changed.nonzero()[0].max(initial=-1)) + 2
    return Trace(*(states[:frames] for states in row if states is not None))


def token_agreement(some: Sequence[Completion], others: Sequence[Completion]) -> float:
    """Return the share of tokens that two lists of completions of the same texts have in common, place by place."""
    pairs = [pair for a, b in zip(some, others, strict=True) for pair in zip(a.tokens, b.tokens, strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def completions_json(completions: Sequence[Completion], sampling: SamplingConfig) -> dict[str, Any]:
    """Return what `diffusionlm sample --json` prints: {"completions": [...], "config": the settings}, in JSON types."""
    keys = ("prompt", "text", "tokens", "nfe", "seconds", "mask_tokens")
    return {
        "completions": [{key: getattr(completion, key) for key in keys} for completion in completions],
        "config": dataclasses.asdict(sampling),
    }
