"""The report as one page: no network, no script; warnings and tables first, then the pictures, which it contains."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusionlm.scaling.laws.analysis import Analysis, ObjectiveFit
from diffusionlm.scaling.laws.checks import SUSPICIOUS, SYMBOLS, doubts
from diffusionlm.scaling.laws.power_laws import Gap
from diffusionlm.scaling.laws.published import PublishedLaw
from diffusionlm.scaling.laws.uncertainty import Estimate

CAPTIONS = {
    "isoflop.png": "Held-out loss over model size, one parabola for each budget. Black stars are optima with 95% "
    "intervals, hollow ones are in no law (the warnings say why), and outside the grid none is drawn. An arrow is "
    "where an interval goes on; bars on points are the standard deviation between seeds.",
    "laws.png": "Optimal size, tokens and loss over compute, with 95% bands of the power laws; the dotted line is the "
    "next budget, where there is a prediction. Crosses are in no law. Grey: slopes of published laws, moved to go "
    "through the middle of these optima, since their text, tokenizers and counts of N are others. One of the loss is "
    "drawn only within its own range.",
    "gap.png": "Left: how many times the compute is needed for the same loss. Lines are the distance of the two laws, "
    "dashed where one is extrapolated; points are measured optima against the law of the reference, whose budgets are "
    "the grey range. Right: ratio of optimal sizes at the same budget.",
    "residuals.png": "What the parabolas leave over; grey is two standard deviations between seeds. A common bend "
    "means that the parabola is the wrong curve (bias); scatter is noise.",
    "envelope.png": "Approach 1, a cross-check: smoothed training curves, without their ends, and their lower "
    "envelope.",
}

ABSENT = {  # what is said instead of a picture
    "laws.png": "No plot of the laws: no budget has an optimum that could be in one.",
    "gap.png": "No plot of the gap: it needs laws of arm and an optimum of one other objective.",
    "residuals.png": "No plot of residuals: no budget has a minimum.",
    "envelope.png": "No plot of the envelope: it needs curves of three sizes that go on beyond the smallest budget.",
}


def render(
    analysis: Analysis, content: Mapping[str, Any], pictures: Mapping[str, bytes], published: Sequence[PublishedLaw]
) -> str:
    """The page.

    Args:
      analysis: that it shows.
      content: of report.json.
      pictures: PNG files by name.
      published: laws that are drawn.
    """
    fits = list(analysis.objectives.values())
    warnings = "".join(f"<li>{_text(line)}</li>" for line in analysis.warnings)
    sections = [
        f'<p class="verdict">{_text(content["verdict"])}</p>',
        "<section><h2>Warnings</h2>"
        + (f'<ul class="warnings">{warnings}</ul>' if warnings else "<p>None.</p>")
        + "</section>",
        f"<section><h2>What this shows, and what it cannot</h2>{_summary(analysis)}</section>",
        _section("What was measured", _table(["", ""], list(content["context"].items())), ""),
        _section("Optima", _optima(fits), _OPTIMA_NOTE),
        _section("Power laws", _laws(fits), _LAWS_NOTE),
        _section("The laws without one budget", _without(fits), _WITHOUT_NOTE),
        _section("Compute gap", _gaps(analysis), _GAP_NOTE),
        _section("Prediction for the next budget", _predictions(fits), _PREDICTION_NOTE),
        _section("The next cell", _next_cells(content), _NEXT_NOTE),
        "".join(
            f'<figure><img src="data:image/png;base64,{base64.b64encode(data).decode()}" alt="{_text(CAPTIONS[name])}">'
            f"<figcaption>{_text(CAPTIONS[name])}</figcaption></figure>"
            for name, data in pictures.items()
        ),
        "".join(f'<p class="note">{_text(line)}</p>' for name, line in ABSENT.items() if name not in pictures),
        _section("Cross-checks", _cross_checks(fits), _CHECKS_NOTE),
        _section("Evaluation error", _paired(fits), _PAIRED_NOTE),
        _section("Published laws", _published(published), ""),
    ]
    title = _text(content["title"])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p class="note">{_text(content["cells"])} finished cells. Losses are in nats per token on
held-out text; brackets hold 95% intervals. All numbers are in report.json, cells.csv and optima.csv.</p>
{"".join(sections)}
</body>
</html>
"""


def _summary(analysis: Analysis) -> str:
    said = []
    for fit in analysis.objectives.values():
        name = fit.objective.upper()
        if fit.laws:
            of_n, of_loss = fit.laws["params"].exponent, fit.laws["loss"].exponent
            said.append(
                f"For {name}, the best model size grows as C to the power {_number(of_n)} and the best loss changes "
                f"as C to the power {_number(of_loss)}."
            )
        if fit.prediction:
            ahead = fit.prediction
            said.append(
                f"With {ahead.budget:.3g} FLOPs, {name} should reach {_number(ahead.loss)} nats per token with about "
                f"{_number(ahead.params)} parameters" + (", but its laws are in doubt." if doubts(fit) else ".")
            )
        if fit.candidates and fit.laws:
            best = fit.candidates[0]
            said.append(
                f"The run that would most reduce the uncertainty of that loss has {_plain(best.params, 3)} parameters "
                f"and {best.budget:.3g} FLOPs: it takes {100 * best.loss_reduction:.0f}% off the variance."
            )
    said += [_gap_in_words(gap) for gap in analysis.gaps]
    cannot = [
        "Intervals hold the noise between training seeds and, for diffusion, of the evaluation masks. They do not "
        "hold the misfit of the curves, which stands beside them as bias, nor the choice of held-out text, learning "
        "rate or data.",
        *(_bend_in_words(fit) for fit in analysis.objectives.values() if fit.laws),
        "The loss of a masked diffusion model is an upper bound, that of an autoregressive one is exact.",
    ]
    return "".join(f"<p>{_text(line)}</p>" for line in [*said, *cannot])


def _gap_in_words(gap: Gap) -> str:
    name, reference = gap.objective.upper(), gap.reference.upper()
    widest = max(factor for factors in gap.beyond for factor in factors)
    beyond = f", with a law extrapolated by up to {widest:.3g} times in compute" if widest > 1 else ""
    if gap.parallel:
        return (
            f"{name} needs {_number(gap.common)} times the compute of {reference} for the same loss, if their laws are "
            f"taken to be parallel{beyond}."
        )
    said = [f"{_number(e)} at {reference}'s {c:.3g} FLOPs" for c, e, _ in _ends(gap.at_budgets)]
    said += [f"{_number(e)} at its own {c:.3g} FLOPs" for c, e in _ends(gap.at_own)]
    told = f"For the same loss {name} needs a multiple of the compute of {reference}: {', '.join(said)}{beyond}."
    if gap.laws[0] is None:
        return f"{told} There is no falling loss law of {name} that would say it at other budgets."
    return f"{told} No one number is the gap, since the exponents of the two laws differ."


def _ends(rows: Sequence) -> Sequence:
    """The first and the last."""
    return rows if len(rows) < 2 else (rows[0], rows[-1])


def _bend_in_words(fit: ObjectiveFit) -> str:
    """Whether an irreducible term of the loss would have been seen."""
    name, law, ahead = fit.objective.upper(), fit.laws["loss"], fit.prediction
    bent = ahead.bent_loss if ahead else None
    bends = bent is not None and bent.low is not None and not bent.low <= ahead.loss.value <= bent.high
    p = law.lack_of_fit.p if law.lack_of_fit else None
    if p is None:
        return (
            f"The law of {name}'s loss has no irreducible term, and nothing here tests whether there is one. Far "
            "beyond the next budget it will be too optimistic."
        )
    if p >= SUSPICIOUS and not bends:
        return (
            f"The law of {name}'s loss has no irreducible term, and its optima do not show one (misfit p = {p:.2g}): "
            "so small a bend cannot be told from a slightly different exponent. Far beyond the next budget it will be "
            "too optimistic."
        )
    said = f"The law of {name}'s loss is no straight line in logarithms (misfit p = {p:.2g})."
    if bent is None or bent.value <= ahead.loss.value:
        return f"{said} It is not to be trusted at the next budget."
    return (
        f"{said} It bends upwards, as an irreducible term makes it: at the next budget a second-order term would give "
        f"{_number(bent)} instead of {_number(ahead.loss)}, which is too optimistic."
    )


_OPTIMA_NOTE = (
    "Minima of a least-squares parabola of the loss in log N at each budget. Intervals: parametric bootstrap that "
    "draws the noise variance too (for N* it equals Fieller's interval). Bias: by how much the optimum would move, "
    "had the curve a cubic term as large as all budgets together show. Misfit: p value that the residuals are only "
    "noise."
)


def _optima(fits: Sequence[ObjectiveFit]) -> str:
    rows = []
    for fit in fits:
        for row in fit.budgets:
            if row.params is None:
                cells = ["no optimum", "", "", "", "", ""]
            else:
                shifted = row.shift_log_n is not None and np.isfinite(row.shift_log_n)
                misfit = row.lack_of_fit.p if row.lack_of_fit else None
                cells = [
                    _number(row.params),
                    _number(row.tokens),
                    _number(row.loss),
                    f"{np.exp(row.shift_log_n):.3f}x" if shifted else "",
                    f"{row.shift_loss:+.4f}" if shifted else "",
                    "" if misfit is None else f"{misfit:.2g}",
                ]
            counts = f"{row.sizes} sizes, {len(row.runs)} runs" + ("" if row.usable else "; not in the laws")
            rows.append([fit.objective.upper(), f"{row.budget:.3g}", *cells, counts])
    header = ["", "C (FLOPs)", "N*", "D* (tokens)", "L* (nats/token)", "bias of N*", "bias of L*", "misfit p", "from"]
    return _table(header, rows)


_LAWS_NOTE = (
    "Generalised least squares of logarithms on log C, each optimum weighted by its variance. Bias: what the biases "
    "of the optima do to the exponent. Misfit: how far optima lie from the law beyond the noise, and its p value."
)


def _laws(fits: Sequence[ObjectiveFit]) -> str:
    rows = []
    for fit in fits:
        for key, law in fit.laws.items():
            found = law.lack_of_fit
            misfit = (
                "" if found is None else f"{100 * found.sd:.2g}%" + ("" if found.p is None else f", p = {found.p:.2g}")
            )
            rows.append(
                [
                    fit.objective.upper(),
                    SYMBOLS[key],
                    _number(law.exponent, 4),
                    f"{law.fit.log_prefactor:.4g}",
                    "" if law.shift_exponent is None else f"{law.shift_exponent:+.1g}",
                    misfit,
                    str(len(law.budgets)),
                ]
            )
    return _table(["", "of", "exponent of C", "log of prefactor", "bias of exponent", "misfit", "budgets"], rows)


_WITHOUT_NOTE = (
    "The exponents without one of the budgets. A star marks those outside of the interval of all: the law hangs on "
    "that budget. Noise alone does that to one law in seven, and to one in three where optima are few or some are "
    "known much worse than others."
)


def _without(fits: Sequence[ObjectiveFit]) -> str:
    budgets = sorted({c for fit in fits for law in fit.laws.values() for c, _ in law.without})
    rows = []
    for fit in fits:
        for key, law in fit.laws.items():
            if law.without:
                outside = dict(law.hangs_on)
                found = {c: _number(e) + (" *" if c in outside else "") for c, e in law.without}
                cells = [found.get(c, "") for c in budgets]
                rows.append([fit.objective.upper(), SYMBOLS[key], _number(law.exponent), *cells])
    return _table(["", "of", "all budgets", *(f"without {c:.3g}" for c in budgets)], rows)


_GAP_NOTE = (
    "At a budget of the reference: the factor by which the compute must grow for the loss that the reference has with "
    "C FLOPs, the horizontal distance of the two laws. At a budget of the other objective: its C over the compute with "
    "which the law of the reference has the loss of its measured optimum. Extrapolated: how many times beyond its "
    "budgets the law is read off. One exponent: both laws taken to be parallel, where nothing speaks against that."
)


def _gaps(analysis: Analysis) -> str:
    rows = []
    for gap in analysis.gaps:
        name, reference = gap.objective.upper(), gap.reference.upper()
        pair, ratios = f"{name} over {reference}", dict(gap.size_ratio)
        for (c, factor, _), beyond in zip(gap.at_budgets, gap.beyond[0], strict=True):
            rows.append([pair, f"{c:.3g} of {reference}", _number(factor), _extrapolated(name, beyond), ""])
        for (c, factor), beyond in zip(gap.at_own, gap.beyond[1], strict=True):
            ratio = _number(ratios[c]) if c in ratios else ""
            rows.append([pair, f"{c:.3g} of {name}", _number(factor), _extrapolated(reference, beyond), ratio])
        if gap.common is not None:
            equal = "" if gap.equal_p is None else f"exponents equal: p = {gap.equal_p:.2g}"
            common = _number(gap.common) if gap.parallel else "rejected"
            rows.append([pair, "one exponent", common, equal, _number(gap.size_ratio_law)])
    return _table(["", "C (FLOPs)", "gap", "extrapolated", "ratio of N*"], rows)


def _extrapolated(name: str, factor: float) -> str:
    return f"law of {name}, {factor:.3g} times" if factor > 1 else "no"


_PREDICTION_NOTE = (
    "The laws one step further. One run: the interval for the loss of a single run. Bent law: the loss if log L* had "
    "a second-order term in log C. Hindcast: the largest measured budget predicted from the others, minus what was "
    "measured."
)


def _predictions(fits: Sequence[ObjectiveFit]) -> str:
    rows = [
        [
            fit.objective.upper(),
            f"{ahead.budget:.3g}",
            _number(ahead.params),
            _number(ahead.tokens),
            _number(ahead.loss),
            _range(ahead.loss_of_run),
            _number(ahead.bent_loss) if ahead.bent_loss else "",
            _number(ahead.hindcast, 2) if ahead.hindcast else "",
        ]
        for fit in fits
        if (ahead := fit.prediction)
    ]
    return _table(["", "C (FLOPs)", "N*", "D*", "L*", "one run", "bent law L*", "hindcast error"], rows)


_NEXT_NOTE = (
    "What one more run would take off the variance of the predicted log L* and log N*, by the linearised fits: a run "
    "at a budget that is there adds to its parabola, a run at the next one measures the prediction. Without laws: the "
    "run that the smallest measured loss of a budget points to. Cost is in units of the next budget; the ranking for "
    "the cost divides by it. Size: the nearest one of the sweep."
)


def _next_cells(content: Mapping[str, Any]) -> str:
    rows = [
        [
            cell["objective"].upper(),
            ", ".join(cell["best_for"]),
            f"{cell['budget']:.3g}",
            _plain(cell["params"], 3),
            cell["nearest_preset"],
            cell["kind"],
            *(
                "" if share is None else f"{100 * share:.0f}%"
                for share in (cell["loss_reduction"], cell["params_reduction"])
            ),
            f"{cell['relative_cost']:.2g}",
        ]
        for cell in content["next_cells"]
    ]
    header = ["", "best for", "C (FLOPs)", "N", "size", "kind", "off Var log L*", "off Var log N*", "cost"]
    return _table(header, rows)


_CHECKS_NOTE = (
    "Approach 1 takes the envelope of training curves, Approach 3 fits E + A/N^alpha + B/D^beta to all cells (Huber "
    "loss, L-BFGS). Only exponents and L* of Approach 3 are determined by such data; E, A and B trade off against "
    "each other. Not determined: fewer than three sizes are on the envelope; the standard error of an exponent of "
    "Approach 3 is more than half of it."
)


def _cross_checks(fits: Sequence[ObjectiveFit]) -> str:
    rows = []
    for fit in fits:
        name, last = fit.objective.upper(), fit.budgets[-1].budget
        ahead = fit.prediction
        if fit.laws:
            n, loss = fit.laws["params"].exponent, fit.laws["loss"].exponent
            at = [_number(ahead.loss)] if ahead else [""]
            rows.append([name, "Approach 2 (parabolas)", _number(n, 4), _number(loss, 4), *at])
        if fit.envelope is None or fit.envelope.params_law is None:
            rows.append([name, "Approach 1 (envelope)", "not determined", "not determined", ""])
        else:
            n, loss = fit.envelope.params_law.exponent, fit.envelope.loss_law.exponent
            rows.append([name, "Approach 1 (envelope)", f"{n:.4f}", f"{loss:.4f} (training loss)", ""])
        if (surface := fit.parametric) and not surface.determined:
            rows.append([name, "Approach 3 (parametric)", "not determined", "not determined", ""])
        elif surface:
            error = f" \N{PLUS-MINUS SIGN} {surface.stderr[0]:.2g} (standard error)" if surface.stderr else ""
            first = fit.budgets[0].budget
            change = np.log(surface.optimum(last)[2] / surface.optimum(first)[2])
            at = f"{surface.optimum(ahead.budget)[2]:.4g}" if ahead else ""
            exponent = f"{change / np.log(last / first):.4f} (average)" if last > first else ""
            rows.append([name, "Approach 3 (parametric)", f"{surface.params_exponent:.4f}{error}", exponent, at])
    return _table(["", "", "exponent of N*", "exponent of L*", "L* at the next budget"], rows)


_PAIRED_NOTE = (
    "All cells are evaluated with the same documents and masks. Error: the largest standard error of a difference "
    "between two sizes, from differences draw by draw. Effect: the largest minus the smallest loss over the sizes."
)


def _paired(fits: Sequence[ObjectiveFit]) -> str:
    rows = [
        [
            fit.objective.upper(),
            f"{row.budget:.3g}",
            f"{row.paired.stderr:.2g}" if row.paired.stderr else "exact for this text",
            f"{row.paired.stderr_unpaired:.2g}" if row.paired.stderr else "",
            f"{row.paired.effect:.3g}",
            "yes" if row.paired.small else "no",
        ]
        for fit in fits
        for row in fit.budgets
        if row.paired
    ]
    return _table(["", "C (FLOPs)", "error (nats)", "unpaired", "effect (nats)", "below a tenth"], rows)


def _published(published: Sequence[PublishedLaw]) -> str:
    rows = []
    for law in published:
        convention = f"N: {law.convention['N']}; C: {law.convention['C']}"
        fitted = "{:.2g} to {:.2g}".format(*law.fitted_range) if law.fitted_range else "not stated"
        rows.append([law.title, law.source, convention, fitted, law.how])
    return _table(["law", "source", "convention", "fitted range (FLOPs)", "how"], rows)


def _section(title: str, table: str, note: str) -> str:
    return f'<section><h2>{_text(title)}</h2>{table}<p class="note">{_text(note)}</p></section>' if table else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _number(estimate: Estimate, digits: int = 3) -> str:
    """A value with its interval; both have the digits that the interval's width deserves, but at least `digits`."""
    if estimate.bounded and estimate.value:
        width = max(estimate.high - estimate.low, 1e-12 * abs(estimate.value))
        digits = int(np.clip(np.floor(np.log10(abs(estimate.value) / width)) + 3, digits, 6))
    value = _plain(estimate.value, digits)
    return value if estimate.low is None else f"{value} {_range(estimate, digits)}"


def _range(estimate: Estimate, digits: int = 4) -> str:
    if estimate.low is None:
        return ""
    ends = [_plain(end, digits) if np.isfinite(end) else "unbounded" for end in (estimate.low, estimate.high)]
    return f"[{ends[0]},\N{NO-BREAK SPACE}{ends[1]}]"


def _plain(value: float, digits: int) -> str:
    scale, letter = next(((p, x) for p, x in ((12, "T"), (9, "G"), (6, "M"), (3, "k")) if abs(value) >= 10**p), (0, ""))
    return f"{value / 10**scale:#.{digits}g}".rstrip(".") + letter  # with the zeros that say how exact it is


def _text(value: Any) -> str:
    return html.escape(str(value))


_STYLE = """
:root { color-scheme: light dark; --line: color-mix(in srgb, CanvasText 22%, Canvas); }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 68rem; margin: 1rem auto; padding: 0 1rem;
  background: Canvas; color: CanvasText; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; } .note { font-size: .85rem; opacity: .85; }
.verdict { font-size: 1.1rem; font-weight: 600; }
.warnings { border-left: .3rem solid #d55e00; padding: .3rem .5rem .3rem 1.6rem; margin: .4rem 0; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; min-width: 4rem; } th { font-weight: 600; }
figure { margin: 1.6rem 0; } img { width: 100%; height: auto; } figcaption { font-size: .85rem; opacity: .85; }
/* Pictures are drawn on white; turned over, their hues stay and they do not glare on a dark page. */
@media (prefers-color-scheme: dark) { img { filter: invert(.92) hue-rotate(180deg); } }
"""
