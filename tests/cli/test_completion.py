"""bash completes verbs, registered names and options, as the command itself knows them."""

import shutil
import subprocess

import pytest

from diffusionlm.cli import main as cli
from diffusionlm.cli.completion import script
from diffusionlm.config import Config
from diffusionlm.options import fields
from diffusionlm.registry import experiment_names, sweeps

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
COMPREPLY=()
_shtab_diffusionlm 2>/dev/null
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Return a function from the words of a command line to what bash offers for the last of them."""
    file = tmp_path_factory.mktemp("completion") / "diffusionlm.bash"
    file.write_text(script("bash", cli.VERBS))

    def ask(*words):
        command = ["bash", "--norc", "-c", ASK, "bash", str(file), "diffusionlm", *words]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {line.strip() for line in printed.splitlines() if line.strip()}

    return ask


def test_verbs(complete):
    assert {verb.split()[0] for verb in cli.VERBS} <= complete("")
    assert complete("eval") == {"evaluate"}
    assert complete("sweep", "st") == {"status"}


def test_registered_names(complete):
    assert set(experiment_names()) <= complete("train", "")
    assert complete("train", "llada_8b_s") == {"llada_8b_sft"}
    assert set(sweeps.names()) <= complete("sweep", "status", "")


def test_options_are_all_fields(complete):
    offered = complete("train", "demo", "--")
    assert {f"--{name}" for name in fields(Config)} <= offered
    assert {"--workdir", "--config", "--wandb"} <= offered
    assert complete("train", "demo", "--diffusion.sched") == {"--diffusion.schedule"}
    assert {"--prompt", "--strategy", "--json"} <= complete("sample", "model", "--")


def test_values_of_a_choice(complete):
    assert complete("train", "demo", "--optim.name", "") == {"adamw", "muon"}
    assert complete("completion", "z") == {"zsh"}


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_get_a_script_with_the_same_options(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    assert "diffusion.schedule" in capsys.readouterr().out


def test_an_unknown_shell_is_one_line(capsys):
    assert cli.main(["completion", "fish"]) == 2
    assert "shell=fish must be one of bash, zsh, tcsh" in capsys.readouterr().err
