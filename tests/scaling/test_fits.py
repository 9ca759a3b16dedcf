"""`dlm.scaling`: fits of arrays find the laws that the arrays were made of."""

import numpy as np
import pytest

import diffusionlm as dlm
from diffusionlm.errors import UserError

BUDGET = np.repeat([1e18, 1e19, 1e20, 1e21], 7)
BEST = 0.1 * BUDGET**0.5
PARAMS = BEST * np.tile(np.geomspace(0.5, 2, 7), 4)
TOKENS = BUDGET / (6 * PARAMS)


def test_parabolas_of_arrays_have_the_exponents_of_their_law():
    loss = 4.0 * (BUDGET / 1e18) ** -0.05 + 0.1 * np.log(PARAMS / BEST) ** 2
    fit = dlm.scaling.fit_isoflops(BUDGET, PARAMS, TOKENS, loss, objective="mdm", noise=0.001)
    assert fit.laws["params"].exponent.value == pytest.approx(0.5, abs=1e-6)
    assert fit.laws["loss"].exponent.value == pytest.approx(-0.05, abs=1e-6)
    assert fit.laws["params"].exponent.bounded and len(fit.budgets) == 4


def test_a_surface_of_arrays_is_that_which_they_were_made_of():
    loss = 1.69 + 406.4 / PARAMS**0.34 + 410.7 / TOKENS**0.28
    fit = dlm.scaling.fit_surface(PARAMS, TOKENS, loss)
    assert isinstance(fit, dlm.scaling.Parametric)
    assert (fit.e, fit.alpha, fit.beta) == pytest.approx((1.69, 0.34, 0.28), rel=1e-4)
    with pytest.raises(UserError, match="needs six different runs; these are 5"):
        dlm.scaling.fit_surface(PARAMS[:5], TOKENS[:5], loss[:5])


def test_mistakes_in_arrays_name_the_row():
    with pytest.raises(UserError, match="the table row 2: loss=-1.0"):
        dlm.scaling.fit_surface([1e8] * 3, [1e9] * 3, [3, 3, -1])
    with pytest.raises(UserError, match="must be of one length"):
        dlm.scaling.fit_surface([1e8] * 3, [1e9] * 2, [3, 3, 3])
    with pytest.raises(UserError, match="unknown objective 'gpt'"):
        dlm.scaling.fit_surface([1e8], [1e9], [3], objective="gpt")


def test_the_names_are_there():
    assert {name: getattr(dlm.scaling, name) for name in dir(dlm.scaling)}.keys() == set(dlm.scaling.__all__)
    laws = dlm.scaling.published_laws()
    assert isinstance(laws["chinchilla"], dlm.scaling.PublishedLaw)
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        dlm.scaling.fit  # noqa: B018
