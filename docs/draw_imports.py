"""Print the imports between packages as the drawing in docs/design.md: `python docs/draw_imports.py`.

Ground modules are drawn as one box. An arrow that follows from two others is left out.
"""

import configparser
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]


def floors() -> list[list[str]]:
    """Return the packages of each floor, the highest first, as the import contract in setup.cfg lists them."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    lines = settings["importlinter:contract:floors"]["layers"].split("\n")
    names = [[name.strip(" ()").removeprefix("diffusionlm.") for name in line.split("|")] for line in lines if line]
    packages = {path.name for path in (ROOT / "diffusionlm").iterdir() if path.is_dir()}
    return [kept for floor in names if (kept := [name for name in floor if name in packages])] + [["ground"]]


def arrows() -> set[tuple[str, str]]:
    """Return the pairs (importing, imported) of packages, without those that follow from others."""
    packages = {name for floor in floors() for name in floor}
    graph = grimp.build_graph("diffusionlm", cache_dir=None)

    def place(module: str) -> str:
        name = module.split(".")[1] if "." in module else "ground"
        return name if name in packages else "ground"

    modules = {module for module in graph.modules if module.split(".")[1:2] not in (["experiments"], ["__main__"])}
    pairs = {
        (place(module), place(imported))
        for module in modules - {"diffusionlm"}
        for imported in graph.find_modules_directly_imported_by(module) & modules
    }
    pairs = {(a, b) for a, b in pairs if a != b}

    def reachable(a: str) -> set[str]:
        return {b for x, b in pairs if x == a}.union(*(reachable(b) for x, b in pairs if x == a))

    return {(a, b) for a, b in pairs if not any(b in reachable(c) for x, c in pairs if x == a and c != b)}


def drawing() -> str:
    """Return the drawing in Mermaid's language."""
    lines = ["flowchart TD"]
    for number, floor in enumerate(floors()):
        lines += [f"  subgraph floor{number}[ ]", *(f"    {name}" for name in floor), "  end"]
    return "\n".join([*lines, *(f"  {a} --> {b}" for a, b in sorted(arrows()))])


if __name__ == "__main__":
    print(drawing())
