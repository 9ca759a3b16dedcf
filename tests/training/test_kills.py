"""A run that is killed again and again, wherever it touches a file, ends with the numbers of one that was not."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import child_processes, tiny_run
from support.run_files import timeless

KILLS = int(os.environ.get("DIFFUSIONLM_KILLS", "10"))  # of each kind of run
SEED = int(os.environ.get("DIFFUSIONLM_KILLS_SEED", "17"))
ATTEMPTS = 12  # starts of one run; by then it must have ended
SAVES = {"steps": 12, "eval_every": 4, "checkpoint_every": 1, "keep": 1, "keep_every": 5}
PARTS = {"alignment": "shifted", "arm_steps": 5, "anneal_steps": 4, "random_length": 0.0}
RUNS = {"from scratch": {"run": SAVES}, "in parts": {"run": SAVES, "diffusion": PARTS, "optim": {"warmup_steps": 2}}}

# A run, which kills itself at the KILL_AT-th time that it opens, makes, renames or removes something in its directory.
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
from support import tiny_run

dataset, workdir, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
touched = 0

def touch(event, args):
    global touched
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"):
        if any(isinstance(arg, (str, os.PathLike)) and os.fspath(arg).startswith(workdir) for arg in args):
            touched += 1
            if touched == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(touch)
tiny_run.trainer.train(tiny_run.tiny(dataset, **json.loads(sys.argv[4])), Path(workdir))
print(touched)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a function that starts the run in a directory, to be killed at a given touch (0: never)."""
    directory = tmp_path_factory.mktemp("kills")
    dataset = tiny_run.make_dataset(directory / "data")
    environment = {**child_processes.environment(directory / "compiled"), "PYTHONPATH": str(Path(__file__).parents[1])}

    def run(changes, workdir, kill_at):
        command = [sys.executable, "-c", PROGRAM, str(dataset), str(workdir), str(kill_at), json.dumps(changes)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    return run


def ended(workdir):
    """Return the records of a run without the times in them."""
    result = json.loads((workdir / "DONE.json").read_text())
    return timeless(workdir), result["eval"], result["train_loss"], result["step"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_is_killed_at_random_ends_bit_for_bit_as_one_that_is_not(kind, start, tmp_path):
    start = functools.partial(start, RUNS[kind])
    whole = start(tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    touches, expected = int(whole.stdout), ended(tmp_path / "whole")
    draw, kills, runs, refused = random.Random(SEED), 0, 0, []
    while kills < KILLS:
        workdir, runs = tmp_path / f"run{runs}", runs + 1
        for _ in range(ATTEMPTS):
            at = draw.randrange(1, touches)
            attempt = start(workdir, at if kills < KILLS else 0)
            if attempt.returncode != -signal.SIGKILL:
                break
            kills += 1
        if attempt.returncode:
            refused.append((workdir.name, at, attempt.stderr.strip().splitlines()[-1]))
            continue
        assert ended(workdir) == expected, (workdir.name, at)
    counts = f"{kills} kills at up to {touches} touches of files; {runs} runs, {len(refused)} did not end"
    print(f"{kind}, seed {SEED}: {counts}")
    assert not refused
