"""Checks of values: sums of probabilities, and nats of short targets against their exact ones."""

import numpy as np
from scipy import special

from diffusionlm.evaluation.certificate.reference import below, over_orders
from diffusionlm.evaluation.certificate.subject import REPEATS, Subject
from diffusionlm.evaluation.certificate.verdicts import Finding, judge, not_applicable

ENUMERATED = 4096  # tokens whose probabilities are scored one by one; of a larger vocabulary, the most probable ones
PAIRED = 8  # tokens that are paired: their square is the number of scores
MISSES = 0.075  # of 95% intervals, that are granted: their widths come from a few passes
CLIPPED = 1e-3  # the masking rate below which released code draws none


def sums_to_one(subject: Subject) -> Finding:
    """Sum p over all tokens that may come after a prefix."""
    prefix, _ = subject.samples[0]
    log_p_V = subject.reference.next_log_p(prefix, 1)
    order = np.argsort(-log_p_V)
    probable = [int(i) for i in order[:ENUMERATED] if np.isfinite(log_p_V[i]) and i != subject.model.config.mask_id]
    rest = max(0.0, float(np.exp(log_p_V).sum() - np.exp(log_p_V[probable]).sum()))
    scores = subject.method.score([(prefix, [token]) for token in probable], exact=True)
    p = np.exp([-score.nats for score in scores])
    noise = float(3 * np.sqrt(np.sum((p * [score.reach for score in scores]) ** 2)))
    return judge(
        abs(float(p.sum()) + rest - 1),
        10 * subject.rounding + noise,
        f"The distance from 1 of the sum of exp(-nats) over the {len(probable)} most probable tokens after a prefix, "
        f"with the {rest:.1e} that a plain forward pass gives all others; it may be a rounding error.",
    )


def pairs_below_exact(subject: Subject) -> Finding:
    """Sum p over a slice of all pairs of tokens; a bound gives them no more than the model does."""
    if subject.autoregressive:
        return not_applicable("The likelihood of an autoregressive model is no bound.")
    prefix, _ = subject.samples[0]
    log_p_V = subject.reference.next_log_p(prefix, 2)
    if (mask_id := subject.model.config.mask_id) is not None and mask_id < len(log_p_V):
        log_p_V[mask_id] = -np.inf
    tokens = [int(i) for i in np.argsort(-log_p_V)[:PAIRED]]
    pairs = [(prefix, [first, second]) for first in tokens for second in tokens]
    exact = np.exp([-over_orders(cost).mixture for cost in subject.reference.costs(pairs)])
    scores = subject.method.score(pairs, exact=True)
    p, reach = np.exp([-score.nats for score in scores]), np.array([score.reach for score in scores])
    noise = float(3 * np.sqrt(np.sum((p * reach) ** 2)) + np.sum(p * reach**2) / 2)  # exp is convex
    return judge(
        float(p.sum() - exact.sum()),
        2 * subject.rounding + noise,
        f"The sum of exp(-nats) over all {len(pairs)} pairs of the {PAIRED} most probable tokens, less the "
        f"{exact.sum():.3f} that they have together when one token at a time is filled in, in a random order; a "
        "bound's may not be larger. All other pairs have the rest to 1.",
    )


def exact_score_matches(subject: Subject) -> Finding:
    """Compare the exact scores of short targets with the mean over all orders by plain enumeration."""
    scores = subject.method.score(subject.samples, exact=True)
    differences = [abs(score.nats - orders.mean) for score, orders in zip(scores, subject.orders, strict=True)]
    tolerances = [subject.noise([score]) for score in scores]
    worst = int(np.argmax(np.divide(differences, tolerances)))
    what = "the plain forward pass" if subject.autoregressive else "the mean over all orders, enumerated plainly"
    return judge(
        differences[worst],
        tolerances[worst],
        f"The largest distance in nats of the exact scores of {len(scores)} short targets from {what}; it may be a "
        "rounding error, or 3 half-widths of the interval that was given.",
    )


def estimate_matches_exact(subject: Subject) -> Finding:
    """Compare the mean of many Monte Carlo estimates of a short target with its exact bound."""
    if subject.autoregressive:
        return not_applicable("Nothing is drawn for an autoregressive model.")
    exact, (mean, noise) = subject.orders[0].mean, _mean_estimate(subject)
    return judge(
        abs(mean - exact),
        noise,
        f"The distance in nats of the mean of {REPEATS} estimates of a short target, with other noise each, from its "
        f"exact bound, {exact:.4f}; 4 standard errors are allowed, from how the estimates differ.",
    )


def bound_not_below_exact(subject: Subject) -> Finding:
    """Compare the estimates with the exact cost when tokens are filled in one at a time in random order."""
    if subject.autoregressive:
        return not_applicable("The likelihood of an autoregressive model is no bound.")
    exact, (mean, noise) = subject.orders[0].mixture, _mean_estimate(subject)
    return judge(
        exact - mean,
        noise,
        f"The exact nats of a short target, {exact:.4f}, when one token at a time is filled in, in a random order, "
        f"less the mean of {REPEATS} estimates of the bound; above noise, it would be none (Jensen's inequality).",
    )


def _mean_estimate(subject: Subject) -> tuple[float, float]:
    """Return the mean of the repeated estimates, and the nats by which it may miss its expectation."""
    nats = np.array([score.nats for score in subject.estimates])
    slack = subject.rounding * len(subject.samples[0][1])
    return float(nats.mean()), 4 * float(nats.std(ddof=1)) / len(nats) ** 0.5 + slack


def interval(subject: Subject) -> Finding:
    """Count how often the 95% interval of a short target contains its exact bound."""
    if subject.autoregressive:
        return not_applicable("The likelihood of an autoregressive model is exact, without an interval.")
    exact, slack = subject.orders[0].mean, subject.rounding * len(subject.samples[0][1])
    missed = sum(not abs(score.nats - exact) <= score.reach + slack for score in subject.estimates)
    allowed = next(k for k in range(REPEATS) if special.bdtrc(k, REPEATS, MISSES) < 1e-3)
    return judge(
        missed / REPEATS,
        allowed / REPEATS,
        f"The share of {REPEATS} intervals of one short target, with other noise each, that miss its exact bound; more "
        f"than are allowed would come once in 1,000 times from intervals that hold {1 - MISSES:.1%}.",
    )


def clipping(subject: Subject) -> Finding:
    """Look for the part of the bound that comes from masking rates below 0.001."""
    if subject.autoregressive:
        return not_applicable("An autoregressive model has no masking rates.")
    scores = subject.method.score(subject.samples, exact=True)
    exact = sum(orders.mean for orders in subject.orders)
    hidden = sum(below(cost, CLIPPED) for cost in subject.costs)
    noise = subject.noise(scores)
    if noise > hidden / 2:
        return not_applicable(
            f"Rates below {CLIPPED} hold {hidden / exact:.2e} of the bound of short targets, which noise hides."
        )
    return judge(
        (exact - sum(score.nats for score in scores)) / exact,
        hidden / exact / 2,
        f"The share of the bound of {len(scores)} short targets that their scores lack; masking rates below {CLIPPED} "
        f"hold {hidden / exact:.2e} of it, of which half is allowed.",
    )


def chain_rule(subject: Subject) -> Finding:
    """Compare the chain rule's scores of short targets with the left-to-right order by plain enumeration."""
    if subject.autoregressive:
        return not_applicable("The chain rule of an autoregressive model is its one exact value.")
    scores = subject.method.score(subject.samples, left_to_right=True)
    pairs = list(zip(scores, subject.orders, strict=True))
    orders = [order for _, order in pairs]
    return judge(
        max(abs(score.nats - order.left_to_right) for score, order in pairs),
        max(subject.noise([score]) for score in scores),
        f"The largest distance in nats of the chain rule's scores from the cost of this one order. Together the "
        f"{len(pairs)} short targets cost {sum(order.left_to_right for order in orders):.3f} in it, "
        f"{sum(order.mean for order in orders):.3f} in the mean over orders, which is the bound, and from "
        f"{sum(order.cheapest for order in orders):.3f} to {sum(order.dearest for order in orders):.3f} in others.",
    )
