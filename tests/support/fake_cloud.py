"""A fake cloud for the scripts in tpu_scripts/, and a complete call of each script.

The stand-ins of gcloud, xpk, uv and diffusionlm are in tests/fixtures/tpu; worker.sh, which runs on the hosts, is real.
"""

import os
import shlex
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tpu_scripts"
PROGRAMS = ROOT / "tests" / "fixtures" / "tpu"
COMMANDS = sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name not in ("lib.sh", "worker.sh"))
ZONE = "--zone=us-west4-a"
RUN = "gs://bucket/run"
PACKAGE = "--package=diffusionlm-jax[tpu]==0.1"
IMAGE = "us-docker.pkg.dev/p/r/diffusionlm:0123"
TRAIN = ["--", "train", "smdm_170m", "--data.path", "gs://bucket/a b"]
PREPARE = ["--", "data", "prepare", "gs://bucket/a b/*.jsonl", "--sequence_length", "2048", "--tokenizer", "byte"]
SWEEP = ["--", "sweep", "run", "isoflop"]

# A complete call of each script.
CALLS = {
    "create.sh": ["pod", "--type=v5e-16", ZONE],
    "setup.sh": ["pod", ZONE, PACKAGE],
    "launch.sh": ["pod", ZONE, f"--workdir={RUN}", *TRAIN],
    "logs.sh": ["pod", ZONE],
    "status.sh": ["pod", ZONE, f"--workdir={RUN}"],
    "stop.sh": ["pod", ZONE],
    "delete.sh": ["pod", ZONE],
    "keep_running.sh": ["pod", "--type=v5e-16", ZONE, f"--workdir={RUN}", PACKAGE, *TRAIN],
    "sweep_vms.sh": ["pod", "--workers=2", "--type=v5e-8", ZONE, f"--workdir={RUN}", PACKAGE, *SWEEP],
    "profile.sh": ["pod", ZONE, f"--workdir={RUN}", "--output=traces", *TRAIN],
    "xpk_run.sh": ["run", "--cluster=c", "--type=v5e-16", ZONE, f"--image={IMAGE}", f"--workdir={RUN}", *TRAIN],
    "xpk_sweep.sh": ["w", "--workers=2", "--cluster=c", "--type=v6e-16", ZONE, f"--image={IMAGE}", f"--workdir={RUN}"]
    + SWEEP,
    "dataflow.sh": ["prepare", "--output=gs://bucket/out", "--region=us-central1", "--project=p", *PREPARE],
    "build_image.sh": ["us-docker.pkg.dev/p/r/diffusionlm", "--push"],
}


def with_options(name: str, *options: str) -> list[str]:
    """Return the complete call of a script, with further options before the command of diffusionlm."""
    words = CALLS[name]
    cut = words.index("--") if "--" in words else len(words)
    return [name, *words[:cut], *options, *words[cut:]]


class Cloud:
    """A fake cloud in a directory, against which the scripts run."""

    def __init__(self, path: Path):
        self.path = path
        for name in ("hosts", "bucket"):
            (path / name).mkdir()
        for name in ("calls", "runs", "workloads"):
            (path / name).touch()
        self.set(states=["ABSENT"], behaviour=["train"])
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("CLOUDSDK", "DIFFUSIONLM", "JAX"))}
        self.environment = inherited | {
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
        """Return the commands of a dry run, split into words."""
        call = with_options(script, *words) if not words or words[0].startswith("--") else [script, *words]
        at = call.index("--") if "--" in call else len(call)
        lines = self.run(*call[:at], "--dry-run", *call[at:]).stdout.splitlines()
        assert not self.calls() and not self.runs(), "a dry run did something"
        return [shlex.split(line) for line in lines]

    def calls(self, about: str = "") -> list[str]:
        return [line for line in (self.path / "calls").read_text().splitlines() if about in line]

    def runs(self) -> list[str]:
        """Return the commands that hosts ran, as "HOST ARGUMENTS | LIBTPU_INIT_ARGS | JAX_PLATFORMS"."""
        return [line.replace(f"{self.path}/hosts/", "") for line in (self.path / "runs").read_text().splitlines()]

    def setup(self) -> None:
        self.run("setup.sh", *CALLS["setup.sh"])

    def states(self) -> list[str]:
        """Return the states of the two hosts of `pod`."""
        states = []
        for host in sorted((self.path / "hosts").iterdir()):
            environment = self.environment | {"HOME": str(host)}
            command = ["bash", "diffusionlm_worker.sh", "state"]
            done = subprocess.run(command, env=environment, cwd=host, capture_output=True, text=True, check=True)
            states.append(" ".join(done.stdout.split()[1:]))
        return states


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)
