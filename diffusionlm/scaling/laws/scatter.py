"""Whether the losses of an objective scatter as the noise that was given for them says."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from scipy import stats

from diffusionlm.scaling.laws.diagnostics import REJECTED, p_words
from diffusionlm.scaling.laws.objective import ObjectiveFit


class Contrast(NamedTuple):
    """A scatter that the given noise is not."""

    noise: float  # nats, as given
    scatter: float  # nats
    about: Literal["curves", "surface"]
    p: float  # of a scatter so far from the noise

    @property
    def too_large(self) -> bool:
        """True if the noise is larger than the scatter."""
        return self.noise > self.scatter

    def __str__(self) -> str:
        how = "larger" if self.too_large else "smaller"
        return (
            f"the given noise of {self.noise:.3g} nats is {how} than the scatter about the {self.about}, "
            f"{self.scatter:.3g} ({p_words(self.p)})"
        )


def contrasts(fit: ObjectiveFit) -> list[Contrast]:
    """Return where a given noise is not the scatter of the losses (F tests, p < `REJECTED`).

    A noise that is larger than the scatter about the curves, or about the surface where there are no curves, is too
    large: nothing that is random makes a scatter less. One that is smaller than that about the surface is not what that
    surface is fitted with; curves that do not fit within a noise have a warning of their own.
    """
    noise = fit.noise
    if noise is None or noise.source != "given":
        return []
    shape, surface, rows = fit.shape, fit.surface, []
    if surface and surface.scatter:
        p = float(stats.f.sf((surface.scatter / noise.sd) ** 2, surface.dof, noise.dof))
        rows.append(Contrast(noise.sd, surface.scatter, "surface", p))
    about, scatter, dof = "surface", surface.scatter if surface else None, surface.dof if surface else 0
    if shape and shape.scatter:
        about, scatter, dof = "curves", shape.scatter, shape.dof
    if scatter and dof and scatter < noise.sd:
        rows.append(Contrast(noise.sd, scatter, about, float(stats.f.cdf((scatter / noise.sd) ** 2, dof, noise.dof))))
    return [row for row in rows if row.p < REJECTED]


def too_large(fit: ObjectiveFit) -> Contrast | None:
    """Return how a given noise is too large; None if it is not."""
    return next((row for row in contrasts(fit) if row.too_large), None)


def scatter_warnings(fit: ObjectiveFit) -> Iterator[tuple[int, str]]:
    """Yield weight and text of a warning for each scatter that the given noise is not."""
    for row in contrasts(fit):
        if row.too_large:
            weight = 2 if fit.laws else 0
            rest = "so intervals are too wide, and optima and misfits go unseen; give less, or --noise residuals"
        else:
            weight = 4 if fit.budgets else 2
            rest = "which the errors of the surface and of Approach 3 use"
        yield weight, f"{fit.objective}: {row}, {rest}"
