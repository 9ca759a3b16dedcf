"""A kill while a checkpoint is deleted costs nothing: the run goes on from its newest checkpoint."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath
from support.checkpoints import abstract_state, bits, make_mesh, make_sidecar, make_state, refusal, save_run

from diffusionlm.checkpoint import deletion, store
from diffusionlm.checkpoint.store import CheckpointManager


class Killed(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with the steps 1 and 2, and the state at 2."""
    directory = tmp_path_factory.mktemp("run")
    return directory, save_run(directory, 1, 2)


def remove_some(directory, count):
    """Remove the first files of a directory, as a removal that is killed does."""
    directory = Path(directory)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != deletion._MARKER)
    for path in files[:count]:
        path.unlink()
    for path in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
        if not os.listdir(path):
            path.rmdir()


def removals(directory, apart):
    """The numbers of files after which a removal is killed, so far apart: from none of them to all of them."""
    files = len([path for path in directory.rglob("*") if path.is_file()])
    return sorted({*range(0, files, apart), files})


def assert_goes_on(workdir, state, said, caplog):
    """The run in `workdir` resumes at step 2, says what it found of step 1, and then only keeps what it should."""
    caplog.clear()
    assert store.find(workdir).name == "2"
    with CheckpointManager(workdir, keep=1) as manager:
        assert manager.latest_step() == 2
        assert bits(manager.restore(abstract_state(make_mesh(8)))) == bits(state)
        lines = [record.getMessage() for record in caplog.records if record.name.startswith("diffusionlm")]
        assert len(lines) == 1 and said in lines[0] and "step 1," in lines[0]
        manager.save(3, state, make_sidecar())
    assert store.find(workdir).name == "3"


@pytest.mark.slow
@pytest.mark.parametrize(
    "in_bucket, apart",
    [
        pytest.param(False, 4, id="disk"),
        pytest.param(False, 1, id="disk, any", marks=pytest.mark.slow),
        pytest.param(True, 1, id="bucket, any", marks=pytest.mark.slow),
    ],
)
def test_a_kill_at_any_moment_of_a_deletion_is_finished_by_the_next_start(
    run, tmp_path, in_bucket, apart, monkeypatch, caplog
):
    directory, state = run
    monkeypatch.setattr(deletion, "in_bucket", lambda path: in_bucket)
    for count in removals(directory / "checkpoints" / "1", apart):
        workdir = tmp_path / str(count)
        shutil.copytree(directory, workdir)

        def remove_and_die(step, count=count):
            remove_some(step, count)
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(deletion, "_remove", remove_and_die)
            deletion.delete(store.absolute(workdir / "checkpoints" / "1"))
        assert_goes_on(workdir, state, "finished deleting", caplog)
        assert os.listdir(workdir / "checkpoints") == ["3"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4, 9])
def test_an_older_step_that_was_half_deleted_in_place_is_left_alone(run, tmp_path, count, caplog):
    """This is what versions before this one left; whose it is we cannot know."""
    directory, state = run
    shutil.copytree(directory, tmp_path / "run")
    remove_some(tmp_path / "run/checkpoints/1", count)
    assert_goes_on(tmp_path / "run", state, "ignored step", caplog)
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["1", "3"]


def test_the_newest_step_is_never_passed_over_by_a_run(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    remove_some(tmp_path / "run/checkpoints/2", 3)
    message = refusal(CheckpointManager, tmp_path / "run", keep=1)
    assert f"{tmp_path / 'run/checkpoints/2'} is not a complete" in message


def test_a_deletion_that_fails_is_one_line_and_ends_no_run(tmp_path, monkeypatch, caplog):
    def fail(step):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(deletion, "delete", fail)
    state = make_state(make_mesh(8))
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(1, state, make_sidecar())
    manager.save(2, state, make_sidecar())
    manager.close()
    (message,) = [record.getMessage() for record in caplog.records if "cannot delete" in record.getMessage()]
    assert str(tmp_path / "checkpoints" / "1") in message and "Permission denied" in message
    assert store.find(tmp_path).name == "2"


def test_what_a_run_did_not_make_is_not_deleted(tmp_path):
    """Only directories with the names that a deletion gives are leftovers of one."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / deletion._MARKER).write_text("mine")
    (tmp_path / "7.deleted-0123abcd").write_text("a file")
    (tmp_path / "8.deleted-0123abcd").mkdir()
    assert deletion.remove_leftovers(epath.Path(tmp_path)) == ["8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7.deleted-0123abcd", "notes"]


SAVES = """
import itertools, sys
from support.checkpoints import make_mesh, make_sidecar, make_state
from diffusionlm.checkpoint.store import CheckpointManager

with CheckpointManager(sys.argv[1], keep=1) as manager:
    state, first = make_state(make_mesh(8)), (manager.latest_step() or 0) + 1
    for step in itertools.count(first):
        manager.save(step, state, make_sidecar(source={"step": step}))
        print(step, flush=True)
"""


@pytest.mark.slow
def test_runs_that_are_killed_while_they_save_go_on(tmp_path, capsys):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    kills, newest, interrupted = 25, 0, 0
    for _ in range(kills):
        command = [sys.executable, "-c", SAVES, str(tmp_path)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            for _ in range(random.randrange(3, 12)):
                assert process.stdout.readline(), process.stderr.read().decode()
            process.kill()
        interrupted += any(".deleted-" in name for name in os.listdir(tmp_path / "checkpoints"))
        step = int(store.find(tmp_path).name)
        assert step > newest and store.load_sidecar(tmp_path).source["step"] == step
        newest = step
    with capsys.disabled():
        print(f"\n{kills} kills, {interrupted} of them in a deletion; step {newest} is the newest")
