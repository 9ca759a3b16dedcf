"""Choose between answers with a sequential test that stops once the lead is clear."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special  # JAX has it loaded; scipy.stats would slow down every start

from diffusionlm.errors import UserError
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.monte_carlo import Estimate, Scorer
from diffusionlm.model.spec import ModelSpec
from diffusionlm.scalars import real
from diffusionlm.tree_types import Params

# The skewness that a leader's nats are taken to have at least, as a few passes do not show it. Real passes have up to
# 1.1 with one draw, and up to 0.8 with more (`experiments/benchmarks/likelihood.py`).
ASSUMED_SKEWNESS = 1.0


@dataclass(frozen=True)
class Choice:
    """The likeliest of several answers.

    Attributes:
      best: its index.
      decided: whether its lead is significant; otherwise it only has the highest estimate.
      estimates: the estimate of every answer; those that fell behind early have fewer passes.
    """

    best: int
    decided: bool
    estimates: list[Estimate]


def choose(
    params: Params,
    cfg: ModelSpec,
    prefix: Sequence[int],
    answers: Sequence[Sequence[int]],
    settings: LikelihoodConfig | None = None,
    *,
    error_rate: float = 0.05,
    request_ids: Sequence[int] | None = None,
) -> Choice:
    """Find the likeliest of several answers, with no more forward passes than that takes.

    A group-sequential test: after `settings.passes` passes, and after every doubling of them up to
    `settings.max_passes`, an answer is dropped where `is_less_likely` puts it below the leader at level
    error_rate / (looks x rivals), by Bonferroni. So the probability of dropping the likeliest answer is at most
    `error_rate`, as long as the skewness of the nats of single passes lies in [-1, 1]; the tests simulate it there, and
    at a skewness of 2, where an error rate of 5% becomes one of 6%. A clear case ends after the first passes, so it
    costs least with few draws in each: 8 are a good start (`experiments/benchmarks/likelihood.py`).

    Args:
      params: the parameters of `Transformer(cfg.model)`; for a mesh, call this under `jax.set_mesh`.
      cfg: the model.
      prefix: the token ids before each answer.
      answers: token ids, at least two answers.
      settings: the settings of the estimates; None: the defaults.
      error_rate: the probability of dropping the likeliest answer that is accepted.
      request_ids: an integer for each answer, which keys its noise; None: its index.

    Raises:
      UserError: fewer than two answers, a setting without meaning, or an answer that this model cannot score.
    """
    settings = settings or LikelihoodConfig()
    if len(answers) < 2:
        raise UserError(f"{len(answers)} answer(s) to choose from; give at least 2")
    scorer = Scorer(params, cfg, [(prefix, answer) for answer in answers], settings, request_ids)
    (decision,) = decide(scorer, settings, [[1.0] * len(answers)], error_rate)
    return Choice(*decision, scorer.estimates())


class Decision(NamedTuple):
    """The pair that came out as the likeliest one of a scorer's, and whether its lead is significant."""

    best: int
    decided: bool


def decide(
    scorer: Scorer, settings: LikelihoodConfig, scales: Sequence[Sequence[float]], error_rate: float = 0.05
) -> list[Decision]:
    """Run passes of a scorer's pairs until the likeliest one is clear, by the test that `choose` describes.

    Args:
      scorer: at least two pairs, none of which has had a pass yet.
      settings: those of the scorer.
      scales: for each of several ways to compare the pairs, a positive factor of the nats of each, such as one over its
        length; a pair gets further passes while one of these ways needs them. Each way has the whole error rate.
      error_rate: the probability of dropping the likeliest pair that is accepted.

    Returns:
      The decision of each way to compare them.
    """
    if not 0 < (error_rate := real("error_rate", error_rate)) < 1:
        raise UserError(f"error_rate={error_rate} must lie in (0, 1)")
    pairs = range(len(scales[0]))
    if scorer.exact:
        nats = [-estimate.log_likelihood for estimate in scorer.estimates()]
        return [Decision(min(pairs, key=lambda r: nats[r] * scale[r]), True) for scale in scales]
    looks = [settings.passes]
    while looks[-1] < settings.max_passes:
        looks.append(min(2 * looks[-1], settings.max_passes))
    level = error_rate / (len(looks) * (len(pairs) - 1))
    contests = [_Contest(scale, list(pairs)) for scale in scales]
    done = 0
    for look in looks:
        needed = {r for contest in contests if not contest.decided for r in contest.remaining}
        scorer.run_passes(sorted(needed), range(done, look))
        done = look
        for contest in contests:
            if not contest.decided:
                contest.drop(scorer, level)
        if all(contest.decided for contest in contests):
            break
    return [Decision(contest.best, contest.decided) for contest in contests]


@dataclass
class _Contest:
    """One way to compare pairs, and the pairs that have not fallen behind in it."""

    scale: Sequence[float]
    remaining: list[int]
    best: int = 0

    @property
    def decided(self) -> bool:
        return len(self.remaining) == 1

    def drop(self, scorer: Scorer, level: float) -> None:
        """Drop the pairs that the test puts below the leader."""
        nats = {r: scorer.nats(r) * self.scale[r] for r in self.remaining}
        self.best = min(self.remaining, key=lambda r: nats[r].mean())
        leader = nats[self.best]
        self.remaining = [r for r in nats if r == self.best or not is_less_likely(nats[r], leader, level)]


def is_less_likely(rival: np.ndarray, leader: np.ndarray, level: float) -> bool:
    """Test at `level`, from the nats of their passes, if a rival needs more nats than the leader.

    The test is Welch's t with Hall's transformation t + r t^2 / 3 + r^2 t^3 / 27 + r / 6, which removes the effect of
    r, the skewness of the difference of the means (Hall, "On the removal of skewness by transformation", 1992; for two
    samples, Zhou and Dinh 2005). Skewed nats matter here: an answer whose costly masks have not been drawn yet looks
    likely and certain at the same time. As few passes show little of their skewness, the leader's is taken to be at
    least `ASSUMED_SKEWNESS`, the rival's at most 0, and r at most 0.
    """
    variances = np.array([rival.var(ddof=1) / len(rival), leader.var(ddof=1) / len(leader)])
    variance = variances.sum()
    lead = rival.mean() - leader.mean()
    if not variance:
        return bool(lead > 0)
    t = lead / math.sqrt(variance)
    least = ASSUMED_SKEWNESS * leader.var(ddof=1) ** 1.5
    third = min(_third_moment(rival), 0.0) / len(rival) ** 2 - max(_third_moment(leader), least) / len(leader) ** 2
    r = min(third / variance**1.5, 0.0)
    t = t + r * t**2 / 3 + r**2 * t**3 / 27 + r / 6
    freedom = variance**2 / (variances**2 / (np.array([len(rival), len(leader)]) - 1)).sum()
    return bool(special.stdtr(freedom, -t) < level)


def _third_moment(x: np.ndarray) -> float:
    """Estimate the third central moment without bias."""
    n = len(x)
    return float(((x - x.mean()) ** 3).sum() * n / ((n - 1) * (n - 2)))
