"""What a run directory says of its run, and which runs may continue there."""

import dataclasses
import json
import re
import shutil
import subprocess

import jax
import pytest
from etils import epath
from support import tiny_run
from support.run_files import (
    content,
)
from support.tiny_run import STEPS, refusal, tiny

from diffusionlm import config_io, fingerprint
from diffusionlm.errors import UserError
from diffusionlm.training import loop as trainer
from diffusionlm.training import run_directory
from diffusionlm.version import __version__


@pytest.mark.slow
def test_config_and_environment_are_recorded(uninterrupted, dataset):
    run, _ = uninterrupted
    assert config_io.from_json((run.workdir / "config.json").read_text()) == tiny(dataset)
    there = json.loads((run.workdir / "environment.json").read_text())
    assert there["diffusionlm"] == __version__
    assert there["packages"]["jax"] == jax.__version__
    assert there["devices"] == "8 x cpu" and there["processes"] == 1
    assert there["earlier"] == []
    assert there["git"] is None or re.fullmatch("[0-9a-f]{40}", there["git"])


def test_there_need_be_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run_directory.environment()["git"] is None


def git(*arguments, cwd):
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *arguments], cwd=cwd, check=True)


def test_the_revision_is_that_of_the_package_s_own_checkout(tmp_path):
    """Installed somewhere below a user's repository, tracked there or not, the package has none."""
    package = tmp_path / "user" / "venv" / "lib" / "diffusionlm"
    own = tmp_path / "own" / "diffusionlm"
    for directory in (package, own):
        directory.mkdir(parents=True)
        (directory / "__init__.py").write_text("")
    for repository in (tmp_path / "user", tmp_path / "own"):
        git("init", "-q", cwd=repository)
        git("commit", "-q", "--allow-empty", "-m", "empty", cwd=repository)
        assert run_directory.git_revision(repository / "diffusionlm" if repository.name == "own" else package) is None
        git("add", ".", cwd=repository)
        git("commit", "-q", "-m", "everything", cwd=repository)
    assert run_directory.git_revision(package) is None
    assert re.fullmatch("[0-9a-f]{40}", run_directory.git_revision(own))


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_refused_in_one_line(uninterrupted, tmp_path):
    cfg, path = uninterrupted[0].config, tmp_path / "config.json"
    values = json.loads(config_io.to_json(cfg))
    path.write_text(json.dumps(values))
    run_directory.refuse_another_run(cfg, tmp_path)
    del values["format"]
    said = f"{tmp_path} holds a run of an earlier diffusionlm, whose fingerprints differ; finish it with that version"
    for earlier in (values, values | {"gone": 1}):  # the same fields, and one that is no more
        path.write_text(json.dumps(earlier))
        assert refusal(cfg, tmp_path).startswith(said)
    for other in ("{", "[]", json.dumps(values | {"format": 99}), json.dumps(values | {"format": 2, "gone": 1})):
        path.write_text(other)
        assert refusal(cfg, tmp_path).startswith(f"{path} is damaged, or of another version (")


@pytest.mark.slow
def test_a_second_call_returns_at_once_and_changes_nothing(uninterrupted, monkeypatch):
    run, _ = uninterrupted
    monkeypatch.setattr(trainer, "open_or_prepare", None)  # it does not even open its data
    before = content(run.workdir)
    again = trainer.train(tiny_run.with_changes(run.config, {"run": {"log_every": 3}}), run.workdir)
    assert (again.result, again.step, again.done) == (run.result, STEPS, True)
    assert content(run.workdir) == before


@pytest.mark.slow
def test_another_fingerprint_is_refused_with_the_fields_that_differ(uninterrupted):
    run, _ = uninterrupted
    other = tiny_run.with_changes(run.config, {"optim": {"peak_lr": 0.5}, "run": {"seed": 8, "log_every": 3}})
    before = content(run.workdir)
    message = refusal(other, run.workdir)
    assert "optim.peak_lr (0.01 there, 0.5 here)" in message and "run.seed (7 there, 8 here)" in message
    assert message.count(" there, ") == 2 and "log_every" not in message and "--workdir" in message
    assert content(run.workdir) == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"vocab_size": 300}}, ["257", "300", "--model.vocab_size 257"]),
        ({"data": {"sequence_length": 12}}, ["16", "12", "--data.sequence_length 16"]),
    ],
)
def test_data_that_do_not_fit_are_refused_and_the_directory_stays_free(dataset, tmp_path, changes, said):
    workdir = tmp_path / "run"
    message = refusal(tiny(dataset, **changes), workdir)
    assert all(words in message for words in said)
    run_directory.refuse_another_run(tiny(dataset), workdir)  # what the message asks for is not another run


@pytest.mark.slow
def test_a_directory_without_config_is_resumed_by_the_run_that_saved_its_checkpoints_alone(uninterrupted, tmp_path):
    run, _ = uninterrupted
    shutil.copytree(run.workdir / "checkpoints", tmp_path / "checkpoints")
    run_directory.refuse_another_run(run.config, epath.Path(tmp_path))
    other = dataclasses.replace(run.config, run=dataclasses.replace(run.config.run, seed=99))
    with pytest.raises(UserError) as caught:
        run_directory.refuse_another_run(other, epath.Path(tmp_path))
    message = str(caught.value)
    assert str(tmp_path / "checkpoints") in message and "config.json" in message and "--workdir" in message
    for name in (fingerprint.fingerprint(run.config), fingerprint.fingerprint(other)):
        assert name in message
