"""Mutation testing of the core: which small changes of the mathematics go undetected?

    python tests/mutation.py                             # 40 mutants of each module of the core, about 10 s each
    python tests/mutation.py --sample 0 diffusionlm/diffusion/schedules.py     # every mutant of one module

Each mutant is made by Cosmic Ray in a copy of this tree, and the tests that are named for its module below run on it
until one fails. Results are appended to a file of JSON lines; mutants that it has are not run again.
"""

import argparse
import collections
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_item import MutationSpec

ROOT = Path(__file__).parents[1]
TESTS = {  # module of the core: the tests that must notice a change of it, those that fail soonest first
    "diffusion/schedules.py": "diffusion/test_schedules.py",
    "diffusion/corruption.py": "diffusion/test_corruption.py",
    "diffusion/objectives.py": "diffusion/test_objectives.py",
    "diffusion/cross_entropy.py": "diffusion/test_cross_entropy.py",
    "likelihood/estimators.py": "likelihood/test_estimators.py",
    "sampling/strategies.py": "sampling/test_strategies.py",
    "sampling/kv_cache.py": "sampling/test_kv_cache.py",
    "scaling/laws/power_laws.py": "scaling/laws",
    "scaling/laws/optima.py": "scaling/laws",
}


def mutants(module: str, sample: int) -> list[MutationSpec]:
    """Return `sample` mutants of a module, the same ones at each call; 0 returns all of them."""
    every = [item.mutations[0] for item in _all_work_items([module], {})]
    return random.Random(module).sample(every, sample) if 0 < sample < len(every) else every


def identity(mutation: MutationSpec) -> str:
    """Return a name of a mutant that is the same in every session."""
    return f"{mutation.module_path} {mutation.operator_name} {mutation.occurrence}"


def run(module: str, sample: int, output: Path) -> None:
    """Run the mutants of a module that are not in `output` yet; the working directory is the copy of the tree."""
    known = {json.loads(line)["mutant"] for line in output.read_text().splitlines()} if output.exists() else set()
    tests = " ".join(f"tests/{path}" for path in TESTS[module.removeprefix("diffusionlm/")].split())
    command = f"{sys.executable} -m pytest -x -q -n 0 -p no:cacheprovider {tests}"
    if subprocess.run(command.split(), capture_output=True).returncode:
        raise SystemExit(f"the tests of {module} fail without any mutation: {command}")
    for mutation in mutants(module, sample):
        if identity(mutation) in known:
            continue
        result = mutate_and_test([mutation], command, timeout=600)
        line = {"mutant": identity(mutation), "outcome": str(result.test_outcome), "diff": result.diff}
        with output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(line["outcome"], line["mutant"], flush=True)


def summarise(output: Path) -> None:
    """Print the share of killed mutants by module, and the survivors."""
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    counts = collections.defaultdict(collections.Counter)
    for line in lines:
        counts[line["mutant"].split()[0]]["survived" if "SURVIVED" in line["outcome"].upper() else "killed"] += 1
    for line in lines:
        if "SURVIVED" in line["outcome"].upper():
            print(line["mutant"], line["diff"], sep="\n")
    for module, count in sorted(counts.items()):
        print(f"{module}: {count['killed']} of {count.total()} killed")


def main() -> None:
    """Read the options, copy the tree and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=[f"diffusionlm/{name}" for name in TESTS])
    parser.add_argument("--sample", type=int, default=40, help="mutants of each module; 0: all")
    parser.add_argument("--output", type=Path, default=Path("mutation.jsonl"))
    options = parser.parse_args()
    output = options.output.absolute()
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "results", ".pytest_cache"))
        os.chdir(copy)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
        for module in options.modules:
            run(module, options.sample, output)
    summarise(output)


if __name__ == "__main__":
    main()
