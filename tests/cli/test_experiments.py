"""The verb `experiments`."""

import functools
import json
import re
import shlex

import pytest
from support.command_line import assert_one_line

import diffusionlm as dlm
from diffusionlm import config_mixture, registry
from diffusionlm.cli import main as cli
from diffusionlm.config import Config
from diffusionlm.data import mixtures
from diffusionlm.options import fields
from diffusionlm.training import prepare


def test_experiments_lists_all_with_their_docstrings(capsys):
    assert cli.main(["experiments", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    listed = values["experiments"]
    assert [item["name"] for item in listed] == dlm.experiment_names()
    assert cli.main(["experiments"]) == 0
    beginning, first, heading, second = capsys.readouterr().out.split("\n\n")
    for item, line in zip(listed, first.splitlines(), strict=True):
        assert line.split()[:2] == [item["name"], item["objective"]]
        assert item["description"] and line.endswith(item["description"])
    assert "train demo" in beginning and "sweep plan NAME" in heading
    for sweep, line in zip(values["sweeps"], second.splitlines(), strict=True):
        assert line.split()[0] == sweep["name"] and line.endswith(sweep["description"])
    assert {"isoflop_cpu", "smdm_isoflop", "road_cpu"} <= {sweep["name"] for sweep in values["sweeps"]}


def test_the_name_of_a_sweep_leads_to_its_plan(capsys):
    assert cli.main(["experiments", "road_cpu"]) == 2
    assert_one_line(capsys.readouterr(), ["'road_cpu' is a sweep", "sweep plan road_cpu"])


def test_experiments_shows_one_with_its_counts(capsys):
    assert cli.main(["experiments", "smdm_170m", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    non_embedding = 18 * (4 * 768**2 + 3 * 768 * 3072 + 2 * 768) + 768
    assert shown["parameters"]["non_embedding"] == non_embedding
    assert shown["flops"]["6nd"] == 6 * non_embedding * shown["tokens"]
    assert shown["config"]["run"]["steps"] * shown["config"]["data"]["batch_size"] * 2048 == shown["tokens"]
    assert cli.main(["experiments", "smdm_170m"]) == 0
    text = capsys.readouterr().out
    assert f"{non_embedding:,} non-embedding" in text
    assert all(re.search(rf"^  {re.escape(name)} +\S", text, re.MULTILINE) for name in fields(Config))


@pytest.mark.parametrize("name", ["smdm_170m", "smdm_1028m_rsl", "diffugpt_small", "diffullama_7b", "smdm_1028m_arm"])
def test_it_says_how_to_get_from_the_published_files_to_the_data(name, capsys, monkeypatch):
    """Each source of the mixture has a command that prepares it, and the last one trains on them."""
    assert cli.main(["experiments", name, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    data, config = shown["data"], shown["config"]
    assert cli.main(["experiments", name]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command}\n" in text for command in data["commands"])
    asked = []

    @functools.wraps(prepare.prepare)  # with the options that it has
    def note(source, **settings):
        asked.append(settings)

    monkeypatch.setattr(prepare, "prepare", note)
    *commands, train = (shlex.split(command)[1:] for command in data["commands"])
    for words in commands:
        assert cli.main(words) == 0
    labels = config_mixture.parse(data["mixture"]).labels
    assert [settings["output"] for settings in asked] == [f"data/{label}" for label in labels]
    assert {settings["sequence_length"] for settings in asked} == {config["data"]["sequence_length"]}
    assert train[:2] == ["train", name]
    overrides = dict(zip((word.removeprefix("--") for word in train[2::2]), train[3::2], strict=True))
    there = dlm.experiment(name, overrides).validate().data
    places = [str(mixtures.place(path, there.path)) for path in config_mixture.parse(there.mixture or "data=1").paths]
    assert (places if there.mixture else [there.path]) == [f"data/{label}" for label in labels]


def test_commands_for_different_data_write_to_different_places():
    """So that whoever follows two experiments prepares both."""
    published = filter(None, map(registry.experiments.published_data, dlm.experiment_names()))
    commands = {command for data in published for command in data.commands}
    outputs = [re.search(r"--output (\S+)", command)[1] for command in commands]
    assert len(commands) > 3 and len(set(outputs)) == len(outputs)


def test_an_experiment_without_published_data_names_none(capsys):
    assert cli.main(["experiments", "demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"] is None
    assert cli.main(["experiments", "demo"]) == 0
    assert "published" not in capsys.readouterr().out
