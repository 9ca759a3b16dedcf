"""Totals with their intervals, agreement of estimates, and claims of others."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from diffusionlm.errors import UserError
from diffusionlm.evaluation.certificate.claims import Claim, judge_claims, read_claims
from diffusionlm.evaluation.certificate.figures import Total, draws_agree, estimators_agree, settings_of, total
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.monte_carlo import Estimate


def test_the_interval_of_one_estimate_is_students():
    result = Estimate(-10.0, 0.5, 8, 128)
    low, high = result.interval()
    assert Total.of([result]).reach() == pytest.approx((high - low) / 2)
    assert Total.of([result, Estimate(-1.0, 0.0, 1, 1)]).reach() == pytest.approx((high - low) / 2)
    assert Total.of([Estimate(-1.0, 0.0, 1, 1)]).reach() == 0


def test_intervals_of_totals_hold_their_share():
    """Sums of 5 estimates with unequal variances, from 8 passes each: 95% intervals, over 4,000 repetitions."""
    rng, missed = np.random.default_rng(0), 0
    scales = np.array([1, 2, 3, 4, 10])
    for _ in range(4000):
        passes = rng.normal(scale=scales[:, None], size=(5, 8))
        sums = Total.of([Estimate(-x.mean(), x.std(ddof=1) / math.sqrt(8), 8, 8) for x in passes])
        missed += abs(sums.nats) > sums.reach()
    assert stats.binomtest(missed, 4000, 0.05).pvalue > 1e-3 or missed < 200  # Welch and Satterthwaite: 5% or less


def records(first, second, stderr=0.1):
    totals = [list(Total.of([Estimate(-nats, stderr, 8, 1)])) for nats in (first, second, second)]
    return [dict(zip(("exact_count", "iid", "other_draws"), totals, strict=True))]


@pytest.mark.parametrize("check", [estimators_agree, draws_agree])
def test_estimates_agree_or_not(check):
    assert check(records(10.0, 10.3), [10]).verdict == "pass"
    finding = check(records(10.0, 12.0), [10])
    assert finding.verdict == "fail" and finding.value == pytest.approx(0.2)
    assert check(records(10.0, math.nan), [10]).verdict == "fail"
    assert "exact" in check([{"autoregressive": [1.0, 0.0, 0.0]}], [10]).explanation


def test_draws_are_compared_with_a_quarter_or_four_times_as_many():
    """Passes of fewer than four draws are skewed so much that the level does not hold (`test_agreement`)."""
    model = SimpleNamespace(config=SimpleNamespace(autoregressive=False))
    chosen = {n: settings_of(model, LikelihoodConfig(draws=n)) for n in (1, 3, 4, 15, 16, 64)}
    assert {n: s["other_draws"].draws for n, s in chosen.items() if "other_draws" in s} == {
        4: 16,
        15: 60,
        16: 4,
        64: 16,
    }
    assert len({settings.seed for settings in chosen[16].values()}) == 3
    few = [{name: total for name, total in record.items() if name != "other_draws"} for record in records(10.0, 12.0)]
    assert draws_agree(few, [10]).verdict == "not applicable" and estimators_agree(few, [10]).verdict == "fail"


@pytest.mark.parametrize("check", [estimators_agree, draws_agree])
def test_texts_of_a_few_tokens_are_not_compared(check):
    """The level does not hold on them (`test_agreement`)."""
    assert check(records(10.0, 12.0), [7]).verdict == "not applicable"
    finding = check(records(10.0, 90.0) + records(10.0, 10.3), [7, 10])
    assert finding.verdict == "pass" and finding.value == pytest.approx(0.03)


def test_totals_of_texts_add_up():
    both = records(1.0, 2.0) + records(3.0, 4.0)
    assert total(both, "iid").nats == 6 and total(both, "iid").stderr == pytest.approx(0.1 * math.sqrt(2))


def test_claims_are_judged_by_intervals():
    own = Total.of([Estimate(-50.0, 0.5, 8, 1)])
    reach = 3 * own.reach()
    right = [Claim(text="a", nats=50 - 0.9 * reach), Claim(text="b", nats=50 + 0.9 * reach)]
    assert judge_claims(right, [own, own], [20, 20], 1e-4).verdict == "pass"
    wrong = [*right, Claim(text="c", nats=50 - 1.1 * reach)]
    found = judge_claims(wrong, [own] * 3, [20] * 3, 1e-4)
    assert found.verdict == "fail" and found.value == pytest.approx(1 / 3)
    assert "text 2" in found.explanation and "below 50.000" in found.explanation
    unsure = [Claim(text="c", nats=50 - 1.1 * reach, stderr=reach)]
    assert judge_claims(unsure, [own], [20], 1e-4).verdict == "pass"
    assert judge_claims([], [], [], 1e-4).verdict == "not applicable"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", "no content|no line|empty"),
        ("\n\n", "no line with a text and its nats"),
        ('{"text": "a"}', "line 1.*nats"),
        ('{"text": "a", "nats": 1}\n{"text": "b", "nats": "2"}', "line 2.*nats"),
        ('{"text": "a", "nats": 1, "sterr": 2}', "line 1.*sterr"),
        ('{"text": "a", "nats": 1, "stderr": -2}', "line 1.*stderr"),
        ('{"text": "", "nats": 1}', "text 0 is empty"),
        ("[1]", "line 1"),
        ("{", "line 1"),
    ],
)
def test_malformed_claims_are_named(tmp_path, content, parts):
    path = tmp_path / "claims.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=parts):
        read_claims(str(path))


def test_claims_are_read(tmp_path):
    path = tmp_path / "claims.jsonl"
    path.write_text('{"text": "a", "nats": 1.5}\n\n{"text": "b", "nats": 2, "stderr": 0.1}\n')
    assert read_claims(str(path)) == [Claim(text="a", nats=1.5), Claim(text="b", nats=2.0, stderr=0.1)]
    assert read_claims(None) == []
