"""Choices between answers: error rates by simulation, and few passes where the case is clear."""

import math

import jax
import numpy as np
import pytest
from support.tiny_likelihood import MDM, PREFIX, TARGET, params_of

from diffusionlm.errors import UserError
from diffusionlm.likelihood import choose as choose_module
from diffusionlm.likelihood.choose import choose, is_less_likely
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.monte_carlo import Estimate, estimate


@pytest.fixture(autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.slow
def test_the_likeliest_answer_is_chosen_with_few_passes_where_it_is_clear():
    answers = [[9, 2, 6], [1, 1, 1], [7, 30, 2], [44, 9, 13]]
    pairs = [(PREFIX, answer) for answer in answers]
    exact = [e.log_likelihood for e in estimate(params_of(MDM), MDM, pairs, LikelihoodConfig(estimator="any_order"))]
    choice = choose(params_of(MDM), MDM, PREFIX, answers, LikelihoodConfig(draws=4))
    assert choice.best == int(np.argmax(exact)) and choice.decided
    assert sum(e.nfe for e in choice.estimates) < len(answers) * 128
    same = choose(params_of(MDM), MDM, PREFIX, [TARGET, TARGET], LikelihoodConfig(draws=2, max_passes=16))
    assert not same.decided and [e.passes for e in same.estimates] == [16, 16]


def test_choosing_with_an_exact_estimator_is_exact():
    answers = [[1, 1], [9, 2]]
    choice = choose(params_of(MDM), MDM, PREFIX, answers, LikelihoodConfig(estimator="chain_rule"))
    assert choice.decided and choice.estimates[choice.best].log_likelihood == max(
        e.log_likelihood for e in choice.estimates
    )


def gamma(shape: float, spread: float = 1.0):
    """Noise with mean 0 and a skewness of 2 / sqrt(shape)."""
    return lambda rng, n: spread * (rng.gamma(shape, size=n) - shape) / math.sqrt(shape)


def normal(spread: float):
    return lambda rng, n: spread * rng.standard_normal(n)


def mirrored(noise):
    return lambda rng, n: -noise(rng, n)


class Synthetic:
    """In place of the scorer: an answer is its log-likelihood and the noise of its passes."""

    exact = False

    def __init__(self, params, cfg, pairs, settings, request_ids):
        rng = np.random.default_rng(request_ids)
        self._nats = [noise(rng, settings.max_passes) - true for _, (true, noise) in pairs]
        self._done = [0] * len(pairs)

    def run_passes(self, indices, passes):
        for r in indices:
            assert self._done[r] == passes.start  # all that remain have had equally many
            self._done[r] = passes.stop

    def nats(self, r):
        return self._nats[r][: self._done[r]]

    def estimate(self, r):
        n, nats = self._done[r], self.nats(r)
        return Estimate(-nats.mean(), nats.std(ddof=1) / math.sqrt(n), n, n)

    def estimates(self):
        return [self.estimate(r) for r in range(len(self._nats))]


@pytest.fixture
def simulate(monkeypatch):
    """Choices between (log-likelihood, noise of a pass) pairs, again and again."""
    monkeypatch.setattr(choose_module, "Scorer", Synthetic)

    def simulate(answers, runs=1000, **options):
        return [choose({}, MDM, [], answers, **options, request_ids=[i]) for i in range(runs)]

    return simulate


def error_rate(choices) -> float:
    """Return how often the first answer, which is the likeliest, was dropped."""
    wrong = []
    for choice in choices:
        passes = [e.passes for e in choice.estimates]
        wrong.append(choice.best != 0 and (choice.decided or passes[0] < max(passes)))
    return float(np.mean(wrong))


EXACT = normal(0.1)
RUNS = 1000


@pytest.mark.slow
@pytest.mark.parametrize(
    "best, rivals",
    [
        pytest.param(gamma(4), [gamma(4)] * 3, id="alike", marks=pytest.mark.slow),
        pytest.param(EXACT, [normal(1)], id="normal", marks=pytest.mark.slow),
        pytest.param(EXACT, [gamma(4)], id="skewed", marks=pytest.mark.slow),
        pytest.param(EXACT, [gamma(4)] * 3, id="three_skewed"),
        pytest.param(mirrored(gamma(4)), [gamma(4)], id="opposed"),
        pytest.param(gamma(4, 0.5), [gamma(4), gamma(4, 2), normal(1)], id="mixed"),
    ],
)
@pytest.mark.parametrize("max_passes", [8, 128])
def test_decisions_err_no_more_often_than_asked(best, rivals, max_passes, simulate):
    """A test that looks often errs most when answers differ least: the likeliest may be dropped in 5% of runs.

    A rival with skewed passes looks likely and certain as long as its costly masks have not been drawn.
    """
    answers = [(-9.999, best), *[(-10.0, rival) for rival in rivals]]
    choices = simulate(answers, RUNS, settings=LikelihoodConfig(max_passes=max_passes), error_rate=0.05)
    assert error_rate(choices) <= 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.01, 0.2])
def test_other_error_rates_hold_too(rate, simulate):
    choices = simulate([(-9.999, EXACT), (-10.0, gamma(4)), (-10.0, gamma(4))], RUNS, error_rate=rate)
    assert error_rate(choices) <= rate + 2.5 * math.sqrt(rate * (1 - rate) / RUNS)


@pytest.mark.slow
def test_at_twice_the_assumed_skewness_few_more_decisions_err(simulate):
    choices = simulate([(-9.999, EXACT), *[(-10.0, gamma(1))] * 3], RUNS, error_rate=0.05)
    assert error_rate(choices) <= 0.06 + 2.5 * math.sqrt(0.06 * 0.94 / RUNS)


def test_decisions_take_the_passes_that_they_need(simulate):
    choices = simulate([(-10.0, gamma(4)), (-11.0, gamma(4)), (-14.0, gamma(4))])
    assert np.mean([choice.decided and choice.best == 0 for choice in choices]) > 0.99
    first, second, third = np.mean([[e.passes for e in choice.estimates] for choice in choices], axis=0)
    assert third < 10 < first < 30 and second == pytest.approx(first, rel=0.01)  # one standard deviation, four of them


def test_what_has_no_noise_is_decided_at_once():
    same, more = np.full(8, 3.0), np.full(8, 3.1)
    assert is_less_likely(more, same, 0.01) and not is_less_likely(same, same, 0.01)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: choose(None, MDM, PREFIX, [[1]]), "1 answer"),
    ],
)
def test_a_mistake_is_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
