"""A missing lm-evaluation-harness is one line; the plug-in is declared for where it is installed."""

import configparser
import sys
from pathlib import Path

import pytest
from support.tiny_checkpoint import save

import diffusionlm as dlm
from diffusionlm.errors import UserError

ROOT = Path(__file__).parents[3]


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    needs = r"needs the package lm_eval; in a checkout of diffusionlm, pip install -e '\.\[eval\]'"
    with pytest.raises(UserError, match=needs) as caught:
        dlm.evaluate(save(tmp_path / "mdm"), "lm_eval", tasks="piqa_local")
    assert "\n" not in str(caught.value)


def test_the_plug_in_is_declared():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    (line,) = settings["options.entry_points"]["lm_eval.models"].strip().splitlines()
    assert line == "diffusionlm = diffusionlm.evaluation.harness.model:DiffusionLM"
    assert "tasks/*.yaml" in settings["options.package_data"]["diffusionlm.evaluation.harness"]
