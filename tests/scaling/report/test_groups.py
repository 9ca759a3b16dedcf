"""Reports of points: one for each source and corpus, from a file, a table or the results of a report."""

import csv
import html
import json
from pathlib import Path

import numpy as np
import pytest

import diffusionlm as dlm
from diffusionlm.errors import UserError
from diffusionlm.scaling.laws.analysis import analyse
from diffusionlm.scaling.report import document, interactive, plots
from diffusionlm.scaling.report.groups import _laws

FIXTURES = Path(__file__).parents[2] / "fixtures" / "scaling"


def quickly(results, **options):
    """Analyse without the parametric law, unless there is nothing else."""
    return analyse(results, full=all(np.isnan(run.budget) for run in results), **options)


@pytest.fixture(autouse=True)
def plain(monkeypatch, request):
    """Draw nothing but in slow tests, since it takes most of the time of a report."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(document, "analyse", quickly)
        monkeypatch.setattr(plots, "render", lambda *args: {})
        monkeypatch.setattr(interactive, "available", lambda: False)


def few(tmp_path):
    """Write some rows of the twins of MDM-Prime-v2: three budgets of both objectives."""
    lines = (FIXTURES / "mdm_prime_v2.csv").read_text().splitlines()
    budgets = ("3e+18", "1e+19", "6e+19")
    chosen = [line for line in lines if line[0] == "#" or line.split(",")[3] in ("budget_flops", *budgets)]
    (tmp_path / "few.csv").write_text("\n".join(chosen) + "\n")
    return tmp_path / "few.csv"


def test_points_and_their_results_give_one_report(tmp_path):
    path = few(tmp_path)
    content = dlm.sweep.report(path, output=tmp_path / "report", noise=0.012, overlay=["smdm_mdm"], counted="12 L d^2")
    text = html.unescape((tmp_path / "report" / "report.html").read_text())
    assert "12 L d^2" in text and "Apache-2.0" in text and "which was given and not measured here" in text
    assert content["noise"]["mdm"]["source"] == "given" and content["laws"]["mdm"]["params"]["exponent"]["low"] > 0
    again = dlm.sweep.report(tmp_path / "report" / "results.json", output=tmp_path / "again", noise="0.012")
    assert again["laws"] == content["laws"] and again["optima"] == content["optima"]
    with path.open() as file:
        rows = [row for row in csv.DictReader(line for line in file if line[0] != "#")]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    [group] = dlm.scaling.read_points(columns)
    written = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [(r.objective, r.budget, r.params, r.tokens, r.loss) for r in group.results] == [
        tuple(row[name] for name in ("objective", "budget", "params", "tokens", "loss")) for row in written
    ]


def test_rows_that_are_left_out_are_in_the_tables(tmp_path):
    path = few(tmp_path)
    lines = path.read_text().splitlines()
    lines[-1] = lines[-1].removesuffix(",") + ",diverged"
    path.write_text("\n".join(lines) + "\n")
    content = dlm.sweep.report(path, output=tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    table = text[text.index("<h2>Left out") :].split("</section>")[0]
    assert f"few.csv line {len(lines)}" in table and "flag diverged" in table
    with (tmp_path / "report" / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows if row["left_out"]] == [f"few.csv line {len(lines)}"]
    assert content["cells"] == len(rows) - 1
    assert "interval is unknown" in text or "No one number" in text  # no noise: nothing sounds sure


def test_a_noise_is_in_the_unit_of_the_losses(tmp_path):
    lines = [line for line in few(tmp_path).read_text().splitlines() if ",mdm," not in line]
    (tmp_path / "few.csv").write_text("\n".join(lines) + "\n")
    nats = dlm.sweep.report(tmp_path / "few.csv", output=tmp_path / "nats", noise=0.012)
    with (tmp_path / "few.csv").open() as file:
        records = list(csv.DictReader(line for line in file if line[0] != "#"))
    bits = [record | {"loss": float(record["loss"]) / np.log(2)} for record in records]
    given = dlm.sweep.report(bits, output=tmp_path / "bits", noise=0.012 / np.log(2), unit="bits")
    assert given["noise"]["arm"]["sd"] == pytest.approx(0.012) and "noise" not in nats["context"]
    assert given["context"]["noise"] == "given as 0.0173123 bits per token, and multiplied by ln 2"
    for end in ("value", "low", "high"):
        assert given["laws"]["arm"]["loss"]["exponent"][end] == pytest.approx(
            nats["laws"]["arm"]["loss"]["exponent"][end]
        )


def test_what_is_no_sweep_is_one_short_line():
    with pytest.raises(UserError, match=r"^sweep=.{40} is a frozenset; give a Sweep"):
        dlm.sweep.report(frozenset(range(1000)))


def test_each_corpus_has_a_report_and_a_page_lists_them(tmp_path):
    lines = [line for line in few(tmp_path).read_text().splitlines() if ",mdm," not in line]
    other = [line.replace(",c4,", ",<web>,") for line in lines if ",c4," in line]
    (tmp_path / "two.csv").write_text("\n".join([*lines, *other]) + "\n")
    content = dlm.sweep.report(tmp_path / "two.csv", output=tmp_path / "report")
    assert list(content["groups"]) == ["mdm_prime_v2_c4", "mdm_prime_v2_web"]
    one, two = content["groups"].values()
    assert one["laws"] == two["laws"] and one["cells"] == two["cells"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count(f"<td>ARM</td><td>{one['cells']}</td>") == 2
    assert 'href="mdm_prime_v2_web/report.html"' in page and "<web>" not in page and "<script" not in page
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == content
    assert (tmp_path / "report" / "mdm_prime_v2_c4" / "report.html").exists()


def test_a_corpus_without_a_row_to_fit_is_named_with_its_rows_and_why(tmp_path):
    lines = [line for line in few(tmp_path).read_text().splitlines() if ",mdm," not in line]
    lines.append(lines[-1].replace(",c4,", ",web,").removesuffix(",") + ",repeated")
    (tmp_path / "two.csv").write_text("\n".join(lines) + "\n")
    content = dlm.sweep.report(tmp_path / "two.csv", output=tmp_path / "report")
    reason = f"two.csv line {len(lines)}: flag repeated"
    assert content["warnings"] == [f"mdm_prime_v2 web: no row is left to fit ({reason})"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert reason in page and "One source and corpus." in page
    assert [row[-1] for row in _laws(content["groups"]).rows] == ["not determined"]  # Approach 3 was not fitted


def test_points_are_not_said_to_be_held_out(tmp_path):
    content = dlm.sweep.report(few(tmp_path), output=tmp_path / "report")
    again = dlm.sweep.report(tmp_path / "report" / "results.json", output=tmp_path / "again")
    for shown in (content, again):
        assert shown["about"].startswith("points. Losses are as their source gives them")
    assert "Held-out loss" not in (tmp_path / "report" / "report.html").read_text()


def test_points_without_budgets_have_the_parametric_law_and_few_warnings(tmp_path):
    rng = np.random.default_rng(0)
    n, d = np.exp(rng.uniform(np.log(1e7), np.log(1e9), 243)), np.exp(rng.uniform(np.log(1e9), np.log(1e11), 243))
    table = {"objective": ["arm"] * 243, "params": n, "tokens": d, "flops": 6 * n * d}
    table["loss"] = 1.7 + 400 / n**0.34 + 410 / d**0.28
    content = dlm.sweep.report(table, output=tmp_path)
    assert len(content["warnings"]) < 5 and content["laws"] == {"arm": {}}
    text = (tmp_path / "report.html").read_text()  # of exact losses, whose interval has no length
    assert "There are no intervals, because" in text and "[" not in text[text.index("<h2>Cross-checks") :]
    law = content["cross_checks"]["arm"]["parametric"]
    assert (law["e"], law["alpha"], law["beta"]) == pytest.approx((1.7, 0.34, 0.28), rel=1e-3)
    text = (tmp_path / "report.html").read_text()
    assert "<h2>Parametric law" in text and "no budget has three sizes" in content["verdict"]
    assert (tmp_path / "optima.csv").read_text().startswith("objective,budget,sizes")
    again = dlm.sweep.report(tmp_path / "results.json", output=tmp_path / "again")
    assert again["cross_checks"] == content["cross_checks"]


def test_a_table_of_groups_quotes_no_law_that_hangs_on_a_cell(tmp_path):
    content = dlm.sweep.report(few(tmp_path), output=tmp_path / "report")
    assert content["runs"]["mdm"] + content["runs"]["arm"] == content["cells"]
    for hanging in ([], ["mdm"]):
        [row] = [row for row in _laws({"a": content | {"hanging": hanging}}).rows if row[1] == "MDM"]
        assert row[2] == str(content["runs"]["mdm"])
        assert (row[3:6] == ["hangs on a suspected cell", "", ""]) == bool(hanging) and row[3]


def test_losses_that_do_not_change_have_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "analyse", analyse)  # with the parametric law
    budgets, sizes = np.meshgrid([1e18, 1e19, 1e20], [1e7, 3e7, 1e8, 3e8, 1e9])
    table = {"objective": ["arm"] * 15, "params": sizes.ravel(), "tokens": (budgets / sizes / 6).ravel()}
    content = dlm.sweep.report(table | {"budget_flops": budgets.ravel(), "loss": [3.0] * 15}, output=tmp_path)
    assert content["laws"] == {"arm": {}} and "parametric" not in content["cross_checks"]["arm"]


def test_a_masked_language_model_has_no_bound(tmp_path):
    path = few(tmp_path)
    path.write_text(path.read_text().replace(",mdm,", ",mlm,"))
    dlm.sweep.report(path, output=tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    assert "The loss of MLM is that of a masked language model" in text and "no bound on the likelihood" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give the report one (output, or --output DIR)"),
        ({"output": "out", "workdir": "w"}, "workdir='w' is about a sweep that was run here"),
        ({"output": "out", "reuse": "r.json"}, "reuse='r.json' is about a sweep"),
        ({"output": "out", "noise": "much"}, "noise='much' must be the standard deviation"),
        ({"output": "out", "overlay": ["smdm"]}, "unknown published law 'smdm'"),
        (
            {"output": "out", "overlay": "chinchilla"},
            "overlay='chinchilla' must be a list of names, such as ['chinchilla']",
        ),
        ({"output": "out", "unit": "bytes"}, "unit='bytes' must be 'nats' or 'bits'"),
    ],
)
def test_options_that_do_not_go_with_points_are_one_line(options, words):
    with pytest.raises(UserError) as error:
        dlm.sweep.report(FIXTURES / "cs336_synthetic.csv", **options)
    assert words in str(error.value)
    with pytest.raises(UserError, match="unit, counted and use are about points"):
        dlm.sweep.report("isoflop_cpu", unit="bits")


@pytest.mark.slow
def test_rows_that_are_left_out_or_without_budget_are_drawn(tmp_path):
    """A budget with two sizes is none, and so its rows are the parametric law's alone."""
    lines = few(tmp_path).read_text().splitlines()
    lines[-1] += "diverged"
    extra = lines[-2].replace("6e+19", "7e+19")
    (tmp_path / "few.csv").write_text("\n".join([*lines, extra]) + "\n")
    content = dlm.sweep.report(tmp_path / "few.csv", output=tmp_path / "report", noise="residuals")
    assert any("the budget 7e+19 has fewer than 3 sizes" in line for line in content["warnings"])
    assert (tmp_path / "report" / "isoflop.png").exists() and not (tmp_path / "report" / "surface.png").exists()
    (tmp_path / "few.csv").write_text("\n".join([line.replace("budget_flops", "other") for line in lines]) + "\n")
    dlm.sweep.report(tmp_path / "few.csv", output=tmp_path / "report", noise="residuals")
    assert (tmp_path / "report" / "surface.png").exists() and not (tmp_path / "report" / "isoflop.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("cs336_synthetic", "llama3", "porian", "protein_lm", "kempner_loss_to_loss", "epoch_chinchilla"),
        *("kyo_chinchilla", "open_athena", "openeurollm_smoothed", "exact_surfaces", "mdm_prime_v2", "steplaw_dense"),
    ],
)
def test_real_points_go_through(name, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "render", lambda *args: {})
    content = dlm.sweep.report(Path(data_dir) / "laws" / f"{name}.csv", output=tmp_path, noise="residuals")
    for group in content.get("groups", {"": content}).values():
        assert len(group["warnings"]) < 40 and group["verdict"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("evo_optima", "flag optimum: 16); these are optima that somebody fitted, and it takes the runs"),
        ("smdm_optima", "flag optimum: 10); these are optima that somebody fitted, and it takes the runs"),
        ("mdm_prime_v2_invalid", "flag invalid: 62"),
        ("published", "no column 'params'"),
        ("open_athena_approach2_bias", "no column 'objective'"),
    ],
)
def test_real_files_that_are_no_points_are_refused(name, words, data_dir, tmp_path):
    with pytest.raises(UserError) as error:
        dlm.sweep.report(Path(data_dir) / "laws" / f"{name}.csv", output=tmp_path)
    assert words in str(error.value)
