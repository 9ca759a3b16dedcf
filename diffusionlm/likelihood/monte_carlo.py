"""Log-likelihoods of text, with standard errors from independent passes.

`estimators.py` says which tokens are masked and with what weights; here the network runs on them, with the vocabulary
projection at the target's positions only.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special  # JAX has it loaded; scipy.stats would slow down every start

from diffusionlm.diffusion.cross_entropy import cross_entropy
from diffusionlm.errors import UserError
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.estimators import ESTIMATORS, PlanRequest
from diffusionlm.likelihood.pairs import PairBatch, Shape, check_pairs, fetch_one_late, group_by_shape
from diffusionlm.likelihood.predictor import TargetPredictor
from diffusionlm.model.spec import ModelSpec
from diffusionlm.parallel.bits import in_32_bits
from diffusionlm.parallel.mesh import Array
from diffusionlm.tree_types import Params

Watch = Callable[[float], None]  # is told which share is done
ANY_ORDER_LIMIT = 12  # target tokens: 4,095 forward passes


@dataclass(frozen=True)
class Estimate:
    """A log-likelihood in nats, summed over the tokens of a target.

    Attributes:
      log_likelihood: the estimate; of a masked diffusion model, a lower bound of the log-likelihood.
      stderr: its standard error; 0 where it is exact.
      passes: the number of independent passes that it averages; 1 where it is exact.
      nfe: forward passes of the network.
    """

    log_likelihood: float
    stderr: float
    passes: int
    nfe: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Return the two-sided confidence interval of Student's t."""
        reach = float(special.stdtrit(self.passes - 1, (1 + level) / 2)) * self.stderr if self.stderr else 0.0
        return self.log_likelihood - reach, self.log_likelihood + reach


def estimate(
    params: Params,
    cfg: ModelSpec,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    settings: LikelihoodConfig | None = None,
    *,
    request_ids: Sequence[int] | None = None,
    watch: Watch | None = None,
) -> list[Estimate]:
    """Estimate log p(target | prefix) of each (prefix, target) pair of token ids.

    The masks of a pair are a function of (seed, request id, pass), so its estimate does not depend on the others.

    Args:
      params: the parameters of `Transformer(cfg.model)`; for a mesh, call this under `jax.set_mesh`.
      cfg: the model.
      pairs: prefixes, which may be empty for a masked diffusion model, and targets.
      settings: the settings of the estimates; None: the defaults.
      request_ids: an integer for each pair, which keys its noise; None: its index.
      watch: called after each batch with the share that is done, of the passes that every pair has.

    Raises:
      UserError: a setting without meaning, or a pair that this model cannot score.
    """
    settings = settings or LikelihoodConfig()
    scorer = Scorer(params, cfg, pairs, settings, request_ids)
    if scorer.exact:
        return scorer.estimates(watch)
    indices = range(len(pairs))
    scorer.run_passes(indices, range(settings.passes), watch)
    done = settings.passes
    while settings.stop_at_stderr and done < settings.max_passes:
        uncertain = [r for r in indices if scorer.estimate(r).stderr > settings.stop_at_stderr]
        if not uncertain:
            break
        scorer.run_passes(uncertain, range(done, done + 1))
        done += 1
    return scorer.estimates()


class Noise(NamedTuple):
    """The address of the masks of each row of a batch."""

    root: jax.Array  # the key of the seed
    request_E: Array  # uint32
    pass_E: Array  # uint32

    def keys(self) -> jax.Array:
        """Return a key for each row, (E,)."""
        fold_in = jax.vmap(jax.random.fold_in)
        request_key_E = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(self.root, self.request_E)
        return fold_in(request_key_E, self.pass_E)


class Pass(NamedTuple):
    """One pass of one pair; of an exact estimator, its `number` is the first of its rows."""

    pair: int
    number: int


class PassBatch(NamedTuple):
    """Passes of pairs of one shape, which run together."""

    passes: list[Pass]
    shape: Shape
    size: int  # E, the passes that the batch is filled up to
    draws: int


class Scorer:
    """The pairs of one call, and the nats of the passes that each has had so far."""

    def __init__(
        self,
        params: Params,
        cfg: ModelSpec,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        settings: LikelihoodConfig,
        request_ids: Sequence[int] | None,
    ):
        self._pairs = check_pairs(cfg, pairs, settings)
        name = settings.estimator or ("autoregressive" if cfg.autoregressive else "exact_count")
        if cfg.autoregressive != (name == "autoregressive"):
            kind = "an autoregressive" if cfg.autoregressive else "a masked diffusion"
            raise UserError(f"estimator={name} does not suit {kind} model; leave it unset")
        for r, (_, target) in enumerate(self._pairs):
            if name == "any_order" and len(target) > ANY_ORDER_LIMIT:
                raise UserError(
                    f"estimator=any_order takes 2**n forward passes, so targets of at most {ANY_ORDER_LIMIT} tokens, "
                    f"and target {r} has {len(target)}; use exact_count"
                )
        self._predictor = TargetPredictor.of(params, cfg, settings.guidance)
        self._cfg, self._settings, self._name = cfg, settings, name
        self._root = jax.random.key(settings.seed)
        ids = range(len(pairs)) if request_ids is None else request_ids
        if len(ids) != len(pairs) or not all(0 <= i < 2**32 for i in ids):
            raise UserError(f"request_ids={list(ids)!r} must be {len(pairs)} numbers from 0 to {2**32 - 1}, one a pair")
        self._request_ids = np.array(ids, np.uint32)
        self._nats: list[list[float]] = [[] for _ in self._pairs]
        self._exact: list[Estimate] = []  # of an exact estimator, once they were asked for
        self._forward_passes = 2 if settings.guidance else 1  # of each row
        self.exact = ESTIMATORS[name].rows is not None

    def run_passes(self, indices: Sequence[int], passes: range, watch: Watch | None = None) -> None:
        """Run the next passes of some of the pairs; as many of both as fit run together.

        Args:
          indices: of the pairs.
          passes: their numbers.
          watch: called after each batch with the share of these passes that is done.
        """
        for r, nats in self._run(self._random_batches(indices, passes), watch):
            self._nats[r].append(nats)

    def nats(self, r: int) -> np.ndarray:
        """Return the nats of each pass that a pair has had, float64."""
        return np.array(self._nats[r], np.float64)

    def estimate(self, r: int) -> Estimate:
        """Return the estimate from the passes that a pair has had."""
        nats = self.nats(r)
        stderr = nats.std(ddof=1) / math.sqrt(len(nats))
        nfe = len(nats) * self._settings.draws * self._forward_passes
        return Estimate(-float(nats.mean()), float(stderr), len(nats), nfe)

    def estimates(self, watch: Watch | None = None) -> list[Estimate]:
        """Return the estimates of all pairs: from the passes that they have had, or exact ones, which are run here."""
        if self.exact:
            self._exact = self._exact or self._exact_estimates(watch)
            return self._exact
        return [self.estimate(r) for r in range(len(self._pairs))]

    def _exact_estimates(self, watch: Watch | None) -> list[Estimate]:
        """Return the estimates of an exact estimator, which goes through all its rows."""
        rows = ESTIMATORS[self._name].rows
        assert rows is not None
        totals = np.zeros(len(self._pairs))
        for r, nats in self._run(self._exact_batches(rows), watch):
            totals[r] += nats
        return [
            Estimate(-float(total), 0.0, 1, rows(len(target)) * self._forward_passes)
            for total, (_, target) in zip(totals, self._pairs, strict=True)
        ]

    def _random_batches(self, indices: Sequence[int], numbers: range) -> Iterator[PassBatch]:
        draws = self._settings.draws
        size = max(1, self._settings.rows // draws)
        for shape, members in group_by_shape(self._cfg, self._pairs, indices).items():
            passes = [Pass(r, number) for number in numbers for r in members]
            for i in range(0, len(passes), size):
                yield PassBatch(passes[i : i + size], shape, size, draws)

    def _exact_batches(self, rows: Callable[[int], int]) -> Iterator[PassBatch]:
        for shape, members in group_by_shape(self._cfg, self._pairs, range(len(self._pairs))).items():
            draws = min(self._settings.rows, 1 << (rows(shape[1]) - 1).bit_length())  # of the shape: one program
            size = self._settings.rows // draws
            most = max(rows(len(self._pairs[r][1])) for r in members)
            for i in range(0, len(members), size):
                for first in range(0, most, draws):
                    yield PassBatch([Pass(r, first) for r in members[i : i + size]], shape, size, draws)

    def _run(self, batches: Iterable[PassBatch], watch: Watch | None) -> Iterator[tuple[int, float]]:
        """Yield the pair and the nats of each pass; the device does not wait between batches, of one shape or two."""
        total = 0
        if watch is not None:
            batches = list(batches)  # otherwise they need not all be planned at once
            total = len(batches)
        fetched = fetch_one_late((batch, self._dispatch(batch)) for batch in batches)
        for done, (batch, nats_E) in enumerate(fetched, start=1):
            for (r, _), nats in zip(batch.passes, nats_E.tolist(), strict=False):  # the batch is filled up
                if math.isnan(nats):
                    raise UserError(f"the model gives NaN logits for target {r}: its parameters are damaged")
                yield r, nats
            if watch is not None:
                watch(done / total)

    def _dispatch(self, batch: PassBatch) -> jax.Array:
        T, K = batch.shape
        padded = batch.passes + batch.passes[-1:] * (batch.size - len(batch.passes))
        with self._predictor.room_for(batch.size * batch.draws, T):
            return _pass_nats(
                self._predictor,
                PairBatch.of([self._pairs[r] for r, _ in batch.passes], T, batch.size),
                Noise(
                    self._root,
                    self._request_ids[[r for r, _ in padded]],
                    np.array([number for _, number in padded], np.uint32),
                ),
                np.asarray(padded[0].number if self.exact else 0, np.int32),
                estimator=self._name,
                draws=batch.draws,
                K=K,
            )


@in_32_bits
@functools.partial(jax.jit, static_argnames=("estimator", "draws", "K"))
def _pass_nats(
    predictor: TargetPredictor,
    batch: PairBatch,
    noise: Noise,
    first: jax.Array,
    *,
    estimator: str,
    draws: int,
    K: int,
) -> jax.Array:
    """Return the nats of one pass of every pair, or of an exact estimator's rows from `first` on, (E,)."""

    def plan_of(n: jax.Array, key: jax.Array):
        return ESTIMATORS[estimator].plan(PlanRequest(n, K, draws, first, key))

    plan = jax.vmap(plan_of)(jnp.asarray(batch.n_E), noise.keys())
    E = plan.masked_DxK.shape[0]
    repeated = batch.repeat(draws)
    hidden_RxKxD = predictor.hidden(repeated, plan.masked_DxK.reshape(E * draws, K))
    nll_RxK = cross_entropy(
        predictor.logits, hidden_RxKxD, repeated.labels(K), predictor.suppressed_V, predictor.model_cfg.head_chunk
    )
    nll_ExDxK = nll_RxK.reshape(E, draws, K)
    # A place of weight 0 may hold a token that is never predicted, which costs infinity.
    return jnp.where(plan.weight_DxK > 0, nll_ExDxK * plan.weight_DxK, 0.0).sum(axis=(1, 2))
