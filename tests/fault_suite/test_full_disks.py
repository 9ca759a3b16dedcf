"""Disks that fill at any moment: one line, nothing half-written, and the same command ends well on a larger disk."""

import collections
import contextlib
import hashlib
import os
import shutil
import subprocess

import jax
import pytest
from support import tiny_run
from support.run_files import timeless

from diffusionlm.cli import main as cli
from diffusionlm.errors import UserError
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.training import loop as trainer

pytestmark = pytest.mark.slow
SIZES = (4, 12, 20, 36, 60, 100, 160, 260, 420, 700, 1100, 1800, 2900)  # KiB
LARGE = 256 << 10
MODEL = "docs/results/models/tinystories"


@pytest.fixture(scope="module")
def may_mount(tmp_path_factory):
    """Skip where this user may not mount a small disk."""
    with small_disk(tmp_path_factory.mktemp("mount"), 4):
        pass


@contextlib.contextmanager
def small_disk(directory, kibibytes):
    """Mount a file system in memory of this size at `directory`."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "none", str(directory)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def enlarge(directory):
    subprocess.run(["mount", "-o", f"remount,size={LARGE}k", str(directory)], check=True)


def files(directory):
    """Return the digest of each file below a directory, but for that which says when it was made."""
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "meta.json")
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {number} of a text, and {number * number} more\n" for number in range(20_000)))
    return path


def commands(text):
    """Return the arguments of each verb that writes, without its output."""
    model = os.path.abspath(MODEL)
    return {
        "data prepare": ["data", "prepare", str(text), "--tokenizer", "byte", "--sequence_length", "64"],
        "data prepare, its own tokenizer": [
            "data",
            "prepare",
            str(text),
            "--vocab_size",
            "300",
            "--sequence_length",
            "64",
        ],
        "export": ["export", model, "--format", "llama"],
    }


@pytest.mark.parametrize("name", ["data prepare", "data prepare, its own tokenizer", "export"])
def test_what_a_verb_writes_is_whole_or_absent(name, text, may_mount, tmp_path, capfd):
    arguments, counts = commands(text)[name], collections.Counter()
    assert cli.main([*arguments, "--output", str(tmp_path / "expected")]) == 0
    expected = files(tmp_path / "expected")
    for size in SIZES:
        with small_disk(tmp_path, size) as disk:
            output = disk / "output"
            capfd.readouterr()
            code = cli.main([*arguments, "--output", str(output)])
            error = capfd.readouterr().err
            counts[code] += 1
            if code:
                assert code == 2 and error.count("diffusionlm: error:") == 1 and "Traceback" not in error, error
                assert "No space left" in error, error
                # What a preparation has done is kept for the next one, beside the output.
                names = [path.name.rpartition("-")[0] for path in disk.iterdir()]
                assert names == ([] if name == "export" else [".output.partial"][: len(names)])
                enlarge(disk)
                assert cli.main([*arguments, "--output", str(output)]) == 0
            assert files(output) == expected and list(disk.iterdir()) == [output]
    print(f"{name}: {counts[2]} of {len(SIZES)} disks were full")
    assert counts[2] > 3


def test_a_run_on_a_full_disk_goes_on_bit_for_bit_on_a_larger_one(may_mount, tmp_path_factory):
    cfg = tiny_run.tiny(tiny_run.make_dataset(tmp_path_factory.mktemp("data")), run={"keep": 2})
    expected, disk, full = tmp_path_factory.mktemp("expected"), tmp_path_factory.mktemp("disk"), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
        trainer.train(cfg, expected)
        for size in SIZES:
            with small_disk(disk, size):
                try:
                    run = trainer.train(cfg, disk / "run")
                except (UserError, OSError) as error:  # the command prints either as one line
                    full += 1
                    assert "No space left" in str(error) and "\n" not in str(error)
                    enlarge(disk)
                    run = trainer.train(cfg, disk / "run")
                assert run.done and timeless(disk / "run") == timeless(expected)
                assert run.result["eval"] == trainer.train(cfg, expected).result["eval"]
    print(f"train: {full} of {len(SIZES)} disks were full")
    assert full > 3
