"""The documentation builds without a warning and without a network, and its links lead somewhere."""

import html.parser
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import diffusionlm as dlm

pytest.importorskip("sphinx", reason="needs the extra docs")
pytest.importorskip("myst_nb", reason="needs the extra docs")
pytest.importorskip("sphinx_book_theme", reason="needs the extra docs")

DOCS = Path(__file__).parent.parent / "docs"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built pages. The builder runs without a network: name look-ups go to an address that answers nothing."""
    output = tmp_path_factory.mktemp("site")
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", output / "doctrees", DOCS, output / "html"],
        capture_output=True,
        text=True,
        env=os.environ | nowhere,
    )
    assert done.returncode == 0, done.stderr[-5000:]  # a page outside all toctrees is a warning, too
    return output / "html"


class Page(html.parser.HTMLParser):
    """The places of a page that links can lead to, and its links."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect ids and targets."""
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            if name in ("href", "src") and value and tag in ("a", "img", "script", "link"):
                self.links.append(value)


def broken(site: Path) -> list[str]:
    """Return the links within the site that lead nowhere."""
    site = site.resolve()
    own = [path for path in site.rglob("*.html") if "results" not in path.relative_to(site).parts[:-1]]
    own += [path for path in site.glob("results/*.html")]
    pages = {path: Page(path) for path in own if "_static" not in path.parts}
    found = []
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            there = target.is_file()
            if there and url.fragment and target in pages:
                there = unquote(url.fragment) in pages[target].ids
            if not there:
                found.append(f"{path.relative_to(site)}: {link}")
    return found


def test_links_lead_somewhere(site):
    assert not broken(site)


def test_a_broken_link_would_be_noticed(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html">b</a><a href="#x">x</a><a href="#y">y</a><p id="y">')
    assert broken(tmp_path) == ["a.html: b.html", "a.html: #x"]


def test_every_public_name_is_in_the_reference(site):
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", os.path.join)
    described = {name for kind, names in inventory.items() if kind.startswith("py:") for name in names}
    modules = {name: f"diffusionlm.{target}" for name, target in dlm._MODULES.items()}
    wanted = {modules.get(name, f"diffusionlm.{name}") for name in dlm.__all__}
    assert not wanted - described


def test_reports_are_pages_of_the_site(site):
    for report in DOCS.glob("results/*/report.html"):
        assert (site / report.relative_to(DOCS)).read_bytes() == report.read_bytes()


def test_every_page_is_in_the_contents(site):
    contents = Page(site / "index.html").links
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).with_suffix(".html").as_posix()
        if "_build" not in page.parts and name != "index.html" and not name.startswith("api/"):
            assert name in {link.partition("#")[0] for link in contents}, f"{name} is not in the contents"


def test_the_reference_shows_no_addresses_of_objects(site):
    for page in site.glob("api/*.html"):
        assert " at 0x" not in page.read_text(), f"{page.name} shows a function by its address"
