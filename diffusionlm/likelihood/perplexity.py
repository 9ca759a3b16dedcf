"""Perplexity of documents, which may be longer than the context."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffusionlm.errors import UserError
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.monte_carlo import Estimate, estimate
from diffusionlm.likelihood.pairs import Pair
from diffusionlm.model.spec import ModelSpec
from diffusionlm.scalars import is_whole, native
from diffusionlm.tree_types import Params


@dataclass(frozen=True)
class Perplexity:
    """The cost of documents under a model; every token but the first of a document is scored.

    Attributes:
      documents: the log-likelihood of each; of a masked diffusion model, a lower bound of it.
      tokens: scored tokens of each.
      n_bytes: bytes of each; None where they are not known.
    """

    documents: list[Estimate]
    tokens: list[int]
    n_bytes: list[int] | None = None

    @property
    def nats(self) -> float:
        """Negative log-likelihood of all documents together; of a masked diffusion model, an upper bound of it."""
        return -math.fsum(document.log_likelihood for document in self.documents)

    @property
    def stderr(self) -> float:
        """Standard error of `nats` over documents, given the number of tokens; nan for a single document.

        It is that of a ratio, nats per token, times the tokens (Cochran, Sampling Techniques, section 2.11). Noise of
        the estimates is part of it.
        """
        D = len(self.documents)
        if D < 2:
            return math.nan
        pairs = zip(self.documents, self.tokens, strict=True)
        residuals = [-document.log_likelihood - self.nats_per_token * n for document, n in pairs]
        return math.sqrt(D / (D - 1) * math.fsum(x * x for x in residuals))

    @property
    def estimate_stderr(self) -> float:
        """Standard error of `nats` for exactly these documents: the noise of the estimates alone; 0 where exact."""
        return math.sqrt(math.fsum(document.stderr**2 for document in self.documents))

    @property
    def nats_per_token(self) -> float:
        """Nats per scored token; to get its standard errors, divide those of `nats` by the number of scored tokens."""
        return self.nats / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """The exponential of the nats per scored token."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text, which are comparable between tokenizers; None where bytes are not known."""
        return None if self.n_bytes is None else self.nats / math.log(2) / sum(self.n_bytes)


def perplexity(
    params: Params,
    cfg: ModelSpec,
    documents: Sequence[Sequence[int]],
    settings: LikelihoodConfig | None = None,
    *,
    stride: int | None = None,
    given: int = 1,
    n_bytes: Sequence[int] | None = None,
    request_ids: Sequence[int] | None = None,
    watch: Callable[[float], None] | None = None,
) -> Perplexity:
    """Score documents of any length, in overlapping windows where one does not fit into the context.

    Args:
      params: the parameters of `Transformer(cfg.model)`; for a mesh, call this under `jax.set_mesh`.
      cfg: the model.
      documents: token ids, each from its start token on.
      settings: the settings of each window's estimate; None: the defaults.
      stride: tokens by which a window advances: fewer give each token more context, and take more time; None: half of
        the context.
      given: the tokens at the start of each document that are given and not scored: 1, its start token, or 0, which
        only a masked diffusion model whose tokens are predicted at their own places can do.
      n_bytes: bytes of the scored text of each document, for bits per byte.
      request_ids: an integer for each window of the documents in turn, which keys its noise; None: its index.
      watch: called with the share that is done, as in `estimate`.

    Raises:
      UserError: a setting without meaning, nothing to score, or a token that the model cannot score.
    """
    documents = [list(document) for document in documents]
    if not any(len(document) > given for document in documents):
        raise UserError("no document has a token after those that are given; there is nothing to score")
    if empty := [d for d, document in enumerate(documents) if len(document) < given]:
        raise UserError(f"document {empty[0]} is empty; it needs at least its start token")
    if n_bytes is not None and (len(n_bytes) != len(documents) or min(n_bytes) < 0 or not sum(n_bytes)):
        raise UserError(f"n_bytes={list(n_bytes)!r} must have the bytes of each of the {len(documents)} documents")
    windows = [rolling_windows(document, cfg.max_length, stride, given) for document in documents]
    pairs = [pair for pairs in windows for pair in pairs]
    settings = settings or LikelihoodConfig()
    estimates = iter(estimate(params, cfg, pairs, settings, request_ids=request_ids, watch=watch))
    return Perplexity(
        [_sum([next(estimates) for _ in pairs]) for pairs in windows],
        [len(document) - given for document in documents],
        None if n_bytes is None else list(n_bytes),
    )


def _sum(parts: Sequence[Estimate]) -> Estimate:
    """Add up independent estimates."""
    return Estimate(
        math.fsum(part.log_likelihood for part in parts),
        math.sqrt(math.fsum(part.stderr**2 for part in parts)),
        min((part.passes for part in parts), default=1),
        sum(part.nfe for part in parts),
    )


def rolling_windows(tokens: Sequence[int], context: int, stride: int | None = None, given: int = 1) -> list[Pair]:
    """Cut a document into (prefix, target) pairs in which every token but the given ones is scored once.

    The first window scores all that fits after the given tokens; each later one scores up to `stride` tokens, given as
    many tokens before them as fit.

    Args:
      tokens: the document, from its start token on.
      context: most tokens of prefix and target together.
      stride: most tokens that a window after the first scores, at most context - 1; None: half of the context.
      given: the tokens at its start that are not scored, as in `perplexity`.
    """
    stride = max(1, context // 2) if stride is None else native(stride)
    if not is_whole(stride) or not 1 <= stride < context:
        raise UserError(f"stride={stride} must lie in [1, {context - 1}], below the model's context of {context}")
    tokens = list(tokens)
    starts = [given, *range(context, len(tokens), stride)]
    pairs = []
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        if start < end:
            pairs.append((tokens[max(0, end - context) : start], tokens[start:end]))
    return pairs
