"""Log-likelihoods of text, with standard errors from independent passes, and decisions between answers.

`estimators.py` says which tokens are masked and with what weights; here the network runs on them, with the vocabulary
projection at the target's positions only.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special  # JAX has it loaded; scipy.stats would slow down every start

from diffusionlm.config import ModelConfig
from diffusionlm.diffusion.cross_entropy import cross_entropy
from diffusionlm.errors import UserError, suggest
from diffusionlm.likelihood.estimators import ESTIMATORS, Request
from diffusionlm.model.spec import ModelSpec
from diffusionlm.model.transformer import Transformer, suppression
from diffusionlm.sampling.denoiser import guide, predictors

LENGTH_MULTIPLE = 64  # sequences are padded to a multiple of this, so that similar lengths share a program
ANY_ORDER_LIMIT = 12  # target tokens: 4,095 forward passes
LEAST_PASSES = 8  # below, Student's t has tails that make an interval useless


class Scored(NamedTuple):
    """A batch of E requests: a sequence each, and where its target lies."""

    tokens_ExT: Any  # int32: prefix, target, padding
    segment_ids_ExT: Any  # int32: 1, 0 for padding
    start_E: Any  # int32: length of the prefix
    n_E: Any  # int32: tokens of the target

    @classmethod
    def of(cls, pairs: Sequence[tuple[list[int], list[int]]], T: int, E: int) -> "Scored":
        """Pairs padded to T tokens; the batch is filled up to E rows with the last of them."""
        pairs = [*pairs, *[pairs[-1]] * (E - len(pairs))]
        tokens_ExT, segment_ids_ExT = np.zeros((E, T), np.int32), np.zeros((E, T), np.int32)
        for e, (prefix, target) in enumerate(pairs):
            ids = prefix + target
            tokens_ExT[e, : len(ids)], segment_ids_ExT[e, : len(ids)] = ids, 1
        start_E = np.array([len(prefix) for prefix, _ in pairs], np.int32)
        n_E = np.array([len(target) for _, target in pairs], np.int32)
        return cls(tokens_ExT, segment_ids_ExT, start_E, n_E)


@functools.partial(jax.jit, static_argnames=("model_cfg", "shifted", "estimator", "draws", "K", "guided"))
def _nll_of_pass(
    params: Any,
    suppressed_V: jax.Array,
    batch: Scored,
    keys_E: jax.Array,
    first: jax.Array,
    mask_id: jax.Array,
    guidance: jax.Array,
    *,
    model_cfg: ModelConfig,
    shifted: bool,
    estimator: str,
    draws: int,
    K: int,
    guided: bool,
) -> jax.Array:
    """One pass of every request, or rows `first` on of an exact estimator: nats (E,), summed over the target."""
    E, T = batch.tokens_ExT.shape
    plan = jax.vmap(lambda n, key: ESTIMATORS[estimator].plan(Request(n, K, draws, first, key)))(batch.n_E, keys_E)
    # Places beyond a target may lie beyond the sequence: they are clipped to its end and weigh nothing.
    place_ExK = jnp.minimum(batch.start_E[:, None] + jnp.arange(K)[None], T - 1)
    labels_ExK = jnp.take_along_axis(batch.tokens_ExT, place_ExK, axis=1)
    position_ExT = jnp.arange(T)[None] - batch.start_E[:, None]
    in_target_ExT = (position_ExT >= 0) & (position_ExT < batch.n_E[:, None])
    masked_ExDxT = jnp.take_along_axis(
        plan.masked_DxK, jnp.broadcast_to(jnp.clip(position_ExT, 0, K - 1)[:, None], (E, draws, T)), axis=2
    )
    masked_ExDxT &= in_target_ExT[:, None]
    tokens_ExDxT = jnp.where(masked_ExDxT, mask_id, batch.tokens_ExT[:, None])

    def rows(x: jax.Array, *shape: int) -> jax.Array:
        return jnp.broadcast_to(x[:, None], (E, draws, *shape)).reshape(E * draws, *shape)

    tokens_RxT = tokens_ExDxT.reshape(E * draws, T)
    segments_RxT, place_RxK, labels_RxK = rows(batch.segment_ids_ExT, T), rows(place_ExK, K), rows(labels_ExK, K)
    model, D = Transformer(model_cfg), model_cfg.d_model

    def hidden_at_places(tokens_RxT: jax.Array) -> jax.Array:
        hidden_RxTxD = model.apply({"params": params}, tokens_RxT, segments_RxT)
        return jnp.take_along_axis(hidden_RxTxD, predictors(place_RxK, shifted)[..., None], axis=1)

    def head(hidden_RxCxD: jax.Array) -> jax.Array:
        logits_RxCxV = model.apply({"params": params}, hidden_RxCxD[..., :D], method=Transformer.head)
        if not guided:
            return logits_RxCxV
        without_RxCxV = model.apply({"params": params}, hidden_RxCxD[..., D:], method=Transformer.head)
        return guide(logits_RxCxV, without_RxCxV, guidance)

    hidden_RxKxD = hidden_at_places(tokens_RxT)
    if guided:  # beside it, the states without the prompt: unsupervised guidance (SMDM, Eq. 7)
        without_prompt_RxT = jnp.where(rows(position_ExT < 0, T), mask_id, tokens_RxT)
        hidden_RxKxD = jnp.concatenate([hidden_RxKxD, hidden_at_places(without_prompt_RxT)], axis=-1)
    nll_RxK = cross_entropy(head, hidden_RxKxD, labels_RxK, suppressed_V, model_cfg.head_chunk)
    nll_ExDxK = nll_RxK.reshape(E, draws, K)
    # A place of weight 0 may hold a token that is never predicted, which costs infinity.
    return jnp.where(plan.weight_DxK > 0, nll_ExDxK * plan.weight_DxK, 0.0).sum(axis=(1, 2))


# --- estimates


@dataclass(frozen=True)
class LikelihoodConfig:
    """How log-likelihoods are estimated."""

    # exact_count, iid, dream, diffullama (random); chain_rule, any_order (exact); None: exact_count (autoregressive:
    # exact)
    estimator: str | None = None
    draws: int = 16  # forward passes of one pass, spread evenly over the numbers of masks; of diffullama always 32
    passes: int = 8  # independent passes, from which the standard error comes
    stop_at_stderr: float = 0.0  # go on, up to max_passes, until standard errors are at most this, in nats; 0: do not
    max_passes: int = 128  # of `stop_at_stderr`
    guidance: float = 0.0  # scale of unsupervised guidance; 0: none
    seed: int = 0  # of the masks
    rows: int = 64  # sequences that the network sees at a time

    def validate(self) -> None:
        """Raises `UserError` for a value that has no meaning."""
        for name, least in (("draws", 1), ("passes", LEAST_PASSES), ("max_passes", 1), ("rows", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name}={value!r} must be an integer of at least {least}")
        for name in ("stop_at_stderr", "guidance"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise UserError(f"{name}={value!r} must be a number that is not negative")
        if self.stop_at_stderr and self.max_passes < self.passes:
            raise UserError(f"max_passes={self.max_passes} must not be below passes={self.passes}")
        if self.estimator is not None and self.estimator not in ESTIMATORS:
            raise UserError(f"unknown estimator {self.estimator!r}{suggest(str(self.estimator), ESTIMATORS)}")


@dataclass(frozen=True)
class Estimate:
    """A log-likelihood in nats, summed over the tokens of a target.

    Attributes:
      log_likelihood: of a masked diffusion model, a lower bound of it.
      stderr: its standard error; 0 where it is exact.
      passes: independent passes behind it; 1 where it is exact.
      nfe: forward passes of the network.
    """

    log_likelihood: float
    stderr: float
    passes: int
    nfe: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """The two-sided confidence interval of Student's t."""
        reach = float(special.stdtrit(self.passes - 1, (1 + level) / 2)) * self.stderr if self.stderr else 0.0
        return self.log_likelihood - reach, self.log_likelihood + reach


def estimate(
    params: Any,
    cfg: ModelSpec,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    settings: LikelihoodConfig = LikelihoodConfig(),
    *,
    request_ids: Sequence[int] | None = None,
) -> list[Estimate]:
    """log p(target | prefix) of each (prefix, target) pair of token ids.

    The masks of a pair are a function of (seed, request id, pass), so its estimate does not depend on the others.

    Args:
      params: the parameters of `Transformer(cfg.model)`; for a mesh, call this under `jax.set_mesh`.
      cfg: the model.
      pairs: prefixes, which may be empty for a masked diffusion model, and targets.
      settings: how.
      request_ids: what the noise of each pair is keyed by; None: its index.

    Raises:
      UserError: a setting without meaning, or a pair that this model cannot score.
    """
    scorer = _Scorer(params, cfg, pairs, settings, request_ids)
    if scorer.exact:
        return scorer.exact_estimates()
    every = list(range(len(pairs)))
    scorer.run_passes(every, range(settings.passes))
    p = settings.passes
    while settings.stop_at_stderr and p < settings.max_passes:
        wanting = [r for r in every if scorer.estimate(r).stderr > settings.stop_at_stderr]
        if not wanting:
            break
        scorer.run_passes(wanting, range(p, p + 1))
        p += 1
    return [scorer.estimate(r) for r in every]


def checked(
    cfg: ModelSpec, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], settings: LikelihoodConfig
) -> list[tuple[list[int], list[int]]]:
    """The (prefix, target) pairs as lists; raises `UserError` where the model cannot score one, or not in this way."""
    settings.validate()
    if cfg.autoregressive and settings.guidance:
        raise UserError(f"guidance={settings.guidance} needs a masked diffusion model, which can mask its prompt")
    pairs = [(list(prefix), list(target)) for prefix, target in pairs]
    for r, (prefix, target) in enumerate(pairs):
        length = len(prefix) + len(target)
        if not target:
            raise UserError(f"target {r} is empty; there is nothing to score")
        if cfg.shifted and not prefix:
            raise UserError(f"prefix {r} is empty: nothing predicts this model's first token; give one, such as BOS")
        if length > cfg.max_length:
            raise UserError(
                f"pair {r} has {length} tokens, more than the model's context of {cfg.max_length}; shorten it"
            )
        for token in (*prefix, *target):
            if not 0 <= token < cfg.model.vocab_size:
                raise UserError(f"pair {r} has token {token}; ids lie in [0, {cfg.model.vocab_size})")
        if cfg.mask_id in (*prefix, *target):
            raise UserError(
                f"pair {r} has token {cfg.mask_id}, which stands for masks in this model, so that it can be neither "
                "read nor scored; leave it out"
            )
        if never := set(target) & set(cfg.suppressed_ids):
            raise UserError(f"target {r} has token {never.pop()}, which this model never predicts")
    return pairs


def buckets(
    cfg: ModelSpec, pairs: Sequence[tuple[list[int], list[int]]], requests: Sequence[int]
) -> dict[tuple[int, int], list[int]]:
    """Some of the pairs, by index, under the (T, K) that they are padded to: each is a program of its own."""
    found: dict[tuple[int, int], list[int]] = {}
    for r in requests:
        prefix, target = pairs[r]
        padded = -(-(len(prefix) + len(target)) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        T, K = min(padded, cfg.max_length), 1 << (len(target) - 1).bit_length()
        found.setdefault((T, K), []).append(r)
    return found


class _Scorer:
    """The pairs of one call, and the passes that each has had so far."""

    def __init__(self, params: Any, cfg: ModelSpec, pairs: Any, settings: LikelihoodConfig, request_ids: Any):
        self._pairs = checked(cfg, pairs, settings)
        name = settings.estimator or ("autoregressive" if cfg.autoregressive else "exact_count")
        if cfg.autoregressive != (name == "autoregressive"):
            kind = "an autoregressive" if cfg.autoregressive else "a masked diffusion"
            raise UserError(f"estimator={name} does not suit {kind} model; leave it unset")
        self._params, self._cfg, self._settings, self._name = params, cfg, settings, name
        self._draws = ESTIMATORS[name].draws or settings.draws
        for r, (_, target) in enumerate(self._pairs):
            if name == "any_order" and len(target) > ANY_ORDER_LIMIT:
                raise UserError(
                    f"estimator=any_order takes 2**n forward passes, so targets of at most {ANY_ORDER_LIMIT} tokens, "
                    f"and target {r} has {len(target)}; use exact_count"
                )
        ids = range(len(self._pairs)) if request_ids is None else request_ids
        root = jax.random.key(settings.seed)
        self._keys = [jax.random.fold_in(root, int(i)) for i in ids]
        self._nats: list[list[float]] = [[] for _ in self._pairs]
        self._suppressed_V = jnp.asarray(suppression(cfg.model, cfg.suppressed_ids))
        self.exact = ESTIMATORS[name].rows is not None

    def run_passes(self, requests: Sequence[int], passes: range) -> None:
        """The next passes of some of the pairs; as many of both as fit run together."""
        size = max(1, self._settings.rows // self._draws)
        for bucket, members in buckets(self._cfg, self._pairs, requests).items():
            jobs = [(r, p) for p in passes for r in members]
            for i in range(0, len(jobs), size):
                some = [r for r, _ in jobs[i : i + size]]
                keys = [jax.random.fold_in(self._keys[r], p) for r, p in jobs[i : i + size]]
                for r, nats in zip(some, self._run(some, keys, bucket, size, self._draws, 0), strict=True):
                    self._nats[r].append(nats)

    def exact_estimates(self) -> list[Estimate]:
        found: dict[int, Estimate] = {}
        rows = ESTIMATORS[self._name].rows
        for bucket, members in buckets(self._cfg, self._pairs, range(len(self._pairs))).items():
            most = max(rows(len(self._pairs[r][1])) for r in members)
            draws = min(self._settings.rows, 1 << (rows(bucket[1]) - 1).bit_length())  # of the bucket: one program
            size = self._settings.rows // draws
            for i in range(0, len(members), size):
                some = members[i : i + size]
                keys = [self._keys[r] for r in some]  # not looked at
                parts = [self._run(some, keys, bucket, size, draws, first) for first in range(0, most, draws)]
                for r, nats in zip(some, np.sum(parts, axis=0), strict=True):
                    n = len(self._pairs[r][1])
                    found[r] = Estimate(-float(nats), 0.0, 1, rows(n) * (2 if self._settings.guidance else 1))
        return [found[r] for r in range(len(self._pairs))]

    def estimate(self, r: int) -> Estimate:
        """Of a pair that has had passes."""
        nats = np.array(self._nats[r], np.float64)
        stderr = nats.std(ddof=1) / math.sqrt(len(nats))
        nfe = len(nats) * self._draws * (2 if self._settings.guidance else 1)
        return Estimate(-float(nats.mean()), float(stderr), len(nats), nfe)

    def _run(
        self, requests: list[int], keys: list[jax.Array], bucket: tuple[int, int], size: int, draws: int, first: int
    ) -> list[float]:
        """Nats of one pass of up to `size` requests."""
        T, K = bucket
        keys = keys + keys[-1:] * (size - len(keys))
        nats_E = _nll_of_pass(
            self._params,
            self._suppressed_V,
            Scored.of([self._pairs[r] for r in requests], T, size),
            jnp.stack(keys),
            np.int32(first),
            np.int32(self._cfg.mask_id or 0),
            np.float32(self._settings.guidance),
            model_cfg=self._cfg.model,
            shifted=self._cfg.shifted,
            estimator=self._name,
            draws=draws,
            K=K,
            guided=self._settings.guidance > 0,
        )
        nats = np.asarray(nats_E)[: len(requests)].tolist()
        for r, value in zip(requests, nats, strict=True):
            if math.isnan(value):
                raise UserError(f"the model gives NaN logits for target {r}: its parameters are damaged")
        return nats


# --- decisions


@dataclass(frozen=True)
class Choice:
    """Which of several answers is the likeliest.

    Attributes:
      best: its index.
      decided: whether its lead is significant; otherwise it only has the highest estimate.
      estimates: of every answer; those that fell behind early have fewer passes.
    """

    best: int
    decided: bool
    estimates: list[Estimate]


def choose(
    params: Any,
    cfg: ModelSpec,
    prefix: Sequence[int],
    answers: Sequence[Sequence[int]],
    settings: LikelihoodConfig = LikelihoodConfig(),
    *,
    error_rate: float = 0.05,
    request_ids: Sequence[int] | None = None,
) -> Choice:
    """The likeliest of several answers, with no more forward passes than that takes.

    A group-sequential test: after `settings.passes` passes, and after every doubling of them up to
    `settings.max_passes`, an answer is dropped where Welch's t puts it below the leader at level error_rate / (looks x
    rivals), by Bonferroni, so that the probability of dropping the likeliest answer is at most `error_rate`. A clear
    case ends after the first passes, so it costs least with few draws in each: 8 are a good start
    (`experiments/benchmarks/likelihood.py`).
    """
    if len(answers) < 2:
        raise UserError(f"{len(answers)} answer(s) to choose from; give at least 2")
    if settings.estimator in ESTIMATORS and not ESTIMATORS[settings.estimator].summed:
        raise UserError(f"estimator={settings.estimator} is a score per token, not a likelihood; leave it unset")
    if not 0 < error_rate < 1:
        raise UserError(f"error_rate={error_rate} must lie in (0, 1)")
    scorer = _Scorer(params, cfg, [(prefix, answer) for answer in answers], settings, request_ids)
    every = list(range(len(answers)))
    if scorer.exact:
        exact = scorer.exact_estimates()
        return Choice(max(every, key=lambda r: exact[r].log_likelihood), True, exact)
    looks = [settings.passes]
    while looks[-1] < settings.max_passes:
        looks.append(min(2 * looks[-1], settings.max_passes))
    level = error_rate / (len(looks) * (len(answers) - 1))
    left, done = every, 0
    for look in looks:
        scorer.run_passes(left, range(done, look))
        done = look
        best = max(left, key=lambda r: scorer.estimate(r).log_likelihood)
        left = [r for r in left if r == best or not _is_below(scorer.estimate(r), scorer.estimate(best), level)]
        if len(left) == 1:
            break
    return Choice(best, len(left) == 1, [scorer.estimate(r) for r in every])


def _is_below(low: Estimate, high: Estimate, level: float) -> bool:
    """Whether Welch's one-sided t-test at `level` says that `low` is less likely than `high`."""
    variances = np.array([low.stderr**2, high.stderr**2])
    if not variances.any():
        return low.log_likelihood < high.log_likelihood
    freedom = variances.sum() ** 2 / (variances**2 / (np.array([low.passes, high.passes]) - 1)).sum()
    t = (high.log_likelihood - low.log_likelihood) / math.sqrt(variances.sum())
    return bool(special.stdtr(freedom, -t) < level)
