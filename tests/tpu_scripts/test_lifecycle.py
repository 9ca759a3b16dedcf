"""The life of TPUs and runs in a fake cloud: creation, set-up, preemption, crashes, sweeps and profiles."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from support.fake_cloud import (
    CALLS,
    RUN,
    SCRIPTS,
    ZONE,
    wait_for,
    with_options,
)


def test_create_leaves_an_existing_request_alone(cloud):
    cloud.set(states=["WAITING_FOR_RESOURCES"])
    assert "exists already: WAITING_FOR_RESOURCES" in cloud.run("create.sh", *CALLS["create.sh"]).stderr
    cloud.set(states=["SUSPENDED"])
    assert "--replace" in cloud.run("create.sh", *CALLS["create.sh"], code=1).stderr
    assert not cloud.calls("resources create") and not cloud.calls("resources delete")
    cloud.run("create.sh", *CALLS["create.sh"], "--replace")
    assert cloud.calls("resources create") and cloud.calls("resources delete")


def test_create_waits(cloud):
    cloud.set(states=["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    cloud.run("create.sh", *CALLS["create.sh"], "--wait", "--poll=0")
    assert len(cloud.calls("resources describe")) == 4
    cloud.set(states=["ABSENT", "FAILED"])
    assert "pod is FAILED" in cloud.run("create.sh", *CALLS["create.sh"], "--wait", "--poll=0", code=1).stderr


def test_setup_installs_once(cloud):
    cloud.setup()
    assert len(cloud.calls("uv pip install")) == 2, "two hosts"
    assert all("diffusionlm-jax[tpu]==0.1 gcsfs" in line for line in cloud.calls("uv pip install"))
    cloud.setup()
    assert len(cloud.calls("uv pip install")) == 2
    cloud.run("setup.sh", "pod", ZONE, "--package=diffusionlm-jax[tpu]==0.2")
    assert len(cloud.calls("uv pip install")) == 4


def test_setup_brings_the_commit_that_is_checked_out(cloud):
    repository = cloud.path / "repository"
    shutil.copytree(SCRIPTS, repository / "tpu_scripts")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    setup = [repository / "tpu_scripts" / "setup.sh", "pod", ZONE]
    subprocess.run(["bash", *setup], env=cloud.environment, cwd=cloud.path, check=True, capture_output=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    for host in ("pod-0", "pod-1"):
        tree = cloud.path / "hosts" / host / "diffusionlm_run" / "tree"
        command = ["git", "-C", str(tree), "rev-parse", "HEAD"]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == commit
        assert any(f"--editable {tree}[tpu] gcsfs" in line for line in cloud.calls("uv pip install"))
    (repository / "tpu_scripts" / "README.md").write_text("changed")
    done = subprocess.run(["bash", *setup], env=cloud.environment, cwd=cloud.path, capture_output=True, text=True)
    assert done.returncode == 2 and "uncommitted changes" in done.stderr


def test_dataflow_refuses_files_that_no_commit_has(cloud):
    """A wheel has what lies in the checkout, also what git does not know."""
    repository = cloud.path / "repository"
    shutil.copytree(SCRIPTS, repository / "tpu_scripts")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    (repository / "diffusionlm").mkdir()
    (repository / "diffusionlm" / "new.py").touch()
    words = ["bash", str(repository / "tpu_scripts" / "dataflow.sh"), *CALLS["dataflow.sh"]]
    done = subprocess.run(words, env=cloud.environment, cwd=cloud.path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "new files in" in done.stderr and "commit them, or stash them" in done.stderr


def test_launch_refuses_to_start_twice(cloud):
    cloud.set(states=["ACTIVE"])
    cloud.setup()
    cloud.run("launch.sh", *CALLS["launch.sh"])
    assert cloud.states() == ["running -", "running -"]
    error = cloud.run("launch.sh", *CALLS["launch.sh"], code=3).stderr
    assert "2 of 2 hosts of pod are already running a command; stop.sh pod first" in error
    deadline = time.monotonic() + 20  # a command records its arguments a moment after it has started
    while len(cloud.runs()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(cloud.runs()) == 2, "one command a host"


def test_launch_requires_hosts_that_are_set_up(cloud):
    (cloud.path / "hosts" / "pod-0").mkdir()
    (cloud.path / "hosts" / "pod-1").mkdir()
    assert "setup.sh pod" in cloud.run("launch.sh", *CALLS["launch.sh"], code=1).stderr


def test_status_logs_stop_and_delete(cloud):
    cloud.set(states=["ACTIVE"])
    cloud.setup()
    cloud.run("launch.sh", *CALLS["launch.sh"])
    run = cloud.path / "bucket" / "bucket" / "run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 10, "loss": 5.0}\n{"step": 20, "loss": 4.0}\n')
    assert "no heartbeat" in cloud.run("status.sh", *CALLS["status.sh"]).stdout
    (run / "heartbeat").write_text('{"step": 21}')
    status = cloud.run("status.sh", *CALLS["status.sh"]).stdout
    assert '{"step": 21}' in status and "no heartbeat" not in status
    assert "queued resource pod: ACTIVE" in status and "hosts running: 2" in status
    assert '{"step": 20, "loss": 4.0}' in status and '"step": 10' not in status
    assert "stop.sh pod" in cloud.run("delete.sh", *CALLS["delete.sh"], code=3).stderr
    cloud.run("stop.sh", *CALLS["stop.sh"])
    assert cloud.states() == ["stopped 42", "stopped 42"]
    assert "saved" in cloud.run("logs.sh", *CALLS["logs.sh"]).stdout
    (run / "DONE.json").write_text('{"step": 30}')
    assert 'the run is done: {"step": 30}' in cloud.run("status.sh", *CALLS["status.sh"]).stdout
    cloud.run("delete.sh", *CALLS["delete.sh"])
    cloud.set(states=["ABSENT"])
    cloud.run("delete.sh", *CALLS["delete.sh"])
    assert len(cloud.calls("resources delete")) == 1, "an absent resource is not deleted"


KEEP = ["keep_running.sh", *with_options("keep_running.sh", "--poll=0")[1:]]


ASKED = ["ABSENT", "ABSENT", "WAITING_FOR_RESOURCES", "ACTIVE"]  # once for keep_running.sh, once for create.sh, ...


@pytest.mark.slow
def test_a_preempted_run_resumes_from_the_bucket(cloud):
    cloud.set(states=[*ASKED, "ACTIVE", "SUSPENDED", *ASKED], behaviour=["train", "finish"])
    done = cloud.run(*KEEP)
    assert "preempted; requesting it again" in done.stderr and "done (preempted 1 times)" in done.stderr
    assert len(cloud.calls("resources create")) == 2 and len(cloud.calls("resources delete")) == 1
    started = cloud.runs()
    assert len(started) == 4 and len(set(started)) == 2, "the same command on the same two hosts, before and after"
    # Another call has nothing to do: the run is done, and nothing is rented.
    cloud.set(states=["ABSENT"])
    assert "DONE.json exists" in cloud.run(*KEEP).stderr
    assert len(cloud.calls("resources create")) == 2


def test_a_command_that_crashes_is_started_again(cloud):
    cloud.set(states=ASKED, behaviour=["134", "137", "finish"])
    done = cloud.run(*with_options("keep_running.sh", "--poll=0", "--delete"))
    assert "restarting (2 of 3 in a row)" in done.stderr and "done (preempted 0 times)" in done.stderr
    assert len(cloud.calls("resources create")) == 1 and len(cloud.calls("resources delete")) == 1


@pytest.mark.slow
def test_a_command_that_always_crashes_is_abandoned(cloud):
    cloud.set(states=ASKED, behaviour=["1"])
    error = cloud.run(*KEEP, code=1).stderr
    assert "output before the end" in error and "ended 4 times in a row" in error and "stays and is billed" in error
    assert len(cloud.runs()) == 2 * 4, "the first start, and three more"


@pytest.mark.slow
def test_a_mistake_is_not_retried(cloud):
    cloud.set(states=ASKED, behaviour=["2"])
    error = cloud.run(*KEEP, code=2).stderr
    assert "output before the end" in error and len(cloud.runs()) == 2


@pytest.mark.slow
def test_stop_ends_keep_running(cloud):
    cloud.set(states=ASKED)
    watcher = subprocess.Popen(
        ["bash", SCRIPTS / KEEP[0], *KEEP[1:]], env=cloud.environment, cwd=cloud.path, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len(cloud.runs()) == 2)
    cloud.run("stop.sh", *CALLS["stop.sh"])
    _, error = watcher.communicate(timeout=600)
    assert watcher.returncode == 4 and "stopped by stop.sh" in error and len(cloud.runs()) == 2


@pytest.mark.slow
def test_hosts_that_lost_a_peer_restart_together(cloud):
    """One host dies and the other hangs: it is stopped, which does not count as a request to stop, and both restart."""
    cloud.set(states=ASKED, behaviour=["train", "finish"])
    watcher = subprocess.Popen(
        ["bash", SCRIPTS / KEEP[0], *KEEP[1:]], env=cloud.environment, cwd=cloud.path, stderr=subprocess.PIPE, text=True
    )
    # keep_running.sh looks, launch.sh looks, and there is one look after the launch.
    wait_for(lambda: len(cloud.runs()) == 2 and len(cloud.calls("worker.sh state")) >= 3)
    for pid in (cloud.path / "hosts" / "pod-1" / "diffusionlm_run" / "pids").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    _, error = watcher.communicate(timeout=600)
    assert watcher.returncode == 0 and "1 of 2 hosts are running" in error and len(cloud.runs()) == 4


def test_failing_requests_are_abandoned(cloud):
    cloud.set(states=["ABSENT", "ABSENT", "FAILED", "ABSENT", "ABSENT", "FAILED"])
    error = cloud.run(*with_options("keep_running.sh", "--poll=0", "--max-failures=2"), code=1).stderr
    assert "the request for pod failed, see above (2 of 2 in a row)" in error and not cloud.runs()
    cloud.set(no_quota=[""], states=["ABSENT"])
    error = cloud.run(*with_options("keep_running.sh", "--poll=0", "--max-failures=3"), code=1).stderr
    assert "could not create pod (3 of 3 in a row)" in error


@pytest.mark.slow
def test_a_sweep_on_virtual_machines(cloud):
    cloud.set(states=["ACTIVE"], behaviour=["0"])
    cloud.environment["FAKE_HOSTS"] = "1"
    done = cloud.run(*with_options("sweep_vms.sh", "--poll=0"))
    assert "pod-0 ended with exit code 0" in done.stderr and "pod-1 ended with exit code 0" in done.stderr
    assert sorted(cloud.runs()) == [f"pod-{i}-0 sweep run isoflop --workdir {RUN} |  | tpu,cpu" for i in range(2)]
    assert len(cloud.calls("resources delete")) == 2, "every worker deletes its slice"
    assert "done" in (cloud.path / "pod-logs" / "pod-0.log").read_text()


def test_xpk_workloads_are_created_once(cloud):
    cloud.run("xpk_run.sh", *CALLS["xpk_run.sh"])
    assert "exists already" in cloud.run("xpk_run.sh", *CALLS["xpk_run.sh"]).stderr
    assert len(cloud.calls("workload create")) == 1


def test_an_xpk_sweep_has_a_workload_for_each_pending_cell(cloud):
    (cloud.path / "sweep.json").write_text(
        json.dumps({"done": 1, "running": 0, "failed": 0, "pending": 3, "cells": []})
    )
    call = [word.replace("--workers=2", "--workers=pending") for word in CALLS["xpk_sweep.sh"]]
    cloud.run("xpk_sweep.sh", *call)
    created = cloud.calls("workload create")
    assert [line.split()[2] for line in created] == [f"--workload=w-{i}" for i in range(3)]
    assert all(line.endswith(f"exec diffusionlm_worker run -- sweep run isoflop --workdir {RUN}") for line in created)
    assert "--all" not in cloud.run("xpk_sweep.sh", *call[:-4], "--dry-run", *call[-4:]).stdout.splitlines()[0]
    everything = cloud.run("xpk_sweep.sh", *call[:-4], "--dry-run", *call[-4:], "--all")
    assert everything.stdout.splitlines()[0].endswith("--json --all")
    (cloud.path / "sweep.json").write_text(json.dumps({"pending": 0}))
    assert "no cell of isoflop is pending" in cloud.run("xpk_sweep.sh", *call).stderr
    assert len(cloud.calls("workload create")) == 3


@pytest.mark.slow
def test_a_running_run_can_be_profiled(cloud):
    cloud.set(states=["ACTIVE"], behaviour=["train", "trace"])
    cloud.setup()
    cloud.run("launch.sh", *CALLS["launch.sh"])
    run = cloud.path / "bucket" / "bucket" / "run"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 110, "loss": 4.5}\n{"step": 120, "loss": 4.0}\n')
    done = cloud.run(*with_options("profile.sh", "--poll=0", "--skip=7", "--steps=3"))
    assert "tracing steps 127 to 129" in done.stderr and "xprof --logdir=traces" in done.stderr
    assert all("--run.profile_start 127 --run.profile_steps 3 --workdir" in line for line in cloud.runs()[2:])
    assert list((cloud.path / "traces").rglob("*.xplane.pb")) and cloud.states() == ["running -", "running -"]
