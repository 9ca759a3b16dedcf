"""`dlm.scaling`: fits of arrays find the laws that the arrays were made of."""

import numpy as np
import pytest

import diffusionlm as dlm
from diffusionlm.errors import UserError

BUDGET = np.repeat([1e18, 1e19, 1e20, 1e21], 7)
BEST = 0.1 * BUDGET**0.5
PARAMS = BEST * np.tile(np.geomspace(0.5, 2, 7), 4)
TOKENS = BUDGET / (6 * PARAMS)


def surface_losses():
    return 1.69 + 406.4 / PARAMS**0.34 + 410.7 / TOKENS**0.28


def test_parabolas_of_arrays_have_the_exponents_of_their_law():
    loss = 4.0 * (BUDGET / 1e18) ** -0.05 + 0.1 * np.log(PARAMS / BEST) ** 2
    with pytest.warns(dlm.scaling.ScalingWarning) as caught:
        fit = dlm.scaling.fit_isoflops(BUDGET, PARAMS, TOKENS, loss, objective="mdm", noise=0.001)
    assert any("rest on the given noise of 0.001 nats" in str(warning.message) for warning in caught)
    assert {warning.filename for warning in caught} == {__file__}
    assert fit.laws["params"].exponent.value == pytest.approx(0.5, abs=1e-6)
    assert fit.laws["loss"].exponent.value == pytest.approx(-0.05, abs=1e-6)
    assert fit.laws["params"].exponent.bounded and len(fit.budgets) == 4


def test_a_surface_of_arrays_is_that_which_they_were_made_of():
    loss = surface_losses()
    for fit_, kind, fewest in (
        (dlm.scaling.fit_surface, dlm.scaling.SurfaceFit, 7),
        (dlm.scaling.fit_parametric, dlm.scaling.Parametric, 6),
    ):
        fit = fit_(PARAMS, TOKENS, loss)
        assert isinstance(fit, kind) and fit.determined
        assert (fit.e, fit.alpha, fit.beta) == pytest.approx((1.69, 0.34, 0.28), rel=1e-4)
        with pytest.raises(UserError, match=f"needs {fewest} different runs; these are 5"):
            fit_(PARAMS[:5], TOKENS[:5], loss[:5])


def test_doubts_about_arrays_are_warnings_and_those_of_points_are_in_the_analysis():
    loss = surface_losses()
    loss[9] /= np.log(2)
    with pytest.warns(dlm.scaling.ScalingWarning) as caught:
        dlm.scaling.fit_isoflops(BUDGET, PARAMS, TOKENS, loss)
    lines = [str(warning.message) for warning in caught]
    assert sum("record 9: its loss is 1.44 times" in line for line in lines) == 1
    assert any("no intervals, because the noise is unknown" in line for line in lines)
    assert not any("gap between objectives" in line for line in lines)
    columns = {"objective": ["arm"] * 28, "params": PARAMS, "tokens": TOKENS, "loss": loss, "budget": BUDGET}
    [group] = dlm.scaling.read_points(columns | {"flag": ["outlier"] + [""] * 27})
    analysis = dlm.scaling.fit_points(group)
    assert any("record 9: its loss is 1.44 times" in line for line in analysis.warnings)
    assert [left.reason for left in analysis.left_out] == ["flag outlier"]
    with pytest.raises(UserError, match="fit_points takes one group, not a list; read_points returns a list of them"):
        dlm.scaling.fit_points([group])


def test_a_surface_that_runs_do_not_determine_is_a_warning():
    log_c = np.log(BUDGET)
    for fit in (dlm.scaling.fit_surface, dlm.scaling.fit_parametric):
        with pytest.warns(dlm.scaling.ScalingWarning, match="these runs do not determine the"):
            fit(PARAMS, TOKENS, 9.0 - 0.1 * log_c + 0.01 * np.sin(37 * log_c + 5 * PARAMS / BEST))


def test_mistakes_in_arrays_name_the_row():
    for fit in (dlm.scaling.fit_surface, dlm.scaling.fit_parametric):
        with pytest.raises(UserError, match=r"record 2: loss=-1.0"):
            fit([1e8] * 3, [1e9] * 3, [3, 3, -1])
        with pytest.raises(UserError, match="must be of one length"):
            fit([1e8] * 3, [1e9] * 2, [3, 3, 3])
        with pytest.raises(UserError, match="unknown objective 'gpt'"):
            fit([1e8], [1e9], [3], objective="gpt")
        with pytest.raises(UserError, match=r"^params=100000000.0 must be an array with a number for each run$"):
            fit(1e8, [1e9], [3])
        with pytest.raises(UserError, match=r"^tokens='many' must be an array"):
            fit([1e8], "many", [3])
        with pytest.raises(UserError, match="loss must be an array .*: its rows are of several lengths"):
            fit([1e8, 1e8], [1e9, 1e9], [[3], [3, 4]])


def test_the_names_are_there():
    assert {name: getattr(dlm.scaling, name) for name in dir(dlm.scaling)}.keys() == set(dlm.scaling.__all__)
    laws = dlm.scaling.published_laws()
    assert isinstance(laws["chinchilla"], dlm.scaling.PublishedLaw)
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        dlm.scaling.fit  # noqa: B018
