"""A prepared dataset and a finished run of a tiny `demo`, for the tests of all verbs."""

import pytest
from support.command_line import LENGTH, TINY, options

from diffusionlm.cli import main as cli


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Return a prepared dataset of bytes."""
    directory = tmp_path_factory.mktemp("data")
    (directory / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(400)))
    args = ["--output", str(directory / "made"), "--tokenizer", "byte", "--sequence_length", str(LENGTH)]
    assert cli.main(["data", "prepare", str(directory / "text.txt"), *args]) == 0
    return directory / "made"


@pytest.fixture(scope="session")
def run(dataset, tmp_path_factory):
    """Return a finished run directory."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    args = ["--workdir", str(workdir), "--data.path", str(dataset), *options(TINY)]
    assert cli.main(["train", "demo", *args]) == 0
    return workdir
