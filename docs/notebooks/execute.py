"""Bring the notebooks of this directory up to date: their links, their first cell and their outputs.

    python docs/notebooks/execute.py                        # links and first cells only, in a second
    python docs/notebooks/execute.py --run 5_samplers       # also run these notebooks, and keep what they show

The badge and the address for `git clone` come from `url` in setup.cfg. While there is none, the badge opens Colab,
where the notebook and a zip file of the repository are uploaded. Runs write into a temporary directory.
"""

import argparse
import base64
import configparser
import io
import re
import tempfile
import time
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
WIDTH, COLOURS = 640, 48  # of the pictures that are kept
WIDGET = "application/vnd.jupyter.widget-view+json"
LONGEST_HTML = 20_000  # characters; longer outputs, which are animations, are kept as text


def repository() -> str:
    """Return the address of the repository, or an empty text."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    return settings["metadata"].get("url", "").rstrip("/")


def badge(name: str) -> str:
    """Return the badge of a notebook."""
    address = repository()
    if "github.com/" in address:
        place = address.partition("github.com/")[2].removesuffix(".git")
        target = f"https://colab.research.google.com/github/{place}/blob/main/docs/notebooks/{name}.ipynb"
        return f"[![Open in Colab]({BADGE})]({target})"
    return (
        f"[![Open in Colab]({BADGE})](https://colab.research.google.com/) In Colab, upload this file with *File > "
        "Upload notebook*, and a zip file of the repository in the panel of files on the left; in a checkout, "
        "`git archive --format=zip --output diffusionlm.zip HEAD` makes it."
    )


def refresh(notebook: nbformat.NotebookNode, name: str) -> None:
    """Write the badge, which is the second paragraph, and the first cell."""
    paragraphs = notebook.cells[0].source.split("\n\n")
    paragraphs[1] = badge(name)
    notebook.cells[0].source = "\n\n".join(paragraphs)
    source = (HERE / "setup_cell.py").read_text(encoding="utf-8").rstrip("\n")
    notebook.cells[1].source = source.replace('REPOSITORY = ""', f'REPOSITORY = "{repository()}"')


def run(notebook: nbformat.NotebookNode, directory: str | Path, timeout: int = 3600) -> float:
    """Run all cells in a directory; return the seconds."""
    from nbclient import NotebookClient

    began = time.monotonic()
    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(directory)}}).execute()
    return time.monotonic() - began


def shrink(notebook: nbformat.NotebookNode) -> None:
    """Make pictures small, name no directory of this machine, and leave out what a page without a kernel cannot use."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        outputs = cell.get("outputs", [])
        outputs[:] = [output for output in outputs if WIDGET not in output.get("data", {})]
        for output in outputs:
            data = output.get("data", {})
            if "image/png" in data:
                data["image/png"] = small(data["image/png"])
            if len(data.get("text/html", "")) > LONGEST_HTML:
                data["text/html"] = re.sub(r"<iframe.*?</iframe>", "", data["text/html"], flags=re.DOTALL)
            for kind in data.keys() & {"text/html", "text/plain"}:
                data[kind] = data[kind].replace(str(ROOT), "diffusionlm")
            if "text" in output:
                output.text = output.text.replace(str(ROOT), "diffusionlm")
    notebook.metadata.pop("widgets", None)


def small(picture: str) -> str:
    """Return a picture with at most `WIDTH` pixels a row and few colours."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.thumbnail((WIDTH, WIDTH))
    file = io.BytesIO()
    image.quantize(COLOURS).save(file, format="png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", default=[], metavar="NAME", help="notebooks to run")
    names = parser.parse_args().run
    for path in sorted(HERE.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        refresh(notebook, path.stem)
        if path.stem in names:
            with tempfile.TemporaryDirectory() as directory:
                print(f"{path.stem}: {run(notebook, directory):.0f} s")
            shrink(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
