"""Orbax is silent; the output of other libraries is kept."""

import asyncio
import gc
import logging
import os
import subprocess
import sys

import pytest
from support.checkpoints import (
    make_mesh,
    make_sidecar,
    make_state,
    save_run,
)

from diffusionlm.checkpoint import store as checkpoint

FAILURES = """
import sys
from pathlib import Path
import jax.numpy as jnp
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.errors import UserError

source, target = map(Path, sys.argv[1:])
sidecar = checkpoint.load_sidecar(source)
max((source / "params").glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size).write_bytes(b"")
params = {"w": jnp.ones(9)}
for call in (lambda: checkpoint.load_params(source), lambda: checkpoint.save_params(target, params, sidecar)):
    try:
        call()
    except UserError:
        print("refused")
"""


@pytest.mark.slow
def test_a_failure_says_nothing_on_stderr_in_a_process_of_its_own(tmp_path):
    checkpoint.save_params(tmp_path / "model", make_state(make_mesh(8)).params, make_sidecar())
    command = [sys.executable, "-c", FAILURES, tmp_path / "model", tmp_path / "model" / "commit_success.txt" / "x"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert (result.returncode, result.stdout, result.stderr) == (0, "refused\nrefused\n", "")


def test_a_task_of_somebody_else_is_still_reported(tmp_path, caplog):
    save_run(tmp_path, 1)  # from here on Orbax's are not

    async def fail(message):
        raise ValueError(message)

    async def leave():
        for message in ("DATA_LOSS: what TensorStore says", "my own mistake"):
            asyncio.get_running_loop().create_task(fail(message))
        await asyncio.sleep(0)

    asyncio.run(leave())
    gc.collect()
    assert [str(record.exc_info[1]) for record in caplog.records if record.name == "asyncio"] == ["my own mistake"]


def test_orbax_is_quiet_unless_its_log_was_asked_for(tmp_path, caplog):
    caplog.set_level(logging.INFO)  # of the root logger, as many programs set it
    save_run(tmp_path / "quiet", 1)
    assert [record for record in caplog.records if record.name == "absl"] == []
    caplog.set_level(logging.INFO, logger="absl")
    save_run(tmp_path / "loud", 1)
    assert [record for record in caplog.records if record.name == "absl"] != []
