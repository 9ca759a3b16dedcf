"""Failures of reading and writing are one line, and cost no earlier checkpoint."""

import contextlib
import errno
import itertools
import os
import re
import resource

import jax
import jax.numpy as jnp
import pytest
from support.checkpoints import (
    abstract_state,
    bits,
    data_file,
    make_mesh,
    make_sidecar,
    make_state,
    refusal,
    save_run,
)
from support.slow_cases import slow_but

from diffusionlm.checkpoint import failures
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.checkpoint.store import CheckpointManager
from diffusionlm.errors import LostProcess, UserError


@pytest.mark.parametrize(
    ("damage", "item"),
    slow_but(
        itertools.product(("half", "missing", "empty", "index"), ("params", "train")),
        (("half", "params"), ("missing", "train")),
    ),
)
def test_a_truncated_file_is_one_line(tmp_path, capfd, item, damage):
    save_run(tmp_path, 1)
    step = tmp_path / "checkpoints" / "1"
    path = step / item / "manifest.ocdbt" if damage == "index" else data_file(step / item)
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if damage != "empty" else 0)
    with CheckpointManager(tmp_path, keep=1) as manager:
        message = refusal(manager.restore, abstract_state(make_mesh(8)))
    assert f"cannot read the checkpoint {step}, a file of {item}/ is damaged or missing" in message
    if item == "params":
        assert f"cannot read the checkpoint {step}" in refusal(checkpoint.load_params, step)
    else:
        checkpoint.load_params(step)
    assert capfd.readouterr() == ("", "")


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 1 kB: what a full disk does, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_costs_no_earlier_checkpoint(tmp_path, capfd):
    first = save_run(tmp_path, 1)
    with CheckpointManager(tmp_path, keep=1) as manager, full_disk():
        manager.save(2, make_state(make_mesh(8), seed=2), make_sidecar())
        message = refusal(manager.wait)
    assert re.search(f"cannot write .*{tmp_path}.*: File too large", message)
    with CheckpointManager(tmp_path, keep=1) as manager:
        assert manager.latest_step() == 1
        assert bits(manager.restore(abstract_state(make_mesh(8)))) == bits(first)
    save_run(tmp_path, 2)
    assert checkpoint.find(tmp_path).name == "2"
    assert capfd.readouterr() == ("", "")


def test_a_model_that_does_not_fit_on_the_disk_leaves_nothing_to_find(tmp_path, capfd):
    params = make_state(make_mesh(8)).params
    with full_disk():
        assert str(tmp_path / "model") in refusal(checkpoint.save_params, tmp_path / "model", params, make_sidecar())
    assert "does not exist" in refusal(checkpoint.find, tmp_path / "model")
    assert capfd.readouterr() == ("", "")


def refuses_to_write(directory, reason):
    for call in (
        lambda: CheckpointManager(directory / "run", keep=1),
        lambda: checkpoint.save_params(directory / "model", {"w": jnp.ones(2)}, make_sidecar()),
    ):
        message = refusal(call)
        assert str(directory) in message and reason in message


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path, capfd):
    (tmp_path / "file").write_text("in the way")
    refuses_to_write(tmp_path / "file", "Not a directory")
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only directory")
def test_a_read_only_directory_is_one_line(tmp_path, capfd):
    os.chmod(tmp_path, 0o500)
    refuses_to_write(tmp_path, "Permission denied")
    assert capfd.readouterr() == ("", "")


def caused(error, cause):
    error.__cause__ = cause
    return error


BARRIER = jax.errors.JaxRuntimeError("INTERNAL: Barrier failed because: task is set to ERROR: heartbeat timeout.")


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("Timed out after 300.0 seconds."),
        caused(TimeoutError("Timed out while waiting for async_write_complete barrier."), BARRIER),
        caused(ValueError("Save failed"), caused(TimeoutError("Timeout waiting at barrier 'x'."), BARRIER)),
        BARRIER,
        jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"),
    ],
)
def test_the_death_of_another_process_is_not_a_failure_to_write(tmp_path, monkeypatch, error):
    """Orbax says so by timeouts, which are errors of the operating system to Python."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(LostProcess) as lost, failures.writing(tmp_path):
        raise error
    assert re.match(
        rf"cannot complete the checkpoints in {tmp_path}: another process of this run died or hangs \(.+\); see the "
        "logs of the others .*, and restart all processes to resume",
        str(lost.value),
    )
    assert "\n" not in str(lost.value)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_that_does_not_answer_is_not_the_death_of_a_process(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    with pytest.raises(UserError, match="cannot write checkpoints to .*: .*Connection timed out"):
        with failures.writing(tmp_path):
            raise OSError(errno.ETIMEDOUT, "Connection timed out")
    with pytest.raises(jax.errors.JaxRuntimeError), failures.writing(tmp_path):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
