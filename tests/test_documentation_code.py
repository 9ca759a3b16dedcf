"""The code of the documentation runs: Python as it stands, and every `diffusionlm` command at least parses.

A Python block that is not meant to run has `<!-- not run: REASON -->` before it, and
`<!-- not run on this page: REASON -->` exempts all blocks of a page.
"""

import ast
import contextlib
import importlib
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from diffusionlm.cli import main as cli
from diffusionlm.evaluation import tasks

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("tpu_scripts/*.md"), *ROOT.glob("docs/**/*.md")]
)
PAGES = [path for path in DOCUMENTS if "_build" not in path.parts]
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """Return the blocks of a language that are not exempt from running."""
    text = page.read_text()
    if "<!-- not run on this page: " in text:
        return []
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()].rstrip().rpartition("\n")[2]
        if match[2] == language and not re.fullmatch(r"<!-- not run: .+ -->", before):
            found.append(textwrap.dedent(match[3]))
    return found


def commands(page: Path) -> list[str]:
    """Return the `diffusionlm` commands of a page: of its blocks, and in Markdown without fences of indented lines."""
    text = page.read_text().replace("\\\n", " ")
    lines = [line for match in FENCE.finditer(text) if match[2] in ("bash", "console") for line in match[3].split("\n")]
    lines += re.findall(r"(?m)^    (.*)$", FENCE.sub("", text))
    calls = [re.search(r"(?:^ *|&& |\$ )(diffusionlm .*)", line) for line in lines]
    return [call[1] for call in calls if call]


def words_of(command: str) -> list[str]:
    """Return the words of a command without its comment, its redirections and the program."""
    words = shlex.split(command, comments=True)[1:]
    for i, word in enumerate(words):
        if word in ("<", ">", "|", "&&"):
            return words[:i]
    return words


class Parsed(Exception):
    """The command line has been understood; nothing is run."""


def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every verb stop where it would begin its work."""
    from diffusionlm import options

    def parse(*args, **kwargs):
        options_parse(*args, **kwargs)
        raise Parsed

    options_parse = options.parse
    for info in pkgutil.iter_modules(importlib.import_module("diffusionlm.cli").__path__, "diffusionlm.cli."):
        module = importlib.import_module(info.name)
        if hasattr(module, "parse"):
            monkeypatch.setattr(module, "parse", parse)


PLACEHOLDERS = re.compile(r"^(mine\.py:\w+|lower\.toml|VERB)$")  # files that a reader writes, verbs that stand for any


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda path: path.stem)
def test_commands_parse(page, monkeypatch, capsys):
    parse_only(monkeypatch)
    for command in commands(page):
        words = words_of(command)
        if any(PLACEHOLDERS.match(word) for word in words) or words == ["--version"]:
            continue
        with contextlib.suppress(Parsed):
            code = cli.main(words)
            shown = capsys.readouterr()
            refused = "did you mean" in command or "optim.peak_rl" in command  # shown as a mistake
            assert code == 0 or refused, f"{page.name}: {command}: {shown.err}"


def test_a_wrong_command_would_be_noticed(monkeypatch):
    parse_only(monkeypatch)
    assert cli.main(["sample", "x", "--lenght", "3"]) == 2
    assert cli.main(["evaluate", "x", next(iter(tasks.TASKS)), "--dat", "y"]) == 2
    with pytest.raises(Parsed):
        cli.main(["sample", "x", "--length", "3"])


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda path: path.stem)
@pytest.mark.slow
def test_python_runs(page, tmp_path):
    """All blocks of a page run in order, as one program in an empty directory beside docs/results."""
    package = tmp_path / "package"
    if diffs := blocks(page, "diff"):
        apply(diffs, package)
    here = tmp_path / "here"
    (here / "docs").mkdir(parents=True)
    (here / "docs" / "results").symlink_to(ROOT / "docs" / "results")
    (here / "program.py").write_text("\n\n".join(blocks(page, "python")))
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=here,
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def apply(diffs: list[str], package: Path) -> None:
    """Copy the library and apply the changes to the copy."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "diffusionlm", package / "diffusionlm", ignore=ignored)
    shutil.copytree(ROOT / "experiments", package / "diffusionlm" / "experiments", ignore=ignored)
    for diff in diffs:
        subprocess.run(
            ["git", "apply", "--verbose", "-"],
            cwd=package,
            input=diff,
            text=True,
            check=True,
            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(package.parent)},
        )


def test_changes_of_extending_apply(tmp_path):
    diffs = blocks(ROOT / "docs" / "extending.md", "diff")
    apply(diffs, tmp_path / "package")
    for diff in diffs:
        changed = re.findall(r"^\+\+\+ b/(.*)$", diff, re.MULTILINE)
        assert changed and all("+" in line for line in diff.split("\n") if line.startswith("+"))
        for file in changed:
            assert (tmp_path / "package" / file).read_text() != (ROOT / file).read_text()


def test_messages_of_troubleshooting_exist():
    """Each heading that quotes a message quotes one of the library, apart from what the ellipses stand for."""
    texts = [
        node.value
        for file in (ROOT / "diffusionlm").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    headings = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 30
    for heading in headings:
        for part in (part.strip(" ;,:()'.") for part in heading.split("…")):
            assert len(part) < 6 or any(part in text for text in texts), f"no message has {part!r} ({heading})"
