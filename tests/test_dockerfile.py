"""The image runs the two commands of the README on what an installation needs."""

import configparser
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text()


def instructions(name):
    """Return the arguments of every instruction of that name."""
    return re.findall(rf"^{name} (.*)$", TEXT, re.MULTILINE)


def test_the_commands_are_those_of_the_readme():
    (run,), (command,) = instructions("RUN"), instructions("CMD")
    commands = f"    {run} && {' '.join(json.loads(command))}\n"
    assert commands in (ROOT / "README.md").read_text()


def test_everything_that_is_installed_is_copied_and_reaches_docker():
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in instructions("COPY") for word in line.split()[:-1]}
    assert copied <= sent and all((ROOT / name).exists() for name in copied)
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    folders = {name.partition(".")[0] for name in settings["options"]["packages"].split()}
    folders |= {line.split("=")[1].strip() for line in settings["options"]["package_dir"].strip().splitlines()}
    read = {settings["metadata"]["license_files"], settings["metadata"]["long_description"].removeprefix("file: ")}
    assert folders | read | {"setup.cfg", "pyproject.toml"} == copied


def test_the_base_is_a_python_that_is_supported_in_one_exact_version():
    (base,) = instructions("FROM")
    version = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-\w+", base)
    assert version and f"Programming Language :: Python :: {version[1]}" in (ROOT / "setup.cfg").read_text()
