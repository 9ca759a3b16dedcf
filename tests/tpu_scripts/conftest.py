"""A fake cloud, and the worker of one of its hosts."""

import os
import signal
import subprocess

import pytest
from support.fake_cloud import SCRIPTS, Cloud


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    for pids in tmp_path.glob("hosts/*/diffusionlm_run/pids"):
        for pid in pids.read_text().split():
            try:
                os.kill(int(pid), signal.SIGKILL)
            except ProcessLookupError:
                pass


@pytest.fixture
def worker(cloud):
    """Return a function that runs worker.sh as on one host."""
    environment = cloud.environment | {"HOME": str(cloud.path)}

    def call(*words: str, code: int = 0) -> str:
        command = ["bash", str(SCRIPTS / "worker.sh"), *words]
        done = subprocess.run(command, env=environment, cwd=cloud.path, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, f"{words}: {done.returncode} {done.stdout} {done.stderr}"
        return done.stdout + done.stderr

    yield call
    call("stop", "--timeout", "0", "--kill")
