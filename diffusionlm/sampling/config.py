"""The settings of a generation.

This module imports no JAX, so that the command line can show its help at once.
"""

import dataclasses
from dataclasses import dataclass

from diffusionlm.errors import UserError, suggest
from diffusionlm.scalars import NativeScalars, is_real, is_whole

CACHES = ("none", "prefix", "dual", "causal")
CONFIDENCES = ("model", "drawn")
GUIDANCE_KINDS = ("unsupervised", "standard")


@dataclass(frozen=True)
class SamplingConfig(NativeScalars):
    """The settings of a generation after a prompt, or in the gaps of a text.

    `length` shapes the canvas, guidance doubles the batch, a cache is compiled for the width of its blocks, and
    `compact` for smaller batches; everything else is data to the compiled loop, so changing it does not recompile.
    """

    length: int = 64  # new tokens per prompt
    # denoising steps over all blocks; those that follow a change take a forward pass. None: one per new token
    steps: int | None = None
    # what a step reveals: ancestral, remdm, fixed_count, random, low_confidence, entropy, margin, left_to_right,
    # smdm_greedy, confidence_threshold, confidence_factor, entropy_bound; None: ancestral (autoregressive:
    # left_to_right)
    strategy: str | None = None
    temperature: float = 1.0  # of the draw of each token; 0 takes the most probable
    top_k: int = 0  # draw from the k most probable tokens only; 0: from all
    top_p: float = 1.0  # draw from the most probable tokens that make up this much probability only; 1: from all
    # new tokens per block; blocks are generated from left to right, the last may be shorter; 0: one block
    block_length: int = 0
    growing: bool = False  # a block does not see the blocks after it, not even as masks
    threshold: float = 0.9  # confidence_threshold: the least probability
    factor: float = 1.0  # confidence_factor: more reveals more
    entropy_bound: float = 0.1  # entropy_bound: nats that a step may give away
    remask: float = 0.04  # remdm: the largest probability per step with which revealed tokens become masks again
    # the probabilities that low_confidence, entropy, margin and others judge by: "model", the model's own, or "drawn",
    # those that tokens are drawn from, after temperature, top_p and then top_k, as in Dream's released code
    confidence: str = "model"
    # randomness in the choice of positions by low_confidence, entropy and margin; 0: the best first
    position_temperature: float = 0.0
    # in random, low_confidence, entropy, margin and left_to_right: 0 reveals an even share a step; else the last time
    # of the schedule int(masks (1 - s/t)), which is 0.001 in Dream
    transfer_until: float = 0.0
    guidance: float = 0.0  # scale of classifier-free guidance; 0: none
    # what guidance leads away from: "unsupervised", a masked prompt, or "standard", no prompt, for models that were
    # trained with prompts left out
    guidance_kind: str = "unsupervised"
    # keys and values that steps do not compute again: "none", "prefix" (of what comes before the block) or "dual" (of
    # all but the block); both are approximate, see `refresh`. None: none (autoregressive: "causal", which is exact)
    cache: str | None = None
    refresh: int = 0  # steps after which a cache is recomputed within a block; 0: only at its start; 1: exact
    # let rows that still have work continue in a smaller batch (not while a trace is recorded), which compiles once for
    # each power of two; a row's tokens may then differ with its batch mates where two choices are as good as equal
    compact: bool = False
    eos_penalty: float = 0.0  # nats taken off the logit of the end of text
    eos_last: bool = False  # the end of text has no confidence, so that it is revealed last
    stop_at_eos: bool = True  # a row is done once everything before its first end of text is revealed
    seed: int = 0  # the same seed gives the same tokens, whatever else is in the batch

    def validate(self) -> None:
        """Raise `UserError` for a value that has no meaning."""
        from diffusionlm.sampling.strategies import STRATEGIES  # here, because it imports JAX

        least = {"length": 1, "steps": 1, "top_k": 0, "block_length": 0, "refresh": 0, "seed": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if name == "steps" and value is None:
                continue
            if not is_whole(value) or not lowest <= value < 2**31:
                raise UserError(f"{name}={value!r} must be an integer from {lowest} to {2**31 - 1}")
        for name, lowest, highest, meaning in (
            ("temperature", 0, 1e6, "0 takes the most probable token"),
            ("position_temperature", 0, 1e6, "0 takes the best position"),
            ("threshold", 0, 1, "a probability"),
            ("remask", 0, 1, "a probability"),
            ("transfer_until", 0, 1, "0 reveals an even share a step"),
            ("factor", 0, 1e6, "more reveals more"),
            ("entropy_bound", 0, 1e6, "in nats"),
            ("guidance", 0, 1e6, "0 is none"),
            ("eos_penalty", 0, float("inf"), "in nats; inf forbids it"),
        ):
            value = getattr(self, name)
            if not is_real(value) or not lowest <= value <= highest:
                raise UserError(f"{name}={value!r} must be a number from {lowest} to {highest} ({meaning})")
        if not is_real(self.top_p) or not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p!r} must be a probability above 0, at most 1 (all tokens)")
        named = {
            "strategy": (None, *STRATEGIES),
            "cache": (None, *CACHES),
            "guidance_kind": GUIDANCE_KINDS,
            "confidence": CONFIDENCES,
        }
        for name, allowed in named.items():
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(
                    f"unknown {name} {value!r}{suggest(str(value), [choice for choice in allowed if choice])}"
                )

    def resolve(self, *, autoregressive: bool) -> "SamplingConfig":
        """Return a validated copy with the defaults of `steps`, `strategy` and `cache` for the kind of model.

        Raises:
          UserError: a value has no meaning, or asks an autoregressive model for another order than left to right, one
            token a step.
        """
        self.validate()
        strategy = self.strategy or ("left_to_right" if autoregressive else "ancestral")
        steps = self.steps or self.length
        if autoregressive and (strategy, steps) != ("left_to_right", self.length):
            settings = f"strategy={strategy}" + (f" with steps={self.steps}" if self.steps else "")
            raise UserError(
                f"{settings} needs a masked diffusion model; this one is autoregressive: leave strategy and steps "
                f"unset, or use left_to_right with steps={self.length}"
            )
        if autoregressive and self.guidance:
            raise UserError(f"guidance={self.guidance} needs a masked diffusion model, which can mask its prompt")
        cache = self.cache or ("causal" if autoregressive else "none")
        if cache != "none" and autoregressive != (cache == "causal"):
            allowed = ("causal", "none") if autoregressive else ("none", "prefix", "dual")
            kind = "an autoregressive" if autoregressive else "a masked diffusion"
            raise UserError(f"cache={cache} does not suit {kind} model; use {' or '.join(allowed)}")
        if self.refresh and cache not in ("prefix", "dual"):
            raise UserError(f"refresh={self.refresh} needs cache=prefix or cache=dual, and cache is {cache}")
        blocks = -(-self.length // self.block_length) if self.block_length else 1
        if steps < blocks:
            raise UserError(
                f"steps={steps} are fewer than the {blocks} blocks of block_length={self.block_length} in "
                f"length={self.length}; use at least one step a block"
            )
        return dataclasses.replace(self, strategy=strategy, steps=steps, cache=cache)


# The defaults of dialogues: length and blocks as in LLaDA's released chat script, greedy.
CHAT = SamplingConfig(length=128, block_length=32, temperature=0.0)
