"""What a run wrote is believed only as far as it can be: one change is refused in a line, or makes sense."""

import copy
import json
import math

import hypothesis
import pytest
from etils import epath
from hypothesis import strategies as st
from support import mutated_json

from diffusionlm.errors import UserError
from diffusionlm.storage import read_json_lines
from diffusionlm.training import heartbeat, metrics, outcome, timeline

DONE = {
    "step": 30,
    "tokens": 3840,
    "flops": 12345,
    "train_loss": 4.25,
    "eval": {
        "nelbo_nats_per_token": 4.0,
        "nelbo_stderr": 0.125,
        "bits_per_byte": 2.0,
        "nelbo_per_draw": [4.125, None],
        "tokens": 1000,
        "bytes": 3000,
    },
    "seconds": 10.5,
    "goodput": 0.75,
    "seconds_by_kind": {"train": 8.0, "data": 0.0, "evaluate": 1.0},
    "skipped": 0,
    "rollbacks": 0,
}
METRICS = {"step": 10, "loss": 4.5, "grad_norm": None, "step_seconds": 0.5, "tokens": 1280}
EVENT = {"event": "spent", "time": 1.7e9, "step": 10, "seconds": {"train": 8.5, "lost": 0.0}}
BEAT = {"step": 10, "time": 1.7e9, "doing": "train"}
SETTINGS = hypothesis.settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def read_done(text, folder):
    (folder / outcome.FILE).write_text(text)
    return outcome.read(folder / outcome.FILE)


def read_metrics(text, folder):
    (folder / metrics.FILE).write_text(text + "\n")
    return metrics.read(folder)[0]


def read_timeline(text, folder):
    (folder / timeline.FILE).write_text(text + "\n")
    (line,) = timeline.read(folder)
    timeline.Total([line])
    return line


def read_beat(text, folder):
    (folder / heartbeat.FILE).write_text(text)
    beat = heartbeat.read(epath.Path(folder) / heartbeat.FILE)
    return {"step": beat.step, "time": beat.time, "doing": beat.doing}


FILES = {
    "DONE.json": (DONE, read_done),
    "metrics.jsonl": (METRICS, read_metrics),
    "timeline.jsonl": (EVENT, read_timeline),
    "heartbeat": (BEAT, read_beat),
}


def with_nan(values):
    if isinstance(values, dict):
        return {name: with_nan(value) for name, value in values.items()}
    if isinstance(values, list):
        return [with_nan(value) for value in values]
    return math.nan if values is None else values


@pytest.mark.parametrize("name", FILES)
def test_what_was_written_comes_back(name, tmp_path):
    values, read = FILES[name]
    assert repr(read(json.dumps(values), tmp_path)) == repr(with_nan(values))


@pytest.mark.slow
@SETTINGS
@hypothesis.given(data=st.data())
@pytest.mark.parametrize("name", FILES)
def test_one_change_is_refused_in_one_line_or_is_a_number_of_its_kind(name, data, tmp_path):
    values, read = FILES[name]
    mutation = data.draw(mutated_json.mutations(values))
    try:
        result = read(json.dumps(mutation.values), tmp_path)
    except UserError as error:
        message = str(error)
        assert name in message and "\n" not in message and "\x1b" not in message and len(message) < 500
        return
    assert type(result["step"]) is int and result["step"] >= 0 or "step" not in mutation.values
    for field in ("loss", "step_seconds", "train_loss", "seconds", "time", "flops"):
        assert not isinstance(result.get(field), str | bool | list)
    if name == "DONE.json":
        numbers = [result["eval"][field] for field in ("nelbo_nats_per_token", "nelbo_stderr", "bits_per_byte")]
        assert all(type(number) in (int, float) for number in [*numbers, *result["eval"]["nelbo_per_draw"]])
        assert not result["eval"]["nelbo_stderr"] < 0
    if name == "timeline.jsonl":
        assert all(spent >= 0 for spent in result.get("seconds", {}).values())


@pytest.mark.parametrize(
    "path, value, reason",
    [
        (("eval",), None, "eval=None: Expected `object`, got `null`"),
        (("eval", "bits_per_byte"), "2", "eval.bits_per_byte='2': Expected `float | null`, got `str`"),
        (("eval", "nelbo_stderr"), -1.0, "eval.nelbo_stderr=-1.0: Expected `float` >= 0.0"),
        (("eval", "nelbo_per_draw"), [True], "eval.nelbo_per_draw[0]=True"),
        (("step",), 2.5, "step=2.5: Expected `int`, got `float`"),
        (("step",), -1, "step=-1: Expected `int` >= 0"),
        (("seconds_by_kind", "train"), "x", "seconds_by_kind"),
    ],
)
def test_a_refusal_names_the_field_and_its_value(path, value, reason, tmp_path):
    values = copy.deepcopy(DONE)
    mutated_json.at(values, path[:-1])[path[-1]] = value
    with pytest.raises(UserError) as caught:
        read_done(json.dumps(values), tmp_path)
    assert reason in str(caught.value) and outcome.FILE in str(caught.value)


def test_a_field_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="the field 'step' comes twice"):
        read_done(json.dumps(DONE).replace('"step": 30', '"step": 30, "step": 3000'), tmp_path)


def test_a_damaged_line_is_named_by_its_number(tmp_path):
    path = epath.Path(tmp_path) / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": NaN}\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"lines.jsonl, line 2: "):
        read_json_lines(path)


def test_what_is_no_file_or_too_large_is_not_read(tmp_path):
    (tmp_path / "DONE.json").mkdir()
    with pytest.raises(UserError, match="is a directory"):
        outcome.read(tmp_path / "DONE.json")
    with (tmp_path / "heartbeat").open("wb") as sparse:
        sparse.truncate(1 << 30)
    with pytest.raises(UserError, match="at most 65,536 are read"):
        heartbeat.read(epath.Path(tmp_path) / "heartbeat")
