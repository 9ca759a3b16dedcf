"""The comparison table: order, figures, wording, and terminals of any width and character set."""

import io
import math

import pytest
from etils import epath
from rich.console import Console

from diffusionlm.config import Config
from diffusionlm.evaluation import showcase
from diffusionlm.evaluation.comparisons import comparison
from diffusionlm.training.loop import Run

BASELINES = {
    "uniform": {"nats_per_token": 6.931, "bits_per_byte": 4.0},
    "unigram": {"nats_per_token": 5.5, "bits_per_byte": 3.0},
    "xz": {"nats_per_token": 1.75, "bits_per_byte": 1.0},
}


def render(objective="mdm", bits_per_byte=2.0, width=80, color_system=None, encoding="utf-8") -> str:
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding=encoding)
    console = Console(file=file, width=width, color_system=color_system, force_terminal=color_system is not None)
    console.print(comparison("this model", objective, 3.4567, 0.0123, bits_per_byte, BASELINES))
    file.flush()
    return written.getvalue().decode(encoding)


@pytest.mark.parametrize(
    ("bits_per_byte", "order"),
    [
        (0.5, ["this model", "xz", "unigram", "uniform"]),
        (2.0, ["xz", "this model", "unigram", "uniform"]),
        (9.0, ["xz", "unigram", "uniform", "this model"]),
    ],
)
def test_best_comes_first_wherever_the_model_stands(bits_per_byte, order):
    text = render(bits_per_byte=bits_per_byte)
    assert sorted(order, key=text.index) == order


def test_bars_are_proportional_to_bits_per_byte():
    lines = {line.split("  ")[0]: line.count("━") + line.count("╸") / 2 for line in render().splitlines()}
    assert lines["uniform"] == pytest.approx(4 * lines["xz"], abs=1)
    assert lines["uniform"] == pytest.approx(2 * lines["this model"], abs=1)


def test_a_bound_is_called_a_bound_and_carries_its_error():
    text = render("mdm")
    assert "2.000" in text and "3.457 +/- 0.012" in text
    assert "upper bound" in text


def test_an_exact_likelihood_is_called_exact_and_carries_no_error():
    text = render("arm")
    assert "3.457" in text and "3.457 +/-" not in text
    assert "exact" in text and "upper bound" not in text


def test_only_the_model_is_highlighted():
    bold_green = [line for line in render(color_system="standard").splitlines() if "\x1b[1;32m" in line]
    assert len(bold_green) == 1 and "this model" in bold_green[0]


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_fits_any_terminal(width, encoding):
    text = render(width=width, encoding=encoding)
    assert max(map(len, text.splitlines())) <= width
    assert all(f"{scores['bits_per_byte']:.3f}" in text for scores in BASELINES.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_evaluation_that_is_not_finite_comes_last_and_is_called_so(value):
    *_, last = [line for line in render(bits_per_byte=value).splitlines() if line.startswith(("this", *BASELINES))]
    assert last.split() == ["this", "model", "not", "finite", "not", "finite"]


def test_the_showcase_of_a_run_whose_evaluation_is_not_finite_ends_with_the_comparison(monkeypatch, capsys):
    monkeypatch.setattr(showcase, "open_dataset", lambda path: None)
    monkeypatch.setattr(showcase, "_baselines", lambda run, dataset, console: BASELINES)
    monkeypatch.setattr(showcase, "load", lambda workdir: pytest.fail("a model of NaN cannot sample"))
    result = {"eval": dict.fromkeys(("nelbo_nats_per_token", "nelbo_stderr", "bits_per_byte"), math.nan)}
    showcase.show(Run(epath.Path("nowhere"), Config(), 1, result))
    assert "not finite" in capsys.readouterr().out
