"""The sets of compiler flags, the image, and the commands of the README."""

import re
import shlex

import pytest
from support.fake_cloud import CALLS, COMMANDS, ROOT, RUN, SCRIPTS, with_options
from support.slow_cases import thinned


def flag_lines() -> list[list[str]]:
    lines = (SCRIPTS / "xla_flags.conf").read_text().splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


def test_every_compiler_flag_is_documented_and_well_formed():
    for line in flag_lines():
        assert len(line) == 3, line
        assert set(line[1].split(",")) <= {"v4", "v5e", "v5p", "v6e"} and re.fullmatch(r"--xla_\w+=\w+", line[2]), line
    comments = re.findall(r"((?:^#.*\n)+)(\w+) ", (SCRIPTS / "xla_flags.conf").read_text(), re.MULTILINE)
    assert {name for _, name in comments} == {name for name, _, _ in flag_lines()}, "each set needs a comment before it"
    for comment, name in comments:
        assert re.search(r"\[(guide|maxtext)", comment), f"{name} has no source"


@pytest.mark.parametrize("name", sorted({line[0] for line in flag_lines()}))
def test_a_set_of_compiler_flags_reaches_the_host(cloud, name):
    expected = [line[2] for line in flag_lines() if line[0] == name]
    start = cloud.dry("launch.sh", f"--flags={name}")[-1][-1].removeprefix("--command=")
    assert f"LIBTPU_INIT_ARGS={' '.join(expected)}" in shlex.split(start)


def test_there_are_no_compiler_flags_by_default_and_those_of_other_chips_are_refused(cloud):
    cloud.set(states=["ACTIVE"])
    cloud.setup()
    error = cloud.run("launch.sh", *with_options("launch.sh", "--flags=large_vmem")[1:], code=2).stderr
    assert "'large_vmem' is for v6e, not for v5e" in error and not cloud.runs()
    cloud.run("launch.sh", *CALLS["launch.sh"])
    assert all(line.endswith(f"--workdir {RUN} |  | tpu,cpu") for line in cloud.runs()), cloud.runs()


def test_dockerignore_admits_the_files_that_the_image_copies():
    dockerfile = (SCRIPTS / "Dockerfile").read_text()
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [w for line in re.findall(r"^COPY (.*)$", dockerfile, re.MULTILINE) for w in line.split()[:-1]]
    copied = [word for word in copied if not word.startswith("--")]
    assert set(copied) == sent and all((ROOT / name).exists() for name in copied)
    base = re.search(r"^FROM (\S+)$", dockerfile, re.MULTILINE)
    assert base and re.fullmatch(r"python:3\.1[1-9]\.\d+-\S+", base[1]), "the base must have one exact version"
    assert 'ENTRYPOINT ["diffusionlm"]' in dockerfile and ".[tpu]" in dockerfile


def readme_commands() -> list[str]:
    text = (SCRIPTS / "README.md").read_text().replace("\\\n", " ")
    return [line.strip() for line in re.findall(r"^    (tpu_scripts/\w+\.sh .*)$", text, re.MULTILINE)]


def test_the_readme_names_all_scripts():
    text = (SCRIPTS / "README.md").read_text()
    assert [name for name in COMMANDS if f"`{name}`" not in text] == [] and len(readme_commands()) > 8


@pytest.mark.parametrize("line", thinned(readme_commands(), every=2))
def test_the_commands_of_the_readme(cloud, line):
    words = shlex.split(line, comments=True)
    assert cloud.dry(words[0].removeprefix("tpu_scripts/"), *words[1:])
