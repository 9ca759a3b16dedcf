"""Files of settings: fields of an experiment in JSON or TOML, below the options and above the recipe."""

import json

import pytest
from support.command_line import assert_one_line

from diffusionlm import config_file, config_io, fingerprint
from diffusionlm.cli import main as cli
from diffusionlm.cli.experiments import experiment_first
from diffusionlm.config import Config
from diffusionlm.errors import UserError
from diffusionlm.registry import experiment


def written(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def toml(values, prefix=""):
    """Return nested fields as TOML; None, which TOML has not, must not be among them."""
    plain = [f"{name} = {json.dumps(value)}" for name, value in values.items() if not isinstance(value, dict)]
    groups = [toml(value, f"{prefix}{name}.") for name, value in values.items() if isinstance(value, dict)]
    return "\n".join([f"[{prefix[:-1]}]" if prefix else "", *plain, *groups])


@pytest.mark.parametrize("name", ["demo", "llada_8b", "diffullama_7b", "tinystories_sft_arm"])
def test_what_experiments_prints_is_a_file_of_the_same_run(name, tmp_path, capsys):
    assert cli.main(["experiments", name, "--json"]) == 0
    printed = capsys.readouterr().out
    cfg = config_file.apply(written(tmp_path, "f.json", printed))
    assert cfg == experiment(name)
    assert fingerprint.fingerprint(cfg) == json.loads(printed)["fingerprint"]


def test_the_config_json_of_a_run_needs_no_experiment(tmp_path):
    """It has every field, so its experiment need not be registered here."""
    cfg = config_io.with_fields(experiment("demo"), {"name": "of_somebody_else", "optim.peak_lr": 0.5})
    assert config_file.apply(written(tmp_path, "config.json", config_io.to_json(cfg))) == cfg


def test_toml_has_the_same_fields(tmp_path):
    values = config_io.to_dict(experiment("tinystories"))
    del values["diffusion"]["mask_id"], values["name"]  # None, and the recipe's own
    cfg = config_file.apply(written(tmp_path, "f.toml", toml(values)), Config(name="tinystories"))
    assert cfg == experiment("tinystories")


def test_options_replace_the_file_and_the_file_replaces_the_recipe(tmp_path):
    path = written(tmp_path, "f.toml", "[optim]\npeak_lr = 1e-3\nwarmup_steps = 7\n")
    words = ["demo", "--config", path, "--optim.warmup_steps", "9"]
    cfg, rest = experiment_first(words, "train", "usage")
    assert rest == words[1:]
    recipe = experiment("demo")
    assert (cfg.optim.peak_lr, cfg.optim.warmup_steps, cfg.optim.final_lr) == (1e-3, 7, recipe.optim.final_lr)


def test_the_command_trains_what_recipe_file_and_options_say(tmp_path, monkeypatch):
    from diffusionlm.cli import train

    seen = []
    monkeypatch.setattr(train, "_train", lambda cfg, workdir, wandb: seen.append((cfg, workdir, wandb)) or 0)
    path = written(tmp_path, "f.json", '{"name": "demo", "optim": {"peak_lr": 0.001, "warmup_steps": 7}}')
    assert cli.main(["train", "--config", path, "--optim.warmup_steps", "9", "--wandb"]) == 0
    changes = {"optim.peak_lr": 1e-3, "optim.warmup_steps": 9}
    assert seen == [(config_io.with_fields(experiment("demo"), changes), "runs/demo", True)]


WRONG = [
    ("f.json", '{"optim": {"peak_lrr": 1}}', "unknown field 'optim.peak_lrr'; did you mean 'optim.peak_lr'"),
    ("f.toml", "[optimm]\n", "unknown field 'optimm'; did you mean 'optim'"),
    ("f.json", '{"optim": 3}', "optim=3 must be a group of fields"),
    ("f.json", '{"optim": {"peak_lr": "x"}}', "optim.peak_lr='x' must be of type float"),
    ("f.json", '{"optim": {"warmup_steps": -1}}', "optim.warmup_steps=-1 must not be negative"),
    ("f.json", "{", "is not JSON"),
    ("f.json", '{"run": {"steps": NaN}}', "is not JSON"),
    ("f.json", '{"run": {}, "run": {}}', "the field 'run' comes twice"),
    ("f.json", "[1]", "must be an object of fields"),
    ("f.json", '{"format": 1}', "is of format 1"),
    ("f.json", '{"config": {}, "extra": 1}', "extra"),
    ("f.toml", "[optim", "is not TOML"),
    ("f.yaml", "optim:", "must end in .json or .toml"),
]


@pytest.mark.parametrize(("name", "text", "part"), WRONG)
def test_a_file_that_is_wrong_is_one_line(name, text, part, tmp_path, capsys):
    path = written(tmp_path, name, text)
    assert cli.main(["train", "demo", "--config", path]) == 2
    assert_one_line(capsys.readouterr(), [name, part])


def test_a_file_that_is_missing_is_one_line(tmp_path, capsys):
    assert cli.main(["train", "demo", "--config", str(tmp_path / "none.json")]) == 2
    assert_one_line(capsys.readouterr(), ["none.json", "No such file"])


@pytest.mark.parametrize("text", ["[run]\nsteps = 3\n", 'name = "mine"\n[run]\nsteps = 3\n'])
def test_part_of_the_fields_needs_an_experiment(text, tmp_path):
    with pytest.raises(UserError, match="f.toml lacks .*, and there is no experiment to take it from"):
        config_file.apply(written(tmp_path, "f.toml", text))


def test_a_file_of_another_experiment_is_refused(tmp_path):
    """Else the command would train in one name what the other says."""
    path = written(tmp_path, "config.json", config_io.to_json(experiment("demo")))
    with pytest.raises(UserError, match="of the experiment 'demo', and not of 'tinystories'"):
        config_file.apply(path, experiment("tinystories"))


@pytest.mark.parametrize("name", ["a/../../b", "..", "", r"a\b"])
def test_a_name_that_leaves_the_directory_of_runs_is_refused(name, tmp_path):
    cfg = config_io.with_fields(experiment("demo"), {"optim.peak_lr": 0.5})
    values = config_io.to_dict(cfg) | {"name": name}
    with pytest.raises(UserError, match="must be usable as that of a directory"):
        config_file.apply(written(tmp_path, "config.json", json.dumps(values)))
