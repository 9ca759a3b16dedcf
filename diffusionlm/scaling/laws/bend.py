"""Tell whether the losses of a sweep bend away from their power law, with or without a noise.

An irreducible loss bends log L* over log C upwards, and the power law is then too low at the next budget. Where the
noise is known, intervals say so. Where it is not, what the law misses is compared with the error that it has by the
scatter of the runs about their curves, or by that of the optima about the bent law if this is larger. Without a scatter
nothing can be said.
"""

from typing import NamedTuple

import numpy as np
from scipy import stats

from diffusionlm.scaling.laws.diagnostics import suspicious
from diffusionlm.scaling.laws.isoflop_fits import gls_weights
from diffusionlm.scaling.laws.objective import ObjectiveFit

LEVEL = 0.05  # at which a straight law is called bent, for either sign
SMALL = 1e-3  # of the loss: less is 2% of the compute where L* falls as C^-0.05, and of no consequence


class Bend(NamedTuple):
    """Two signs that the law of the loss is not straight."""

    missed: bool  # the law through the other budgets misses the largest one
    bent: bool  # a second-order term changes the prediction, or the optima leave the straight line

    @property
    def shown(self) -> bool:
        """True if there is any sign."""
        return self.missed or self.bent


def bend(fit: ObjectiveFit) -> Bend:
    """Return the signs of a bend in the losses of one objective; none where there is no prediction."""
    ahead = fit.prediction
    if not ahead:
        return Bend(False, False)
    if fit.used_noise is None:
        return _by_size(fit, ahead.budget)
    missed = ahead.hindcast is not None and ahead.hindcast.excludes(0)
    bent = ahead.bent_loss is not None and ahead.bent_loss.excludes(ahead.loss.value)
    return Bend(missed, bent or suspicious(fit.laws["loss"].lack_of_fit))


def _by_size(fit: ObjectiveFit, budget: float) -> Bend:
    """Compare what the law misses with what the scatter explains, both in log L*."""
    optima = [row.optimum for row in fit.budgets if row.optimum and row.optimum.usable]
    if len(optima) < 3 or not fit.shape or not fit.shape.scatter:
        return Bend(False, False)
    log_c, log_loss = np.log([o.budget for o in optima]), np.array([o.logs["loss"] for o in optima])
    variances, dof = fit.shape.scatter**2 * np.array([o.variances()["loss"] for o in optima]), fit.shape.dof
    bent = np.zeros_like(log_loss)
    if len(optima) > 3:
        bent_here = np.stack([_at(c, log_c, 2) for c in log_c])
        residuals = log_loss - bent_here @ log_loss
        of_optima = float(residuals @ residuals) / (len(optima) - 3)
        if of_optima > variances.mean():
            variances, dof = np.full_like(log_loss, of_optima), len(optima) - 3
        bent = _at(np.log(budget), log_c, 2) - _at(np.log(budget), log_c, 1)
    missed = np.append(_at(log_c[-1], log_c[:-1], 1), -1.0)
    return Bend(*(_large(weights, log_loss, variances, dof) for weights in (missed, bent)))


def _at(log_c: float, places: np.ndarray, degree: int) -> np.ndarray:
    """Return the weights (points,) of log L* at `places` in the polynomial through them, at `log_c`."""
    powers = np.vander(places - places.mean(), degree + 1, increasing=True)
    return (log_c - places.mean()) ** np.arange(degree + 1) @ gls_weights(powers, np.eye(len(places)))


def _large(weights: np.ndarray, log_loss: np.ndarray, variances: np.ndarray, dof: float) -> bool:
    """Return True if a weighted sum of log L* is beyond its error and of consequence."""
    size = abs(float(weights @ log_loss))
    return size > max(float(stats.t.isf(LEVEL / 2, dof) * np.sqrt(weights**2 @ variances)), SMALL)
