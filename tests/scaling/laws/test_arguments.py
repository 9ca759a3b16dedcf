"""Wrong arguments of the fits: one line each."""

import math
from dataclasses import replace

import numpy as np
import pytest
from support.simulated_sweep import simulated

from diffusionlm.errors import UserError
from diffusionlm.scaling.laws import held_out, isoflop_fits, parametric, suspects
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.laws.surface_fit import fit_surface

FITS = (analyse, fit_surface, parametric.fit, suspects.outliers, held_out.largest_budget)


@pytest.mark.parametrize("fit", FITS, ids=lambda fit: f"{fit.__module__}.{fit.__name__}")
@pytest.mark.parametrize("results", ["points.csv", 3.0, None, [{"loss": 3.0}], simulated()[0], {"loss": [3.0]}])
def test_what_is_no_list_of_runs_is_refused(fit, results):
    with pytest.raises(UserError, match=r"^results=.* must be a list of runs \(CellResult\)") as error:
        fit(results)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("fit", FITS, ids=lambda fit: f"{fit.__module__}.{fit.__name__}")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"budget": math.inf},
            r"^results\[2\]\.budget=inf must be a positive number of FLOPs, or NaN for a run of none$",
        ),
        ({"budget": 0.0}, r"^results\[2\]\.budget=0\.0 must be a positive number"),
        ({"budget": None}, r"^results\[2\]\.budget=None must be a positive number of FLOPs"),
        ({"budget": 10**400}, r"^results\[2\]\.budget=10{50,}.* must be a positive number of FLOPs"),
        ({"params": "1"}, r"^results\[2\]\.params='1' must be a positive number$"),
        ({"loss": None}, r"^results\[2\]\.loss=None must be a number of nats, or NaN for a run without one$"),
        ({"arm_share": math.nan}, r"^results\[2\]\.arm_share=nan must be at least 0 and below 1$"),
        ({"arm_share": 25}, r"^results\[2\]\.arm_share=25 must be at least 0 and below 1$"),
        ({"params": 0}, r"^results\[2\]\.params=0 must be a positive number$"),
        ({"tokens": -5}, r"^results\[2\]\.tokens=-5 must be a positive number$"),
        ({"arm_share": 0.5, "budget": math.nan}, r"^results\[2\]\.budget=nan, but a run with an autoregressive share"),
    ],
)
def test_a_run_with_numbers_that_no_fit_can_use_is_refused(fit, change, message):
    results = simulated()
    results[2] = replace(results[2], **change)
    with pytest.raises(UserError, match=message):
        fit(results)


@pytest.mark.parametrize("wrong", ["points.csv", None, [{"loss": 3.0}]])
def test_both_collections_of_runs_are_checked(wrong):
    with pytest.raises(UserError, match=r"^results=.* must be a list of runs \(CellResult\)"):
        held_out.larger_runs(wrong, simulated())
    with pytest.raises(UserError, match=r"^held_out=.* must be a list of runs \(CellResult\)"):
        held_out.larger_runs(simulated(), wrong)


@pytest.mark.parametrize("fit", [isoflop_fits.parabola, isoflop_fits.power_law])
def test_columns_of_points_are_lists_of_numbers(fit):
    for wrong in (1.0, "abc", ["a", "b"], None, [[1.0, 2.0], [3.0, 4.0]], [1.0, [2.0]]):
        with pytest.raises(UserError, match="must be a list of numbers, one for each point"):
            fit(wrong, [1.0, 2.0])
    with pytest.raises(UserError, match="log_. has 4, lo.* has 3"):
        fit([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert fit([1.0, 2.0, 3.0], np.array([3.0, 2.0, 3.0])) is not None


@pytest.mark.parametrize("draws", [0, -1, 2.5, "many", True])
def test_a_number_of_draws_is_a_positive_whole_number(draws):
    with pytest.raises(UserError, match="must be a positive whole number"):
        analyse(simulated(), draws=draws)


@pytest.mark.parametrize(
    ("log_n", "loss", "message"),
    [
        ([], [], "log_n is empty"),
        ([1.0, 2.0, 3.0], [3.0, np.nan, 3.0], r"loss\[1\]=nan must be finite"),
        ([1.0, np.inf, 3.0], [3.0, 2.0, 3.0], r"log_n\[1\]=inf must be finite"),
        ([1.0, 2.0, 2.0], [3.0, 2.0, 3.0], "log_n has 2 different sizes, and a parabola needs three"),
    ],
)
def test_a_parabola_needs_three_sizes_and_finite_numbers(log_n, loss, message):
    with pytest.raises(UserError, match=message):
        isoflop_fits.parabola(log_n, loss)


@pytest.mark.parametrize(
    ("log_c", "log_y", "message"),
    [
        ([], [], "log_c is empty"),
        ([1.0, np.nan], [3.0, 2.0], r"log_c\[1\]=nan must be finite"),
        ([2.0, 2.0], [3.0, 2.0], "log_c has 1 different budget, and a power law needs two"),
    ],
)
def test_a_power_law_needs_two_budgets_and_finite_numbers(log_c, log_y, message):
    with pytest.raises(UserError, match=message):
        isoflop_fits.power_law(log_c, log_y)
