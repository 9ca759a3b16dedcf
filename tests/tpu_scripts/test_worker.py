"""worker.sh, which runs on the hosts: one command at a time, its end, and its exit codes."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from support.fake_cloud import PROGRAMS, RUN, SCRIPTS, wait_for


def test_the_worker_runs_one_command_at_a_time_and_saves_when_stopped(worker):
    assert " idle -" in worker("state")
    assert " running -" in worker("start", "--", "train", "a")
    assert "running already" in worker("start", "--", "train", "b", code=3)
    assert "running already" in worker("run", "--", "train", "b", code=3)
    assert " stopped 42" in worker("stop")
    assert "saved" in worker("log") and " stopped 42" in worker("stop"), "stopping twice is allowed"
    assert " running -" in worker("start", "--", "train", "a")


def test_the_worker_distinguishes_a_restart_and_a_kill_from_a_stop(cloud, worker):
    worker("start", "--", "train", "a")
    assert " failed 42" in worker("stop", "--again"), "keep_running.sh starts it again"
    worker("start", "--", "train", "a")
    for pid in (cloud.path / "diffusionlm_run" / "pids").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    wait_for(lambda: " running " not in worker("state"))
    assert " failed 137" in worker("state")


@pytest.mark.parametrize(("code", "state"), [("0", "finished 0"), ("1", "failed 1"), ("2", "failed 2")])
def test_the_worker_passes_exit_codes_on(cloud, worker, code, state):
    cloud.set(behaviour=[code])
    worker("run", "--", "train", "a", code=int(code))
    assert state in worker("state")


def test_an_exit_without_the_final_file_is_not_success(cloud, worker):
    """diffusionlm exits with 0 when SIGTERM made it stop early; Kubernetes would take that for success."""
    programs = cloud.path / "diffusionlm_run" / "bin"
    programs.mkdir(parents=True)
    shutil.copy(PROGRAMS / "python", programs)
    run = ["run", "--done", f"{RUN}/DONE.json", "--", "train", "a", "--workdir", RUN]
    cloud.set(behaviour=["0", "finish"])
    worker(*run, code=42)
    worker(*run, code=0)


def test_the_final_file_is_found_with_etils(tmp_path):
    """The Python in which diffusionlm is installed reads buckets with the same library."""
    script = re.search(
        r"<<'PYTHON'\nimport sys\n(.*?)^PYTHON$", (SCRIPTS / "worker.sh").read_text(), re.DOTALL | re.MULTILINE
    )
    code = "import sys\n" + script[1]
    (tmp_path / "DONE.json").touch()
    for name, expected in (("DONE.json", 0), ("other", 1)):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path / name), "0"]).returncode == expected


def test_sigterm_reaches_diffusionlm_through_the_shell_of_xpk(cloud):
    """XPK runs the command in a subshell and sends SIGTERM to that alone (manifest of `xpk workload create`)."""
    script = """
        _sigterm() (kill -SIGTERM $! 2>/dev/null;)
        trap _sigterm SIGTERM
        (exec diffusionlm_worker run --done gs://bucket/run/DONE.json -- train a) & PID=$!
        while kill -0 $PID 2>/dev/null; do sleep 0.1; done
        wait $PID
        exit $?
    """
    programs = cloud.path / "programs"
    programs.mkdir()
    shutil.copy(SCRIPTS / "worker.sh", programs / "diffusionlm_worker")
    environment = cloud.environment | {
        "HOME": str(cloud.path),
        "PATH": f"{programs}:{cloud.environment['PATH']}",
    }
    process = subprocess.Popen(
        ["bash", "-c", script], env=environment, cwd=cloud.path, stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: cloud.runs())
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=600)
    assert "saved" in output and process.returncode == 42, "XPK restarts code 42 by default"


def test_a_wheel_is_required_by_the_name_of_the_distribution():
    """Under another name, pip and uv refuse the wheel, as its name is inconsistent."""
    (name,) = re.findall(r"^name = (\S+)$", (SCRIPTS.parent / "setup.cfg").read_text(), re.MULTILINE)
    assert f'source=("{name}[tpu] @ file://' in (SCRIPTS / "worker.sh").read_text()
