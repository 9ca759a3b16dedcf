"""How to cite: the file that programs read, the page and the list of papers say the same."""

import re
from pathlib import Path

import pytest
import yaml

from diffusionlm.version import __version__

ROOT = Path(__file__).parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/citing.md").read_text(encoding="utf-8")
PAPERS = " ".join((ROOT / "docs/concepts.md").read_text(encoding="utf-8").partition("## Papers")[2].split())


def entries():
    """Return the fields of each entry of the page, by its name."""
    found = re.findall(r"^@\w+\{(\w+),\n(.*?)^\}", PAGE, flags=re.MULTILINE | re.DOTALL)
    return {name: dict(re.findall(r"^  (\w+) += \{(.*)\},$", body, flags=re.MULTILINE)) for name, body in found}


def test_the_software_has_one_title_and_its_version():
    software = entries()["diffusionlm"]
    assert software["title"].replace("{", "").replace("}", "") == CITATION["title"]
    assert software["version"] == __version__ and software["license"] == CITATION["license"]
    assert software["author"] == "{" + CITATION["authors"][0]["name"] + "}"


def test_the_page_cites_the_papers_of_the_file():
    assert len(entries()) == 1 + len(CITATION["references"])


@pytest.mark.parametrize("paper", CITATION["references"], ids=lambda paper: paper["url"].rpartition("/")[2])
def test_a_paper_is_the_same_everywhere(paper):
    number = paper["url"].removeprefix("https://arxiv.org/abs/")
    (entry,) = [entry for entry in entries().values() if entry["title"] == paper["title"]]
    assert entry["journal"] == f"arXiv:{number}" and entry["year"] == str(paper["year"]) == f"20{number[:2]}"
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert entry["author"] == authors
    assert f"*{paper['title']}*, {number}" in PAPERS or f"*{paper['title']}*, arXiv {number}" in PAPERS
