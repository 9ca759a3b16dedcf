"""Figures in pages are those of the files of docs/results, and cheap ones are computed again."""

import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

import diffusionlm as dlm
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.sweep import results

DOCS = Path(__file__).parents[1] / "docs"
CHIP, UTILISATION = 197e12, 0.4  # FLOP/s of a v5e chip, as the pages assume


def read(name):
    return json.loads((DOCS / "results" / name).read_text(encoding="utf-8"))


def rows(page, heading):
    """Return the lines of the table with that heading, as lists of cells without emphasis."""
    lines = iter((DOCS / page).read_text(encoding="utf-8").splitlines())
    assert any(line.startswith(heading) for line in lines), f"{page} has no table {heading!r}"
    next(lines)
    table = []
    for line in lines:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.replace("**", "").strip("|").split("|")])
    return table


def interval(estimate, digits):
    """Return an estimate as pages write it, with its 95% interval in brackets."""
    return f"{estimate['value']:.{digits}f} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def test_the_laws_of_the_small_sweep():
    report = read("isoflop_cpu/report.json")
    exponents = {}
    for objective, laws in report["laws"].items():
        exponents[objective] = {quantity: law["exponent"] for quantity, law in laws.items()}
    loss, size, gap, ratio = rows("results.md", "| 95% intervals in brackets")
    assert loss[1] == interval(exponents["arm"]["loss"], 4)
    assert loss[2].startswith(interval(exponents["mdm"]["loss"], 3))
    assert size[1] == interval(exponents["arm"]["params"], 3)
    assert size[2].startswith(interval(exponents["mdm"]["params"], 3))
    assert gap[2] == ", ".join(interval(entry["gap"], 0) for entry in report["gaps"][0]["at_own_budgets"])
    assert ratio[2] == interval(report["gaps"][0]["size_ratio"][-1]["ratio"], 3)


def test_the_best_road():
    report = read("road_cpu/report.json")
    share, bound, scratch, arm, compute, of_mdm, size = rows("scaling.md", "| | 1.6e12 FLOPs | 5e12 FLOPs")
    gaps = {entry["objective"]: entry["at_own_budgets"] for entry in report["gaps"]}
    for column, road in enumerate(report["roads"]["budgets"][:3], start=1):
        percent = [f"{100 * road['share'][key]:.0f}%" for key in ("value", "low", "high")]
        assert share[column] == f"{percent[0]} [{percent[1]}, {percent[2]}]"
        assert bound[column] == interval(road["loss"], 2)
        assert arm[column] == interval(road["loss_minus"]["arm"], 2)
        assert compute[column] == interval(gaps["road"][column - 1]["gap"], 0)
        assert size[column].startswith(f"{road['params']['value'] / 1000:.0f}k")
    for column in (2, 3):
        assert scratch[column] == interval(report["roads"]["budgets"][column - 1]["loss_minus"]["mdm"], 2)
        assert of_mdm[column] == interval(gaps["mdm"][column - 2]["gap"], 0)
    odds = interval(report["roads"]["laws"]["share"]["exponent"], 2)
    assert f"The exponent of its odds is {odds} " in (DOCS / "scaling.md").read_text(encoding="utf-8")
    measured, sizes, fitted = rows("scaling.md", "| share at 5e13 FLOPs")
    for column, at in enumerate(report["roads"]["budgets"][3]["shares"], start=1):
        assert measured[column] == f"{at['best_loss']:.3f}" and int(sizes[column]) == at["runs"]
        assert fitted[column] == interval(at["loss"], 2)


def test_caches():
    measured = {row["name"]: row for row in read("frontier.json")["rows"]}
    steps = None
    table = rows("sampling.md", "| low confidence | cache | tokens/s")
    for first, cache, speed, times, agreement, bits, distinct in table:
        steps = first or steps
        row = measured[f"{steps}, {'no cache' if cache == 'none' else cache}"]
        assert float(speed) == round(statistics.median(row["tokens_per_second"]))
        assert float(bits) == round(row["twin_bits_per_byte"], 3)
        assert abs(float(distinct) - row["distinct_4grams"]) <= 0.005
        if cache != "none":
            assert float(times) == round(statistics.median(row["times"]), 2)
            assert float(agreement) == round(row["agreement"], 2)
    assert len(table) == 12


def test_what_changes_with_batches_and_meshes():
    measured = {f"{row['dtype']}, {row['settings']}": row for row in read("invariance.json")}
    single, *table = rows("sampling.md", "| | other texts in the batch | longer canvas")
    exact = [row for name, row in measured.items() if name.startswith("float32")]
    assert set(single[1:]) == {"0"} and len(exact) == 3
    assert not any(share for row in exact for share in list(row.values())[2:])
    for name, mates, canvas, batches, devices in table:
        row = measured[name]
        shares = [row["mates"], row["longer canvas"], row["batches of 4"]]
        assert [float(cell) for cell in (mates, canvas, batches)] == [round(share, 2) for share in shares]
        meshes = [round(share, 2) for key, share in row.items() if key.startswith("8 devices")]
        assert {float(cell) for cell in devices.split(" to ")} == {min(meshes), max(meshes)}


def test_ways_of_adaptation():
    measured = read("adaptation.json")
    names = {"adapted, with annealing, without shift": "adapted, without shift"}
    names["adapted, with annealing, by adapters of rank 16"] = "adapted, by adapters"
    for name, bits, *_, rouge, _ in rows("results/adaptation.md", "| | bits per byte | ROUGE-1"):
        runs = [run["metrics"] for run in measured if run["way"] == names.get(name, name)]
        for cell, metric in ((bits, "bits_per_byte"), (rouge, "rougeL")):
            values = [run[metric]["value"] for run in runs]
            mean, digits = statistics.mean(values), len(cell.split(" ")[0]) - 2
            assert cell.split(" ")[0] == f"{mean:.{digits}f}"
            if len(values) > 1:
                error = statistics.stdev(values) / len(values) ** 0.5
                assert cell == f"{mean:.{digits}f} \u00b1 {error:.{digits}f}"


@pytest.mark.parametrize(
    ("name", "page", "chips", "texts"),
    [
        ("llada_8b", "../tpu_scripts/README.md", 256, ["1.147e23", "404,000", "66 days"]),
        ("smdm_170m", "../tpu_scripts/README.md", 8, ["1.406e20", "496 chip-hours", "62 hours"]),
        ("smdm_170m", "scaling.md", 8, ["`smdm_170m`: 496"]),
        ("smdm_170m_road", "scaling.md", 8, ["some 501 v5e"]),
    ],
)
def test_chip_hours_are_those_of_credited_flops(name, page, chips, texts):
    cfg = dlm.experiment(name)
    whole, half = (dlm.flops.train(cfg.model, cfg.data.sequence_length, "model", predicted=p) for p in (1.0, 0.5))
    first = cfg.diffusion.arm_steps  # autoregressive steps predict every position
    flops = (first * whole + (cfg.run.steps - first) * half) * cfg.data.batch_size
    hours = flops / (CHIP * UTILISATION * 3600)
    figures = f"{flops:.3e}".replace("e+", "e"), f"{hours:,.0f}", f"{round(hours, -3):,.0f}"
    spans = f"{hours / chips:.0f} hours", f"{hours / chips / 24:.0f} days"
    for text in texts:
        assert any(figure in text for figure in figures) or text in spans, (text, figures, spans)
        assert text in (DOCS / page).read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["isoflop_cpu", "road_cpu"])
def test_the_laws_follow_from_the_results(name):
    """The least-squares parts of a report are computed again; its intervals are simulated, and are left out."""
    report = read(f"{name}/report.json")
    analysis = analyse(results.load(DOCS / f"results/{name}/results.json"), draws=200, full=False)
    compared = 0
    for objective, laws in report["laws"].items():
        for quantity, law in laws.items():
            estimate = analysis.objectives[objective].laws[quantity].exponent.value
            np.testing.assert_allclose(estimate, law["exponent"]["value"], rtol=1e-4, err_msg=f"{objective} {quantity}")
            compared += 1
    assert compared >= 6


@pytest.mark.slow
def test_the_example_of_the_certificate(data_dir):
    """On another version of JAX the rounding differs, and so do the last digits; the noise is the same."""
    page = (DOCS / "certificate.md").read_text(encoding="utf-8")
    lines = Path(data_dir, "tinystories/valid.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    stories = [json.loads(line)["text"] for line in lines]
    estimate = dlm.load(DOCS / "results/models/tinystories").perplexity(stories)
    for name in ("nats_per_token", "bits_per_byte"):
        figure = float(re.search(rf"^{name} +([\d.]+)", page, re.M)[1])
        assert getattr(estimate, name) == pytest.approx(figure, rel=2e-3)
