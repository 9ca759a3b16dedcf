"""The verb `experiments`."""

import json
import re

from support.command_line import assert_one_line

import diffusionlm as dlm
from diffusionlm.cli import main as cli
from diffusionlm.config import Config
from diffusionlm.options import fields


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
