"""The notebooks of docs/notebooks: their files, and each one run in a shortened form."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell

DIRECTORY = Path(__file__).parents[2] / "docs/notebooks"
# What is true of each notebook after its last cell, as a cell of its own.
CHECKS = {
    "1_train_and_sample": """
again = dlm.train(mdm_config, "runs/mdm")
assert again.done_before and again.result == run.result and run.step == STEPS
assert twin.result["tokens"] == run.result["tokens"]
lines = [json.loads(line) for line in open("runs/mdm/metrics.jsonl")]
assert [line["step"] for line in lines if "eval_nelbo_nats_per_token" in line][-1] == STEPS
assert arm.config.autoregressive and not mdm.config.autoregressive
filled = mdm.infill("Return the{mask:6} of the array.", temperature=0)[0].text
assert filled.startswith("Return the") and filled.endswith(" of the array.")
""",
    "2_isoflop": """
assert set(finished.done) == {cell.id for cell in sweep.select()} and not finished.failed
assert report["cells"] == len(planned) and not report["incomplete"]
for fit in analysis.objectives.values():  # the figures of docs/results/isoflop_cpu, with other random numbers
    for law in fit.laws.values():
        low, high = law.exponent.interval
        assert low < law.exponent.value < high
exponents = {name: fit.laws["params"].exponent for name, fit in analysis.objectives.items()}
assert abs(exponents["arm"].value - 0.603) < 0.01 and abs(exponents["mdm"].value - 0.538) < 0.02
assert exponents["arm"].interval[0] < 0.62 < exponents["arm"].interval[1]
""",
    "3_adapt_and_infill": """
bounds = [done.result["eval"]["nelbo_nats_per_token"] for done in (adapted, scratch)]
assert bounds[0] < bounds[1] - 0.1, bounds
for text, completion in zip(texts, filled):
    before, _, after = text.partition("{")
    assert completion.text.startswith(before) and completion.text.endswith(after.partition("}")[2])
    assert len(completion.text) > len(before + after.partition("}")[2])
""",
    "4_reversal_curse": """
sentences = [json.loads(line)["completion"] for line in open("facts/train.jsonl")]
assert len(sentences) == 8 * 6 + 8 * 6 + 8 * 12 == len(set(sentences))
assert all(0 <= share <= 1 for values in answers.values() for share in values.values())
assert run.result["tokens"] == twin.result["tokens"]
""",
    "5_samplers": """
assert len(columns) == len(STRATEGIES) and all(completion.text for completion in columns.values())
assert columns["low_confidence"].nfe <= LENGTH // 4 < columns["confidence_threshold"].nfe + LENGTH
# A judge that knows nothing pays log(2047) = 7.6 nats a token.
assert all(0 < nats < 7.6 and 0 < different <= 1 for nats, different in measured.values())
assert sample(LENGTH, temperature=0.0)[0].tokens == sample(LENGTH, temperature=0.0)[0].tokens
""",
    "6_fine_tune_and_chat": """
assert after.has_chat_template and not before.has_chat_template
assert [turn.role for turn in talk.turns] == ["user", "assistant"] * 2 and talk.turns[0].content.endswith("a dog.")
assert all(any(word in pair["prompt"] and word in pair["response"] for word in WORDS) for pair in pairs) and pairs
lines = [json.loads(line) for line in open("runs/asked/metrics.jsonl")]
held_out = [line["eval_nelbo_nats_per_token"] for line in lines if "eval_nelbo_nats_per_token" in line]
assert held_out[-1] < held_out[0]
""",
}
TRAINS = set(CHECKS) - {"5_samplers"}


@pytest.fixture(scope="module")
def execute():
    """Return the module docs/notebooks/execute.py."""
    spec = importlib.util.spec_from_file_location("execute_notebooks", DIRECTORY / "execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name):
    return nbformat.read(DIRECTORY / f"{name}.ipynb", as_version=4)


def test_every_notebook_is_tested_and_listed():
    names = {path.stem for path in DIRECTORY.glob("*.ipynb")}
    index = (DIRECTORY / "index.md").read_text()
    assert names == set(CHECKS) and all(f"]({name}.ipynb)" in index for name in names)


@pytest.mark.parametrize("name", CHECKS)
def test_a_file_is_small_valid_and_up_to_date(name, execute):
    import nbformat

    notebook = read(name)
    nbformat.validate(notebook)
    assert (DIRECTORY / f"{name}.ipynb").stat().st_size < 150_000
    refreshed = read(name)
    execute.refresh(refreshed, name)
    assert refreshed == notebook, "run docs/notebooks/execute.py"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            ast.parse(cell.source)
            assert not any(output.output_type == "error" for output in cell.outputs)
    assert notebook.cells[0].source.startswith("# ") and "colab-badge" in notebook.cells[0].source
    text = (DIRECTORY / f"{name}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users)/", text), "names a directory of the machine that ran it"


def test_with_an_address_the_badge_opens_the_notebook_and_the_first_cell_clones(execute, monkeypatch):
    monkeypatch.setattr(execute, "repository", lambda: "https://github.com/someone/something")
    notebook = read("5_samplers")
    execute.refresh(notebook, "5_samplers")
    target = "(https://colab.research.google.com/github/someone/something/blob/main/docs/notebooks/5_samplers.ipynb)"
    assert target in notebook.cells[0].source
    assert 'REPOSITORY = "https://github.com/someone/something"' in notebook.cells[1].source


@pytest.mark.parametrize("folder", ["", "diffusionlm/", "diffusionlm-main/"])
def test_the_first_cell_takes_any_zip_file_of_the_repository(folder, tmp_path):
    """Without an installed package, which a directory named diffusionlm is not."""
    with zipfile.ZipFile(tmp_path / "diffusionlm.zip", "w") as archive:
        for file in ("setup.cfg", "diffusionlm/__init__.py", "docs/results/models/tinystories/sidecar.json"):
            archive.writestr(folder + file, "")
    source = (DIRECTORY / "setup_cell.py").read_text(encoding="utf-8")
    before_installing = source[: source.index("if package() is None:")]
    program = before_installing + "print(package(), CHECKOUT.relative_to(Path.cwd()).as_posix())"
    command = [sys.executable, "-S", "-c", program]  # without the packages of the environment
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", f"diffusionlm_checkout/{folder}".rstrip("/")]


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_it_runs_in_a_shortened_form(name, execute, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSIONLM_SHORT", "1")
    for variable in ("STORIES", "COLUMNS"):
        monkeypatch.delenv(variable, raising=False)
    notebook = read(name)
    last = len(notebook.cells)
    notebook.cells.append(new_code_cell("import json\n" + CHECKS[name]))
    # A frozen copy of the environment: warnings of other packages are errors in pytest alone.
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    execute.run(notebook, timeout=1800, directory=tmp_path)
    kinds = {
        kind for cell in notebook.cells[:last] for output in cell.get("outputs", []) for kind in output.get("data", {})
    }
    assert "text/html" in kinds and ("image/png" in kinds or name not in TRAINS)
    errors = [
        output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.get("name") == "stderr"
    ]
    assert not any("ipywidgets" in text or "Traceback" in text for text in errors), errors
    assert os.listdir(tmp_path) or name in ("5_samplers",)
