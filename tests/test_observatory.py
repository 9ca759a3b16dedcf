"""The page of the observatory says what its numbers say, and they can be made again from the data."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
OBSERVATORY = ROOT / "docs" / "results" / "observatory"
DATA = Path(os.environ.get("DIFFUSIONLM_DATA", "")) / "laws"
NUMBER = re.compile(r"[-+]?\d+\.\d+")


def constant(name):
    raise ValueError(f"{name} is not JSON")


@pytest.fixture(scope="module")
def numbers():
    return json.loads((OBSERVATORY / "observatory.json").read_text(encoding="utf-8"), parse_constant=constant)


def table(heading):
    """Return the cells of the table on the page whose first line begins so."""
    lines = (OBSERVATORY / "index.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def close(cell, estimate, digits=3):
    """Assert that a cell has the numbers of an estimate, to its digits, and nothing where there is none."""
    expected = [] if estimate is None else [estimate.get(key) for key in ("value", "low", "high")]
    expected = [number for number in expected if number is not None]
    if len(expected) == 2:  # an interval that is open at one end is not shown
        expected = expected[:1]
    shown = [float(number) for number in NUMBER.findall(cell)]
    assert shown == pytest.approx(expected, abs=0.51 * 10**-digits), cell


def test_the_table_of_exponents_has_the_numbers(numbers):
    shown = table("| experiment | objective | runs |")
    assert len(shown) == len(numbers["exponents"]) > 25
    for cells, row in zip(shown, numbers["exponents"], strict=True):
        assert cells[1] == row["objective"] and int(cells[2]) == row["runs"]
        published = row["published"]
        if published and (published["low"] is None or published["from_b"]):
            published = {"value": published["value"]}
        close(cells[4], published)
        for cell, key in zip(cells[5:8], ("plain", "plain_same", "curves"), strict=True):
            close(cell, row[key] and row[key] | ({} if key == "curves" else {"low": None, "high": None}))
            assert row[key] is None or row[key]["value"] is None or cell.endswith(f"({row[key]['optima']})")
        close(cells[8], row["surface"])
        rejected = bool(row["surface"]["ratio"]) and row["surface"]["ratio"] > 1.5
        assert ("✗" in cells[8]) == rejected
        assert ("‡" in cells[0]) == row["hanging"]


def test_no_sentence_quotes_or_counts_a_law_that_hangs_on_suspected_cells(numbers):
    rows = {(row["name"], row["objective"]): row for row in numbers["exponents"]}
    hanging = {" ".join(key) for key, row in rows.items() if row["curves"] and row["hanging"]}
    assert hanging == set(numbers["summary"]["hanging"])
    for count in ("published", "moved"):
        assert not hanging & set(numbers["summary"][count]["outside"])
    for name, objective in rows:  # of which the prose names numbers
        if name.startswith(("mdm_prime_v2", "isoflop_cpu", "marin")):
            assert f"{name} {objective}" not in hanging
    for cells, row in zip(table("| experiment | objective | gap"), numbers["twins"], strict=True):
        sides = {f"{row['name']} {objective}" for objective in (row["objective"], row["reference"])}
        assert ("‡" in cells[0]) == bool(sides & hanging) == bool(row["hanging"])


def test_plain_parabolas_are_compared_with_curves_at_the_same_budgets(numbers):
    rows = [row for row in numbers["exponents"] if row["curves"] and not row["hanging"]]
    assert all(row["plain_same"]["budgets"] == row["curves"]["optima"] for row in rows)
    both = [row for row in rows if row["plain_same"]["optima"] == row["curves"]["optima"]]
    moves = [abs(row["plain_same"]["value"] - row["curves"]["value"]) for row in both]
    assert numbers["summary"]["moved"]["of"] == len(moves)
    assert numbers["summary"]["moved"]["median"] == pytest.approx(float(np.median(moves)), abs=1e-4)


def test_the_tables_of_diffusion_twins_and_bias_have_the_numbers(numbers):
    for cells, row in zip(table("| law | how |"), numbers["diffusion"]["laws"], strict=True):
        assert cells[:2] == [row["title"], row["kind"]]
        close(cells[2], row["a"])
        close(cells[3], row["b"])
        close(cells[4], row["loss"], 4)
    for cells, row in zip(table("| experiment | objective | gap"), numbers["twins"], strict=True):
        shown = [float(number) for number in re.findall(r"[\d.e-]+", cells[2])]
        assert shown == pytest.approx([row["common"][key] for key in ("value", "low", "high")], rel=6e-3)
        close(cells[4], row["size_ratio_law"], 2)
    for cells, row in zip(table("| surface and grid"), numbers["bias"], strict=True):
        for i, method in enumerate(("plain", "curves", "surface")):
            close(cells[2 + i], {"value": row[method]["exponent"]}, 4)
            close(cells[5 + i], {"value": 100 * row[method]["params_far"]}, 1)


def test_what_held_is_counted_from_the_rows(numbers):
    counted = table("| method | quantity | intervals that hold")
    for cells, (method, quantity) in zip(
        counted, [(m, q) for m in ("laws", "surface") for q in ("params", "loss")], strict=True
    ):
        rows = [row for row in numbers["held_out"] if (row["method"], row["quantity"]) == (method, quantity)]
        rows = [row for row in rows if row["predicted"]["low"] is not None]
        held = [row["predicted"]["low"] <= row["measured"] <= row["predicted"]["high"] for row in rows]
        assert cells[2] == f"{sum(held)} of {len(held)}"
    for cells, row in zip(table("| larger runs |"), numbers["larger_runs"], strict=True):
        close(cells[3], row["predicted"])
        holds = row["predicted"]["low"] <= row["measured"] <= row["predicted"]["high"]
        assert cells[5] == ("yes" if holds else "**no**")


def test_curves_and_surface_have_no_bias_on_exact_surfaces(numbers):
    """2603.22339: parabolas miss N* where surfaces are asymmetric or grids are off, and only there."""
    bias = {row["name"]: row for row in numbers["bias"]}
    assert len(bias) == 19
    for row in bias.values():
        for method in ("curves", "surface"):
            assert abs(row[method]["exponent"]) < 1e-4 and abs(row[method]["params_far"]) < 1e-3, row["name"]
    for width in (2, 4, 8, 16):
        assert bias[f"exact_symmetric_x{width}"]["plain"]["params_far"] == 0
    assert bias["exact_asymmetric_x16"]["plain"]["params_far"] > 0.2
    assert math.isclose(bias["exact_asymmetric_x16"]["a"], 0.155 / 0.62, rel_tol=1e-5)


def test_the_page_is_rendered_from_the_numbers(numbers, monkeypatch):
    monkeypatch.syspath_prepend(str(OBSERVATORY))
    try:
        text = importlib.import_module("page").render(numbers)
    finally:
        for name in ("page", "sources"):
            sys.modules.pop(name, None)
    assert text == (OBSERVATORY / "index.md").read_text(encoding="utf-8"), "run make.py"


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "published.csv").exists(), reason="DIFFUSIONLM_DATA has no laws")
def test_the_numbers_are_made_again(numbers, tmp_path):
    command = [sys.executable, OBSERVATORY / "make.py", "--data", DATA, "--output", tmp_path]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    made = json.loads((tmp_path / "observatory.json").read_text(encoding="utf-8"))
    for name in ("exponents", "bias", "twins", "held_out", "larger_runs", "optima"):
        assert len(made[name]) == len(numbers[name]), name
    same(made, numbers, "")


def same(made, kept, at):
    """Assert that two trees of numbers are the same, up to what searches and other processors change."""
    assert type(made) is type(kept), at
    if isinstance(kept, dict):
        assert made.keys() == kept.keys(), at
        for key in kept:
            same(made[key], kept[key], f"{at}/{key}")
    elif isinstance(kept, list):
        assert len(made) == len(kept), at
        for i, pair in enumerate(zip(made, kept, strict=True)):
            same(*pair, f"{at}/{i}")
    elif isinstance(kept, float):
        assert made == pytest.approx(kept, rel=0.02, abs=1e-3), at
    else:
        assert made == kept, at
