"""The sentences at the top of the page: what the sweep shows, and what it cannot show."""

from collections.abc import Sequence
from typing import TypeVar

from diffusionlm.scaling.laws.analysis import Analysis
from diffusionlm.scaling.laws.bend import bend
from diffusionlm.scaling.laws.bootstrap import Estimate
from diffusionlm.scaling.laws.diagnostics import listed, p_words
from diffusionlm.scaling.laws.gap import Gap, quoted
from diffusionlm.scaling.laws.next_cells import WORTH
from diffusionlm.scaling.laws.objective import ObjectiveFit
from diffusionlm.scaling.laws.power_laws import Prediction
from diffusionlm.scaling.laws.verdict import doubts
from diffusionlm.scaling.report.formatting import number, with_unit
from diffusionlm.scaling.report.road_sentences import about_roads
from diffusionlm.scaling.sweep.results import OBJECTIVES

T = TypeVar("T")


def summary(analysis: Analysis) -> list[str]:
    """Return the sentences, one for each paragraph."""
    sentences = []
    for fit in analysis.objectives.values():
        if not fit.arm_share:
            sentences += _about_objective(fit)
    if analysis.roads:
        sentences += about_roads(analysis.roads)
    sentences += [_about_gap(gap) for gap in quoted(analysis.gaps, analysis.objectives)]
    sentences.append(_about_intervals(analysis))
    shown = [fit for fit in analysis.objectives.values() if fit.laws and not fit.arm_share and not fit.hanging]
    sentences += map(_about_bend, shown)
    sentences.append("The loss of a masked diffusion model is an upper bound, that of an autoregressive one is exact.")
    others = [name for name in ("uniform", "mlm", "prime") if name in analysis.objectives]
    sentences += [f"The loss of {name.upper()} is that of {OBJECTIVES[name]}." for name in others]
    return sentences


def _about_intervals(analysis: Analysis) -> str:
    """Say what the intervals hold, by where the noise comes from."""
    known = [fit.noise for fit in analysis.objectives.values() if fit.noise]
    if not known:
        surfaces = [surface_exponent(fit) for fit in analysis.objectives.values()]
        if any(exponent and exponent.interval for exponent in surfaces):
            return (
                "There are no intervals but those of the surface, which rest on the scatter of the losses about it, "
                "because the noise is unknown; so nothing here says how sure any of the other numbers is."
            )
        return "There are no intervals, because the noise is unknown; so nothing here says how sure any number is."
    sds = " and ".join(dict.fromkeys(f"{noise.sd:.3g}" for noise in known))
    held = {
        "given": f"a noise of {sds} nats between runs, which was given and not measured here",
        "residuals": f"the scatter of the runs about the fitted curves ({sds} nats), which contains their misfit",
    }.get(known[0].source, "the noise of the runs and, for diffusion, of the evaluation masks")
    if wider := [name.upper() for name, fit in analysis.objectives.items() if fit.widened]:
        held += f" (of {listed(wider)}: the larger scatter about the curves)"
    laws = any(fit.laws for fit in analysis.objectives.values())
    return (
        f"Intervals hold {held}, {'' if laws else 'and '}the shape of the curves as far as the losses leave it open"
        f"{', and how far optima scatter about their law beyond the noise' if laws else ''}. They do not hold the "
        "choice of held-out text, learning rate or data."
    )


def surface_exponent(fit: ObjectiveFit) -> Estimate | None:
    """Return the exponent of N* of the surface as it is shown: without an interval where that would say nothing.

    Without a noise, the scatter about the surface is shown for what it is only where there is nothing else. Of losses
    that lie on a surface the interval has no length.
    """
    if not fit.surface:
        return None
    exponent = fit.surface.exponent
    empty = exponent.interval is not None and exponent.width == 0
    return Estimate(exponent.value) if empty or (fit.budgets and not fit.noise) else exponent


def _about_objective(fit: ObjectiveFit) -> list[str]:
    name, sentences = fit.objective.upper(), []
    if fit.hanging:
        return [f"The laws of {name} hang on a suspected cell, so none is quoted, nor a gap."]
    if fit.laws:
        params, loss = fit.laws["params"].exponent, fit.laws["loss"].exponent
        sentences.append(
            f"For {name}, the best model size grows as C to the power {number(params)} and the best loss changes "
            f"as C to the power {number(loss)}{'' if fit.noise else '; how surely is unknown, because the noise is'}."
        )
    elif (surface := fit.parametric) and not fit.budgets:
        error = ", without an error, because the noise is unknown"
        if surface.stderr:
            error = f" \N{PLUS-MINUS SIGN} {surface.stderr[0]:.2g} (standard error)"
        sentences.append(
            f"For {name}, the parametric law of all runs has the best model size grow as C to the power "
            f"{surface.params_exponent:.3g}{error}."
            if surface.determined
            else f"For {name}, the parametric law of all runs does not determine how the best model size grows with C."
        )
    if ahead := fit.prediction:
        sentences.append(
            f"With {ahead.budget:.3g} FLOPs, {name} {'should' if fit.noise else 'would, by its laws,'} reach "
            f"{number(ahead.loss)} nats per token with about {number(ahead.params)} parameters"
            + (f"{_otherwise(fit, ahead)}, but its laws are in doubt." if doubts(fit) else ".")
        )
    if best := next((run for run in fit.candidates if run.loss_reduction is not None), None):
        share = best.loss_reduction or 0.0
        sentences.append(
            f"The run that would most reduce the uncertainty of that loss has {with_unit(best.params, 3)} parameters "
            f"and {best.budget:.3g} FLOPs: it takes {100 * share:.0f}% off the variance."
            if share >= WORTH and fit.noise
            else f"A run of {with_unit(best.params, 3)} parameters and {best.budget:.3g} FLOPs would say most about "
            "that loss, if all runs scatter alike and budgets not at all beyond that; by how much is unknown."
            if share >= WORTH
            else "None of the candidates for the next cell settles that loss: the best takes less than 1% off its "
            "variance, since budgets scatter about the law by more than any of them is uncertain. More budgets would."
        )
    return sentences


def _otherwise(fit: ObjectiveFit, ahead: Prediction) -> str:
    """Return the loss that is to be expected if the law bends as its optima do; "" where they do not."""
    signs = bend(fit)
    if not signs.shown:
        return ""
    if ahead.bent_loss:
        return f", or {number(ahead.bent_loss)} if the law bends there as it does between the budgets"
    return (
        f", by a law that misses the largest budget by {abs(ahead.hindcast.value):.2g} nats" if ahead.hindcast else ""
    )


def _about_gap(gap: Gap) -> str:
    name, reference = gap.objective.upper(), gap.reference.upper()
    largest = max(factor for factors in gap.extrapolations for factor in factors)
    beyond = f", with a law extrapolated by up to {largest:.3g} times in compute" if largest > 1 else ""
    if gap.parallel:
        return (
            f"{name} needs {number(gap.common)} times the compute of {reference} for the same loss, if their laws are "
            f"taken to be parallel{beyond}{'' if gap.common and gap.common.interval else '; its interval is unknown'}."
        )
    parts = [f"{number(e)} at {reference}'s {c:.3g} FLOPs" for c, e, _ in _ends(gap.at_budgets)]
    parts += [f"{number(e)} at its own {c:.3g} FLOPs" for c, e in _ends(gap.at_own)]
    sentence = f"For the same loss {name} needs a multiple of the compute of {reference}: {', '.join(parts)}{beyond}."
    if gap.law is None:
        return f"{sentence} There is no falling loss law of {name} that would say it at other budgets."
    return f"{sentence} No one number is the gap, since the exponents of the two laws differ."


def _ends(rows: Sequence[T]) -> Sequence[T]:
    """Return the first and the last item."""
    return rows if len(rows) < 2 else (rows[0], rows[-1])


def _about_bend(fit: ObjectiveFit) -> str:
    """Say whether the sweep would have shown an irreducible term of the loss."""
    name, law, ahead = fit.objective.upper(), fit.laws["loss"], fit.prediction
    bent = ahead.bent_loss if ahead else None
    p = law.lack_of_fit.p if law.lack_of_fit else None
    if not bend(fit).shown:
        known = "nothing here tests whether there is one"
        if fit.used_noise is None and len(law.budgets) > 2:
            known = "its optima bend by no more than they scatter, which is no test, because the noise is unknown"
        if p is not None:
            known = (
                f"its optima do not show one (misfit {p_words(p)}): so small a bend cannot be told from a slightly "
                "different exponent"
            )
        return (
            f"The law of {name}'s loss has no irreducible term, and {known}. Far beyond the next budget it will be too "
            "optimistic."
        )
    test = "" if p is None else f" (misfit {p_words(p)})"
    sentence = f"The law of {name}'s loss is not a straight line in logarithms{test}."
    if ahead is None or bent is None or bent.value <= ahead.loss.value:
        return f"{sentence} It is not to be trusted at the next budget."
    return (
        f"{sentence} It bends upwards, as an irreducible term makes it: at the next budget the {number(ahead.loss)} of "
        f"the straight law is too optimistic, and a second-order term would give {number(bent)}."
    )
