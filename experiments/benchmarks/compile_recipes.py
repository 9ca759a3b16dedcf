"""Run the compile check of every shipped recipe on three pods, and record the reports.

A recipe that does not fit as shipped is compiled again with the advice of the report, until it fits. Each cell has a
JSON file and is not compiled again while the file exists; the table in docs/pods.md is written from these files.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX looks for a TPU

import tyro

from diffusionlm.compile_check.compile import compile as compile_run
from diffusionlm.compile_check.table import to_json, verdict
from diffusionlm.errors import UserError
from diffusionlm.hardware import GIB
from diffusionlm.registry import experiment
from diffusionlm.sampling.config import SamplingConfig

RECIPES = ("smdm_170m", "smdm_1028m", "llada_1b", "llada_8b", "llada_8b_sft")
TOPOLOGIES = ("v5e-256", "v5p-128", "v6e-256")
CELLS = [(recipe, topology, "train") for recipe in RECIPES for topology in TOPOLOGIES]
CELLS.append(("llada_8b", "v5e-8", "sample"))
SAMPLING = SamplingConfig(length=1000, block_length=32)  # and 8 texts at a time
# Further settings to compile: as shipped, this recipe leaves hardly any room.
ADDITIONAL = {("llada_8b", "v5e-256", "train"): {"run.microbatches": 5}}
TENSOR = {"mesh.fsdp": -1, "mesh.tensor": 2}  # for a batch that the devices cannot split

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- results of compile_recipes.py -->", "<!-- end of the results -->"


def main(
    only: str = "",
    force: bool = False,
    output: Path = ROOT / "docs/results/compile",
    page: Path = ROOT / "docs/pods.md",
) -> int:
    """Compile the cells that have no file yet, and write the table.

    Args:
      only: compile only cells whose name, such as llada_8b_v5e-256, contains this.
      force: also compile cells that have a file.
      output: the directory of the files.
      page: the document that has the table.
    """
    output.mkdir(parents=True, exist_ok=True)
    for recipe, topology, program in CELLS:
        path = output / f"{recipe}_{topology}{'_sample' if program == 'sample' else ''}.json"
        if only in path.stem and (force or not path.exists()):
            attempts = attempts_at(recipe, topology, program)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps({"cell": path.stem, "attempts": attempts}, indent=2) + "\n")
            partial.replace(path)
    write_table(output, page)
    return 0


def attempts_at(recipe: str, topology: str, program: str) -> list[dict]:
    """Return the reports of a cell: as shipped and, if that does not fit or cannot be split, with other settings."""
    additional = ADDITIONAL.get((recipe, topology, program))
    pending: list[dict] = [{}, *([additional] if additional else [])]
    attempts = []
    for settings in pending:  # grows while it is iterated
        try:
            cfg = experiment(recipe, settings)
            report = compile_run(cfg, topology, sampling=SAMPLING if program == "sample" else None)
        except UserError as error:
            attempts.append({"settings": settings, "error": str(error)})
            if not settings:
                pending.append(TENSOR)
            continue
        print(verdict(report), flush=True)
        # The time of compiling differs from machine to machine.
        attempts.append({"settings": settings, "report": to_json(replace(report, compile_seconds=0.0))})
        if len(attempts) > 3:
            break
        if report.fits:
            continue
        fixes = [fix for fix in report.fixes if not fix.change.startswith("--topology")]
        # A program that nearly fills the memory can take the compiler very long.
        roomy = [fix for fix in fixes if fix.bytes < report.hbm_per_chip_bytes.limit / 2]
        pending += [settings | parse_change(fix.change) for fix in (roomy or fixes)[:1]]
    return attempts


def parse_change(change: str) -> dict[str, str]:
    """Return the settings of a change: "--run.microbatches 5" is {"run.microbatches": "5"}."""
    words = change.split()
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


def write_table(output: Path, page: Path) -> None:
    """Write the table of the cells that have files into the page."""
    rows = [
        "| recipe | slice | settings | HBM per chip, GiB | step, s | compute | memory | ICI | MFU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for recipe, topology, program in CELLS:
        path = output / f"{recipe}_{topology}{'_sample' if program == 'sample' else ''}.json"
        if path.exists():
            cell = json.loads(path.read_text())
            rows += [row(recipe, topology, program, attempt) for attempt in cell["attempts"]]
    text = page.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    page.write_text("\n".join([before, "", *rows, "", after]))


def row(recipe: str, topology: str, program: str, attempt: dict) -> str:
    """Return the row of one attempt at a cell."""
    settings = " ".join(f"`--{name} {value}`" for name, value in attempt["settings"].items()) or "as shipped"
    start = f"| {recipe}{' (sampling)' if program == 'sample' else ''} | {topology} | {settings} |"
    if "error" in attempt:
        return f"{start} the batch cannot be split over the chips |  |  |  |  |  |"
    report = attempt["report"]
    hbm = report["hbm_per_chip_bytes"]
    need = f"{hbm['peak'] / GIB:.2f} of {hbm['limit'] / GIB:.2f}"
    if not report["fits"]:
        return f"{start} **{need}: does not fit** |  |  |  |  |  |"
    terms, step = report["roofline_seconds"], report["estimated_step_seconds"]
    shares = " | ".join(f"{terms[name] / step:.0%}" for name in ("compute", "memory", "ici"))
    return f"{start} {need} | {step:.3g} | {shares} | {report['estimated_mfu']:.1%} |"


if __name__ == "__main__":
    sys.exit(tyro.cli(main, use_underscores=True))
