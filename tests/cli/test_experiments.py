"""The verb `experiments`."""

import json
import re

import diffusionlm as dlm
from diffusionlm.cli import main as cli
from diffusionlm.config import Config
from diffusionlm.options import fields


def test_experiments_lists_all_with_their_docstrings(capsys):
    assert cli.main(["experiments", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["experiments"]
    assert [item["name"] for item in listed] == dlm.experiment_names()
    assert cli.main(["experiments"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for item, line in zip(listed, lines, strict=True):
        assert line.split()[:2] == [item["name"], item["objective"]]
        assert item["description"] and line.endswith(item["description"])


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
