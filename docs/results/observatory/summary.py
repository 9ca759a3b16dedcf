"""Counts over the tables of the observatory, which its prose quotes."""

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

REJECTED = 1.5  # times the scatter about the curves: a surface with more than twice the variance does not fit
Rows = Sequence[Mapping[str, Any]]


def of(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return all counts."""
    fitted = [row for row in numbers["exponents"] if row["curves"]]
    rows = [row for row in fitted if not row["hanging"]]  # a law that hangs on suspected cells is not quoted
    return {
        "experiments": len(fitted),
        "hanging": [f"{row['name']} {row['objective']}" for row in fitted if row["hanging"]],
        "published": _published(rows),
        "porian": _published([row for row in rows if row["name"].startswith("porian")]),
        "moved": _moved(rows),
        "surface": _surface(fitted),
        "held_out": [
            _held(numbers["held_out"], method, quantity)
            for method in ("laws", "surface")
            for quantity in ("params", "loss")
        ],
        "larger_runs": [
            _held([row for row in numbers["larger_runs"] if row["name"].startswith("kempner")], method, "loss")
            for method in ("laws", "surface")
        ],
        "bias": _bias(numbers["bias"]),
    }


def _published(rows: Rows) -> dict[str, Any]:
    """Count the published exponents that our interval holds, and the published intervals that it overlaps."""
    stated = [row for row in rows if row["published"] and row["curves"]["low"] is not None]
    wide = [row for row in stated if row["published"]["low"] is not None]
    inside = [r for r in stated if r["curves"]["low"] <= r["published"]["value"] <= r["curves"]["high"]]
    overlap = [
        r for r in wide if r["published"]["low"] <= r["curves"]["high"] and r["curves"]["low"] <= r["published"]["high"]
    ]
    return {
        "stated": len(stated),
        "inside": len(inside),
        "outside": [f"{row['name']} {row['objective']}" for row in stated if row not in inside],
        "with_interval": len(wide),
        "overlap": len(overlap),
    }


def _moved(rows: Rows) -> dict[str, Any]:
    """Compare the exponents of plain parabolas with those of our curves, where both have an optimum at each budget."""
    rows = [row for row in rows if row["plain_same"]["optima"] == row["curves"]["optima"]]
    moves = {f"{row['name']} {row['objective']}": row["plain_same"]["value"] - row["curves"]["value"] for row in rows}
    farthest = max(moves, key=lambda name: abs(moves[name]))
    outside = [
        f"{row['name']} {row['objective']}"
        for row in rows
        if row["curves"]["low"] is not None
        and not row["curves"]["low"] <= row["plain_same"]["value"] <= row["curves"]["high"]
    ]
    return {
        "median": round(median(map(abs, moves.values())), 4),
        "largest": round(moves[farthest], 4),
        "largest_of": farthest,
        "outside": outside,
        "of": len(rows),
    }


def _surface(rows: Rows) -> dict[str, Any]:
    """Count the experiments on which one surface does not hold."""
    ratios = [row["surface"]["ratio"] for row in rows if row["surface"] and row["surface"]["ratio"]]
    return {"of": len(ratios), "rejected": sum(r > REJECTED for r in ratios), "median_ratio": round(median(ratios), 2)}


def _held(rows: Rows, method: str, quantity: str) -> dict[str, Any]:
    """Count the intervals that hold what was measured; the error is of logarithms for N*, in nats for losses."""
    chosen = [r for r in rows if r["method"] == method and r["quantity"] == quantity and r["holds"] is not None]
    errors = [row["predicted"]["value"] - row["measured"] for row in chosen]
    if quantity == "params":
        errors = [row["predicted"]["value"] / row["measured"] - 1 for row in chosen]
    return {
        "method": method,
        "quantity": quantity,
        "holds": sum(row["holds"] for row in chosen),
        "of": len(chosen),
        "mean_error": round(mean(errors), 4),
        "least_error": round(min(errors), 4),
        "largest_error": round(max(errors), 4),
    }


def _bias(rows: Rows) -> dict[str, Any]:
    """Return the largest errors on exact surfaces by method."""
    return {
        method: {key: max((row[method][key] for row in rows), key=abs) for key in ("exponent", "params_far")}
        for method in ("plain", "curves", "surface")
    }
