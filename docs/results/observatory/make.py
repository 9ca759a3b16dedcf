"""Refit everybody's scaling data in one way, and write the observatory's page, numbers and pictures.

python docs/results/observatory/make.py --data DIR/laws

The data are not in this repository; the page names the sources. Without --data, the page and the pictures are written
again from observatory.json.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import diffusion
import page
import pictures
import refits
import sources
import summary
import tyro

from diffusionlm.scaling.sweep import results

HERE = Path(__file__).parent
SMALL_SWEEP = HERE.parent / "isoflop_cpu" / "results.json"
SURFACES = {  # of exact_surfaces.csv
    "symmetric": {"E": 1.69, "A": 400.0, "B": 400.0, "alpha": 0.31, "beta": 0.31},
    "chinchilla": {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
    "asymmetric": {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.465, "beta": 0.155},
    "cs336": {"E": 2.69, "A": 1606.4, "B": 3210.7, "alpha": 0.34, "beta": 0.36},
}


@dataclass(frozen=True)
class Options:
    """Hold the options of `make.py`."""

    data: Path | None = None  # the folder laws/; None: write the page again from observatory.json
    output: Path = HERE


def compute(data: Path) -> dict[str, Any]:
    """Return all numbers of the page."""
    numbers: dict[str, Any] = {
        "version": 1,
        "exponents": [],
        "held_out": [],
        "larger_runs": [],
        "twins": [],
        "bias": [],
    }
    for origin in sources.ORIGINS:
        if origin.file in sources.OPTIMA:
            continue
        for group in sources.groups(data, origin.file):
            if origin.file in sources.SYNTHETIC:
                truth = SURFACES[group.name.split()[0].removeprefix("exact_").split("_x")[0]]
                numbers["bias"].append(refits.bias(group.name.split()[0], truth, group.results))
            else:
                _experiment(numbers, data, origin, group)
    _ours(numbers)
    numbers["twins"].append(refits.gap_of_optima(data))
    numbers["optima"] = refits.optima_exponents(data)
    numbers["diffusion"] = _diffusion(data, numbers["exponents"])
    numbers["summary"] = summary.of(numbers)
    return numbers


def _experiment(numbers: dict[str, Any], data: Path, origin: sources.Origin, group: Any) -> None:
    """Add the fits of one experiment."""
    analysis = refits.analysed(group.results, origin.noise)
    for objective, fit in analysis.objectives.items():
        stated = sources.exponent(data, group.name, objective)
        numbers["exponents"].append(refits.exponents(group.name, origin.title, fit, stated))
    numbers["twins"] += refits.twins(group.name, analysis)
    numbers["held_out"] += refits.largest_left_out(group.name, group.results, origin.noise)
    flags = {"flag extrapolation", "flag held_out"}
    later = [left.run for left in group.left_out if left.reason in flags]
    if later:
        numbers["larger_runs"] += refits.larger_runs(group.name, group.results, later, origin.noise)


def _ours(numbers: dict[str, Any]) -> None:
    """Add the sweep of this repository, whose noise is that of its seeds."""
    runs = results.load(SMALL_SWEEP)
    analysis = refits.analysed(runs, None)
    for fit in analysis.objectives.values():
        numbers["exponents"].append(refits.exponents("isoflop_cpu", "isoflop_cpu, of this repository", fit, None))
    numbers["twins"] += refits.twins("isoflop_cpu", analysis)
    numbers["held_out"] += refits.largest_left_out("isoflop_cpu", runs, None)


def _diffusion(data: Path, exponents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what is known of masked diffusion, and what would tell the laws apart."""
    [group] = sources.groups(data, "mdm_prime_v2")
    prime = refits.analysed(group.results, sources.RESIDUALS, full=True)
    fit, ours = prime.objectives["mdm"], refits.analysed(results.load(SMALL_SWEEP), None).objectives["mdm"]
    if fit.surface is None or fit.used_noise is None:
        raise RuntimeError("the points of MDM-Prime-v2 have lost their surface or their noise")
    published = diffusion.published_rows(data)
    fitted = diffusion.fitted_rows("mdm_prime_v2", "MDM-Prime-v2's plain models, refitted", fit)
    small = diffusion.fitted_rows("isoflop_cpu", "isoflop_cpu, of this repository", ours, at=())
    scatters = {
        row["name"]: row["curves"]["effect"] for row in exponents if row["objective"] == "mdm" and row["curves"]
    }
    prime_scatter = scatters[group.name]
    kempner = median(row["curves"]["effect"] for row in exponents if row["name"].startswith("kempner"))
    masked = [row for row in (*published, *fitted) if row["objective"] == "mdm"]
    return {
        "laws": [*published, *fitted, *small],
        "cost": diffusion.cost_of_another_law(masked, fit.surface),
        "next_cells": diffusion.next_cells(prime),
        "apart": diffusion.apart(masked),
        "ladders": diffusion.ladders(fit.surface, fit.used_noise.sd, {"prime": prime_scatter, "kempner": kempner}),
        "scatter": {"prime": refits.number(prime_scatter), "kempner": refits.number(kempner)},
        "recounted": [{"budget": c, "params": diffusion.recounted(fit, c)} for c in diffusion.AT],
    }


def main() -> None:
    """Fit, unless there are numbers already, and write."""
    options = tyro.cli(Options, description=__doc__)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "observatory.json"
    if options.data:
        text = json.dumps(compute(options.data), indent=1, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")
    numbers = json.loads(path.read_text(encoding="utf-8"))
    (options.output / "index.md").write_text(page.render(numbers), encoding="utf-8")
    pictures.draw(numbers, options.output)
    (options.output / "observatory.html").write_text(pictures.interactive(numbers), encoding="utf-8")


if __name__ == "__main__":
    main()
