"""The names, files and links in documents exist."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from diffusionlm import config
from diffusionlm.cli.main import VERBS
from diffusionlm.options import fields

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tpu_scripts/README.md")), *ROOT.glob("docs/*.md")]
)
SETTINGS = set(fields(config.Config)) | {field.name for field in dataclasses.fields(config.Config)}


def exists(name: str) -> bool:
    """Return True if a dotted name is a field of a run, a name of the package, or of one of its modules."""
    if name in SETTINGS:
        return True
    names = name.split(".")
    for parts in range(len(names), -1, -1):
        try:
            value = importlib.import_module(".".join(["diffusionlm", *names[:parts]]))
        except ModuleNotFoundError:
            continue
        for attribute in names[parts:]:
            if not hasattr(value, attribute):
                return False
            value = getattr(value, attribute)
        return True
    return False


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_links_and_files(document):
    text = document.read_text()
    spans = re.findall(r"`([^`\n]+)`", text)
    dotted = {
        s.removeprefix("dlm.").removeprefix("diffusionlm.").partition("=")[0].partition("(")[0]
        for s in spans
        if re.match(r"[a-z_]+\.\w+", s)
    }
    dotted = {name for name in dotted if re.fullmatch(r"[a-z_]+(\.\w+)+", name)}
    kinds = "py json jsonl txt md toml cfg sh conf html png csv tsv parquet arrow tar jinja".split()
    files = {name for name in dotted if name.rpartition(".")[2] in kinds}
    for name in sorted(dotted - files):
        first = name.split(".")[0]
        if first not in ("jax", "optax", "tokenizer", "setup"):
            assert exists(name), f"{document.name} names {name}, which does not exist"
    for name in (name for name in files if name.endswith((".sh", ".conf"))):
        assert (ROOT / "tpu_scripts" / name).exists(), f"{document.name} names the script {name}"
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (document.parent / link).exists(), f"{document.name} links to {link}"
    for file in re.findall(r"`((?:diffusionlm|experiments|tests|docs)/[\w/.]*)`", text):
        assert (ROOT / file).exists(), f"{document.name} names the file {file}"


def test_the_commands_of_the_readme_are_verbs():
    lines = (ROOT / "README.md").read_text().splitlines()
    command = r"^    (?:.*&& )?diffusionlm ((?:(?:data|sweep) )?[a-z]+)"
    commands = [verb for line in lines for verb in re.findall(command, line)]
    assert len(commands) > 5 and set(commands) <= set(VERBS)
