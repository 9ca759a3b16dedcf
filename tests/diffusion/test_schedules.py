"""Schedules: the identities between alpha, its derivative and the weight; golden values; ends."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from diffusionlm.config import DiffusionConfig
from diffusionlm.diffusion import schedules
from diffusionlm.errors import UserError

CONFIGS = {
    "linear": DiffusionConfig(schedule="linear"),
    "cosine": DiffusionConfig(schedule="cosine"),
    "square": DiffusionConfig(schedule="polynomial", polynomial_power=2.0),
    "root": DiffusionConfig(schedule="polynomial", polynomial_power=0.5),
    "geometric": DiffusionConfig(schedule="geometric", geometric_min=1e-4, geometric_max=20.0),
}
TIMES = np.linspace(0.002, 0.998, 250)

# The formulas of MD4 Table 1 and MDLM's geometric noise, in numpy float64: the probability of a mask.
MASKED = {
    "linear": lambda t: t,
    "cosine": lambda t: np.cos(np.pi / 2 * (1 - t)),
    "square": lambda t: t**2,
    "root": lambda t: np.sqrt(t),
    "geometric": lambda t: -np.expm1(-(1e-4 ** (1 - t)) * 20.0**t),
}


@pytest.fixture(params=list(CONFIGS))
def name(request):
    return request.param


def test_alpha_and_mask_probability_are_the_papers(name):
    schedule = schedules.build(CONFIGS[name])
    t = jnp.asarray(TIMES, jnp.float32)
    np.testing.assert_allclose(schedule.mask_probability(t), MASKED[name](TIMES), rtol=3e-6)
    np.testing.assert_allclose(schedule.alpha(t), 1 - MASKED[name](TIMES), rtol=1e-5, atol=3e-7)


def test_the_identities_hold_in_double_precision(name):
    with jax.enable_x64(True):
        schedule = schedules.build(CONFIGS[name])
        t = jnp.asarray(TIMES)
        alpha, slope = jax.jvp(schedule.alpha, (t,), (jnp.ones_like(t),))
        np.testing.assert_allclose(schedule.mask_probability(t), 1 - alpha, rtol=1e-9)
        np.testing.assert_allclose(schedule.weight(t), -slope / (1 - alpha), rtol=1e-9)


def test_the_weight_is_the_measured_slope(name):
    """The same identity without automatic differentiation and without the library's alpha."""
    h = 1e-6
    slope = (MASKED[name](TIMES + h) - MASKED[name](TIMES - h)) / (2 * h)
    weight = schedules.build(CONFIGS[name]).weight(jnp.asarray(TIMES, jnp.float32))
    # The weight of "cosine" and "geometric" goes to 0 at t = 1, where single precision has few digits of 1 - t left.
    np.testing.assert_allclose(weight, slope / MASKED[name](TIMES), rtol=2e-5, atol=1e-6)


def test_the_weights_add_up_to_the_logarithm_of_the_masking_range(name):
    """w dt = dm/m, which is why the bound does not depend on the schedule."""
    nodes, widths = np.polynomial.legendre.leggauss(200)
    t, widths = 0.525 + 0.475 * nodes, 0.475 * widths
    total = (np.asarray(schedules.build(CONFIGS[name]).weight(jnp.asarray(t, jnp.float32)), np.float64) * widths).sum()
    assert total == pytest.approx(math.log(MASKED[name](1.0) / MASKED[name](0.05)), rel=1e-5)


def test_the_mean_mask_probability_is_the_integral_over_time(name):
    mean, _ = integrate.quad(MASKED[name], 0, 1, epsabs=1e-12)
    assert schedules.build(CONFIGS[name]).mean_mask_probability() == pytest.approx(mean, rel=1e-7)


def test_the_mean_mask_probability_of_a_geometric_schedule_that_ends_far_from_a_full_mask():
    """No term of its closed form is negligible here."""
    mean, _ = integrate.quad(lambda t: -math.expm1(-(0.05 ** (1 - t)) * 2**t), 0, 1, epsabs=1e-12)
    assert schedules.Geometric(0.05, 2.0).mean_mask_probability() == pytest.approx(mean, rel=1e-9)


def test_alpha_falls_from_one_to_zero(name):
    schedule = schedules.build(CONFIGS[name])
    low, high = (1e-4, 20.0) if name == "geometric" else (0.0, math.inf)
    ends = np.asarray(schedule.alpha(jnp.array([0.0, 1.0])))
    np.testing.assert_allclose(ends, [math.exp(-low), math.exp(-high)], atol=1e-7)
    np.testing.assert_allclose(schedule.mask_probability(jnp.array([0.0, 1.0])), 1 - ends, atol=1e-7)
    t = jnp.linspace(0.0, 1.0, 101)
    assert (np.diff(schedule.alpha(t)) < 0).all() and (np.diff(schedule.mask_probability(t[:-5])) > 0).all()
    assert (schedule.weight(t[1:]) > -1e-6).all()


def test_mask_probability_keeps_its_digits_where_it_is_small(name):
    """1 - alpha in single precision would have none left at t = 1e-6."""
    t = np.array([1e-6, 1e-5, 1e-4])
    probability = schedules.build(CONFIGS[name]).mask_probability(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(probability, MASKED[name](t), rtol=3e-6)


@pytest.mark.parametrize(
    "name, t, alpha, weight",
    [
        ("linear", 0.25, 0.75, 4.0),
        ("cosine", 0.5, 1 - math.sqrt(0.5), math.pi / 2),
        ("square", 0.5, 0.75, 4.0),
        ("root", 0.25, 0.5, 2.0),
        # sigma(1/2) is the geometric mean of both ends; its slope is sigma * ln(2e5).
        ("geometric", 0.5, 0.956264, 0.0447214 * 12.206073 / 0.0457364),
    ],
)
def test_hand_examples(name, t, alpha, weight):
    schedule = schedules.build(CONFIGS[name])
    assert float(schedule.alpha(jnp.float32(t))) == pytest.approx(alpha, rel=1e-5)
    assert float(schedule.weight(jnp.float32(t))) == pytest.approx(weight, rel=1e-5)


def test_schedules_are_values(name):
    """Equal settings give equal schedules, and different ones different schedules."""
    first, second = schedules.build(CONFIGS[name]), schedules.build(replace(CONFIGS[name]))
    assert first == second and hash(first) == hash(second)
    assert len({schedules.build(cfg) for cfg in CONFIGS.values()}) == len(CONFIGS)


def test_every_schedule_is_tested():
    assert {cfg.schedule for cfg in CONFIGS.values()} == set(schedules.SCHEDULES)


@pytest.mark.parametrize(
    "name, says", [("linaer", "did you mean 'linear'"), ("zzz", "known: cosine, geometric, linear, polynomial")]
)
def test_an_unknown_name_is_told_with_a_way_out(name, says):
    with pytest.raises(UserError) as error:
        schedules.build(DiffusionConfig(schedule=name))
    message = str(error.value)
    assert repr(name) in message and says in message and "\n" not in message


@pytest.mark.parametrize(
    "fields",
    [
        {"schedule": "polynomial", "polynomial_power": 100.0},
        {"schedule": "polynomial", "polynomial_power": 1e-30},
        {"schedule": "geometric", "geometric_min": 1e-30, "geometric_max": 1e6},
        {"schedule": "linear"},
        {"schedule": "cosine"},
    ],
)
def test_at_the_ends_of_its_ranges_a_schedule_is_finite(fields):
    cfg = DiffusionConfig(t_min=1e-12, **fields)
    cfg.validate()
    schedule = schedules.build(cfg)
    t = jnp.asarray([cfg.t_min, 1e-6, 0.5, 1.0], jnp.float32)
    for values in (schedule.alpha(t), schedule.mask_probability(t), schedule.weight(t)):
        assert np.isfinite(values).all()
    assert 0 <= schedule.mean_mask_probability() <= 1
