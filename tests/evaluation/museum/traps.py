"""Known wrong ways of computing a likelihood, a few lines each, as methods that the certificate's checks judge.

Where a wrong way draws at random, its expectation is computed here over all sets of masks, so that the number it gives
is exact and differs from the right one by its error alone.
"""

import dataclasses
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from scipy import special
from support.released_estimators import DIFFULLAMA_DRAWS, llada_counts

from diffusionlm.evaluation.certificate.method import Count, LibraryMethod, Row, Score
from diffusionlm.evaluation.certificate.reference import Reference, below, over_orders
from diffusionlm.evaluation.certificate.value_checks import CLIPPED
from diffusionlm.likelihood.estimators import Plan, is_target, uniform_scores


class Wrong(LibraryMethod):
    """The right method, of which each trap replaces a part."""

    def __init__(self, model, settings):
        super().__init__(model, settings)
        self.reference, self.known = Reference(model), {}

    def score(self, pairs, *, ids=None, exact=False, left_to_right=False):
        if left_to_right:
            return super().score(pairs, left_to_right=True)
        return [self.wrong(*pair) for pair in pairs]

    def costs(self, prefix, target):
        key = (tuple(prefix), tuple(target))
        if key not in self.known:
            (self.known[key],) = self.reference.costs([(prefix, target)])
        return self.known[key]

    def wrong(self, prefix, target):
        raise NotImplementedError

    @property
    def eos(self):
        return self.model.config.eos_ids[0]


def counts_of(costs):
    """Return the number of masked tokens of each set."""
    return np.array([bin(s).count("1") for s in range(len(costs))])


def at_rates(costs, rate_R, t_R):
    """Return the mean over masking rates of the expected cost of the masked tokens over t."""
    c, n = counts_of(costs), len(costs[0])
    probability_RxS = rate_R[:, None] ** c * (1 - rate_R[:, None]) ** (n - c)
    return float((probability_RxS @ totals(costs) / t_R).mean())


def rate_of_cosine(t):
    """Return the rate at which the cosine schedule masks at a time, 1 - alpha(t) of docs/concepts.md."""
    return np.cos(np.pi / 2 * (1 - t))


def totals(costs):
    """Return the cost of all masked tokens of each set."""
    return costs.sum(-1)


class Unweighted(Wrong):
    """DiffuGPT's score: mean cross-entropy of the masked tokens at 32 rates, unweighted; 0 where nothing is masked."""

    def wrong(self, prefix, target):
        costs, n = self.costs(prefix, target), len(target)
        c = counts_of(costs)
        nats = 0.0
        for t in np.arange(1, DIFFULLAMA_DRAWS + 1) / DIFFULLAMA_DRAWS:
            nats += (t**c * (1 - t) ** (n - c) * totals(costs) / np.maximum(c, 1)).sum() / DIFFULLAMA_DRAWS
        return Score(nats, n)


class Clipped(Wrong):
    """The integral over masking rates from 0.001 on, with the weight 1/t, and no term for the rest."""

    def wrong(self, prefix, target):
        costs = self.costs(prefix, target)
        return Score(over_orders(costs).mean - below(costs, CLIPPED), len(target))


class PaddedEos(Wrong):
    """The text is padded with EOS to 8 tokens, and the padding is scored and counted."""

    def wrong(self, prefix, target):
        padded = [*target, *[self.eos] * (8 - len(target))] if len(target) < 8 else target
        if len(padded) > 8:
            return super(Wrong, self).score([(prefix, target)])[0]
        return Score(over_orders(self.costs(prefix, padded)).mean, len(padded))

    def count(self, texts):
        return [Count(-(-count.tokens // 8) * 8, count.n_bytes) for count in super().count(texts)]


class FirstFree(Wrong):
    """The first token is never scored: the slice starts one place late, and the tokens are counted from its start."""

    def wrong(self, prefix, target):
        if len(target) == 1:
            return Score(0.0, 1)
        return Score(over_orders(self.costs([*prefix, target[0]], target[1:])).mean, len(target))


class Anchors(Wrong):
    """The first and the last place are never masked, and what is masked is counted as the whole text."""

    def wrong(self, prefix, target):
        costs, n = self.costs(prefix, target), len(target)
        ends = {0, n - 1}
        inner = [i for i in range(n) if i not in ends]
        if not inner:
            return Score(0.0, n)
        sets = [sum(1 << i for b, i in enumerate(inner) if s >> b & 1) for s in range(1 << len(inner))]
        return Score(over_orders(costs[np.ix_(sets, inner)]).mean, n)


class VisibleEnd(Wrong):
    """An EOS stands behind the text and is never masked, so the model knows where the text ends (Dream's code)."""

    def wrong(self, prefix, target):
        n = len(target)
        costs = self.costs(prefix, [*target, self.eos])[: 1 << n, :n]
        return Score(over_orders(costs).mean, n)


class DecodedBytes(LibraryMethod):
    """The bytes of a text are those of its tokens, each decoded alone."""

    def count(self, texts):
        decode, encode = self.model.tokenizer.decode, self.model.tokenizer.encode
        n_bytes = [sum(len(decode([i]).encode()) for i in encode(text)) for text in texts]
        return [Count(count.tokens, n) for count, n in zip(super().count(texts), n_bytes, strict=True)]


class PerMaskedToken(Wrong):
    """The weighted sum is divided by the number of masked tokens, as DiffuGPT's training loss, and not by all."""

    def wrong(self, prefix, target):
        costs, n = self.costs(prefix, target), len(target)
        c = counts_of(costs)[1:]
        weights = special.beta(c, n - c + 1) * n / c
        return Score((weights * totals(costs)[1:]).sum(), n)


class SingleDraw(Wrong):
    """One draw with the weight 1/t, and an error from how the tokens of this draw differ."""

    def score(self, pairs, *, ids=None, exact=False, left_to_right=False):
        ids = range(len(pairs)) if ids is None else ids
        return [self.draw(pair, np.random.default_rng(i)) for i, pair in zip(ids, pairs, strict=True)]

    def draw(self, pair, rng):
        costs, n = self.costs(*pair), len(pair[1])
        t = 1 - rng.random()
        terms = costs[sum(1 << i for i in range(n) if rng.random() < t)] / t
        error = terms.std() * math.sqrt(n)
        return Score(terms.sum(), n, error, 1.96 * error)


class HalfEven(Wrong):
    """LLaDA's counts of masks, which are rounded half to even, in 8 draws."""

    def wrong(self, prefix, target):
        costs, n = self.costs(prefix, target), len(target)
        c = counts_of(costs)
        of_count = {k: totals(costs)[c == k].mean() * n / k for k in range(1, n + 1)}
        counts = [count for k in range(1, n + 1) for count in llada_counts(n, 8, k)]
        return Score(float(np.mean([of_count[count] for count in counts])), n)


class HalfPrecision(Wrong):
    """The cross-entropies are computed in bfloat16."""

    def wrong(self, prefix, target):
        costs = self.costs(prefix, target).astype(ml_dtypes.bfloat16).astype(np.float64)
        return Score(over_orders(costs).mean, len(target))


class ChainRule(Wrong):
    """The cost in one order, from left to right, is reported as the bound."""

    def wrong(self, prefix, target):
        return Score(over_orders(self.costs(prefix, target)).left_to_right, len(target))


class OtherSchedule(Wrong):
    """Tokens are masked as the cosine schedule says, and weighted by the 1/t of the linear one."""

    def wrong(self, prefix, target):
        t = (np.arange(4096) + 0.5) / 4096
        return Score(at_rates(self.costs(prefix, target), rate_of_cosine(t), t), len(target))


class GridFromZero(Wrong):
    """The masking rates of 16 draws are a grid from 0 on, and the draw at 0, which masks nothing, is averaged in."""

    def wrong(self, prefix, target):
        t = np.arange(1, 16) / 16
        return Score(at_rates(self.costs(prefix, target), t, t) * 15 / 16, len(target))


class OwnToken(Wrong):
    """The token that is predicted is in the input: nothing is masked."""

    def score(self, pairs, *, ids=None, exact=False, left_to_right=False):
        shapes = [(len(prefix), len(target)) for prefix, target in pairs]
        scores = {}
        for shape in set(shapes):
            members = [i for i in range(len(pairs)) if shapes[i] == shape]
            rows = [Row(tuple(pairs[i][0]), tuple(pairs[i][1]), (False,) * shape[1]) for i in members]
            for i, row, log_p in zip(members, rows, self.predict(rows), strict=True):
                scores[i] = Score(-float(log_p[np.arange(shape[1]), row.target].sum()), shape[1])
        return [scores[i] for i in range(len(pairs))]


class LateState(LibraryMethod):
    """A token is predicted from the state at its own place, which has read it, and not from the one before it."""

    def predict(self, rows):
        late = [row._replace(prefix=row.prefix + row.target[:1], target=(*row.target[1:], 0)) for row in rows]
        return super().predict(late)


class PaddingSeen(LibraryMethod):
    """Padding is read like text."""

    def predict(self, rows):
        rows = [
            row._replace(
                target=(*row.target, *[self.model.config.eos_ids[0]] * row.padding),
                masked=(*row.masked, *[False] * row.padding),
                padding=0,
            )
            for row in rows
        ]
        return super().predict(rows)


class NoiseByPlace(LibraryMethod):
    """The masks of a text are those of its place in the batch."""

    def score(self, pairs, *, ids=None, exact=False, left_to_right=False):
        return super().score(pairs, exact=exact, left_to_right=left_to_right)


class MaskPredicted(LibraryMethod):
    """The softmax covers a row that stands for no text, with a logit of 0."""

    def predict(self, rows):
        return [log_p - np.log1p(np.exp(log_p.max(-1, keepdims=True))) for log_p in super().predict(rows)]


class MaskScored(LibraryMethod):
    """A mask in a text is taken for some token, and scored."""

    def score(self, pairs, *, ids=None, exact=False, left_to_right=False):
        mask_id = self.model.config.mask_id
        pairs = [(prefix, [0 if token == mask_id else token for token in target]) for prefix, target in pairs]
        return super().score(pairs, ids=ids, exact=exact, left_to_right=left_to_right)


class EosCounted(LibraryMethod):
    """The end of a text is counted as a token, and not scored."""

    def count(self, texts):
        return [Count(count.tokens + 1, count.n_bytes) for count in super().count(texts)]


@dataclass(frozen=True)
class Trap:
    """A wrong method, and the check that must catch it."""

    method: type[LibraryMethod]
    check: str

    @property
    def name(self):
        return self.method.__name__


TRAPS = [
    Trap(Unweighted, "sums_to_one"),
    Trap(Unweighted, "bound_not_below_exact"),
    Trap(Unweighted, "pairs_below_exact"),
    Trap(Clipped, "clipping"),
    Trap(OtherSchedule, "exact_score_matches"),
    Trap(GridFromZero, "exact_score_matches"),
    Trap(PaddedEos, "exact_score_matches"),
    Trap(PaddedEos, "tokens_counted"),
    Trap(FirstFree, "first_token"),
    Trap(Anchors, "exact_score_matches"),
    Trap(VisibleEnd, "exact_score_matches"),
    Trap(DecodedBytes, "bytes_counted"),
    Trap(PerMaskedToken, "exact_score_matches"),
    Trap(SingleDraw, "interval"),
    Trap(HalfEven, "exact_score_matches"),
    Trap(HalfPrecision, "exact_score_matches"),
    Trap(ChainRule, "estimate_matches_exact"),
    Trap(OwnToken, "sums_to_one"),
    Trap(OwnToken, "exact_score_matches"),
    Trap(PaddingSeen, "padding"),
    Trap(NoiseByPlace, "batch"),
    Trap(MaskPredicted, "mask_not_predicted"),
    Trap(MaskScored, "mask_not_scored"),
    Trap(EosCounted, "tokens_counted"),
]


class OtherOrder(LibraryMethod):
    """The chain rule from right to left under the name of left to right."""

    def score(self, pairs, *, ids=None, exact=False, left_to_right=False):
        if not left_to_right:
            return super().score(pairs, ids=ids, exact=exact)
        scores = []
        for prefix, target in pairs:
            (costs,) = Reference(self.model).costs([(prefix, target)])
            n = len(target)
            order = [costs[(1 << (i + 1)) - 1, i] for i in reversed(range(n))]
            scores.append(dataclasses.replace(Score(0.0, n), nats=float(sum(order))))
        return scores


TRAPS.append(Trap(OtherOrder, "chain_rule"))
AUTOREGRESSIVE = [Trap(LateState, "no_leak")]


def other_schedule(request):
    """Plan the draws of `OtherSchedule`, in the place of a right estimator."""
    key_time, key_masks = jax.random.split(request.key)
    t_D = 1 - (jax.random.uniform(key_time) + jnp.arange(request.draws) / request.draws) % 1
    masked_DxK = uniform_scores(request, key_masks) < jnp.cos(jnp.pi / 2 * (1 - t_D))[:, None]
    masked_DxK &= is_target(request)[None]
    return Plan(masked_DxK, jnp.where(masked_DxK, 1 / (t_D[:, None] * request.draws), 0.0))


def grid_from_zero(request):
    """Plan the draws of `GridFromZero`, as many as are asked for."""
    t_D = jnp.arange(request.draws) / request.draws
    masked_DxK = (uniform_scores(request, request.key) < t_D[:, None]) & is_target(request)[None]
    return Plan(masked_DxK, jnp.where(masked_DxK, 1 / (t_D[:, None] * request.draws), 0.0))
