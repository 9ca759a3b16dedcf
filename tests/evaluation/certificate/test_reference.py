"""Check what the certificate takes for exact by definitions of its own: permutations, quadrature, enumeration."""

import itertools
import math

import jax
import numpy as np
import pytest
from scipy import integrate
from support.tiny_likelihood import (
    ARM,
    MASK,
    MDM,
    PREFIX,
    SHIFTED,
    TARGET,
    bound,
    log_probabilities,
    next_token,
    nll_of_masks,
    params_of,
)

from diffusionlm.config import MeshConfig
from diffusionlm.evaluation.certificate.reference import Reference, below, over_orders
from diffusionlm.parallel.mesh import make_mesh

N = 4
SETS = np.array([[s >> i & 1 for i in range(N)] for s in range(1 << N)], bool)
TABLE = np.where(SETS, np.random.default_rng(0).gamma(2.0, size=SETS.shape), 0.0)


class Loaded:
    """Stand in for the part of a loaded model that the reference reads."""

    def __init__(self, config):
        self.config, self.params = config, params_of(config)
        self.mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])

    def on_mesh(self):
        return jax.set_mesh(self.mesh)


def of_order(order):
    """The cost of predicting the tokens in one order, all later ones masked."""
    hidden, nats = 2**N - 1, 0.0
    for i in order:
        nats += TABLE[hidden, i]
        hidden &= ~(1 << i)
    return nats


def test_orders_against_all_permutations():
    costs = np.array([of_order(order) for order in itertools.permutations(range(N))])
    found = over_orders(TABLE)
    assert found.mean == pytest.approx(costs.mean())
    assert found.mixture == pytest.approx(-math.log(np.exp(-costs).mean()))
    assert (found.cheapest, found.dearest) == pytest.approx((costs.min(), costs.max()))
    assert found.left_to_right == pytest.approx(of_order(range(N)))
    # The relations that docs/certificate.md states.
    assert found.cheapest <= found.mixture <= found.mean <= found.dearest
    assert found.mixture <= found.left_to_right + math.log(math.factorial(N))


def test_the_part_below_a_rate_against_quadrature():
    """The bound is the integral over rates t of the expected cost of the masked tokens over t."""

    def integrand(t):
        c = SETS.sum(-1)[1:]
        return (t ** (c - 1.0) * (1 - t) ** (N - c) * TABLE[1:].sum(-1)).sum()

    for t in (1e-3, 0.2, 1.0):
        assert below(TABLE, t) == pytest.approx(integrate.quad(integrand, 0, t)[0], rel=1e-8)
    assert below(TABLE, 1.0) == pytest.approx(over_orders(TABLE).mean)
    assert over_orders(TABLE[:2, :1]) == pytest.approx((TABLE[1, 0],) * 5)


def test_costs_of_a_network():
    """Compare costs with those of another enumeration of the masks; repeated rows are run once."""
    reference = Reference(Loaded(MDM))
    (costs, again) = reference.costs([(PREFIX, TARGET), (PREFIX, TARGET)])
    expected = np.where(SETS[1:], nll_of_masks(SETS[1:].tolist()), 0.0)
    np.testing.assert_allclose(costs[1:], expected, atol=1e-4)
    assert (costs == again).all() and reference.forwards == 15
    assert over_orders(costs).mean == pytest.approx(bound(), abs=1e-4)
    first = reference.next_log_p(PREFIX, N)
    assert np.exp(first).sum() == pytest.approx(1) and -first[TARGET[0]] == pytest.approx(costs[-1, 0], abs=1e-5)


@pytest.mark.slow
def test_costs_of_shifted_and_autoregressive_models():
    (costs,) = Reference(Loaded(ARM)).costs([(PREFIX, TARGET)])
    tokens = [*PREFIX, *TARGET]
    expected = [-next_token(tokens[: len(PREFIX) + i])[token] for i, token in enumerate(TARGET)]
    np.testing.assert_allclose(costs, [expected], atol=1e-4)
    assert over_orders(costs) == pytest.approx((sum(expected),) * 5, abs=1e-3)
    (shifted,) = Reference(Loaded(SHIFTED)).costs([(PREFIX, TARGET)])
    rows = [PREFIX + [MASK if m else t for m, t in zip(mask, TARGET, strict=True)] for mask in SETS[1:]]
    log_p = log_probabilities(SHIFTED, rows)[:, len(PREFIX) - 1 : -1]  # the state before a token predicts it
    expected = [[-log_p[r, i, token] for i, token in enumerate(TARGET)] for r in range(len(rows))]
    np.testing.assert_allclose(shifted[1:], np.where(SETS[1:], expected, 0.0), atol=1e-4)
