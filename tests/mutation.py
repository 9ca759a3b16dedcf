"""Mutation testing of the core: which small changes of the mathematics does no test notice?

    python tests/mutation.py                             # 30 mutants of each module of the core, a few seconds each
    python tests/mutation.py --sample 0 diffusionlm/diffusion/schedules.py     # every mutant of one module

Cosmic Ray makes the mutants: one operator, comparison, number, truth value or decorator is replaced. Mutants that
cannot change a result (of annotations, docstrings, protocols, and of `/` and `*` in signatures) or that are certain
type errors (a shift of floats) are not tried. A sample takes each place once before any twice, and is the same at each
call until the module changes. Each mutant runs in a copy of the tree, and the tests that are named for its module below
run until one fails. Results are appended to a file of JSON lines; mutants that it says were killed are not run again.
docs/mutation.md keeps the last results, with the reason for each survivor.
"""

import argparse
import ast
import collections
import compileall
import contextlib
import dataclasses
import difflib
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).parents[1]
TIMEOUT = 200  # seconds; a mutant that takes longer counts as killed
TESTS = {  # module of the core: the tests that must notice a change of it, those that fail soonest first
    "diffusion/schedules.py": "diffusion/test_schedules.py",
    "diffusion/corruption.py": "diffusion/test_corruption.py diffusion/test_held_out.py",
    "diffusion/objectives.py": "diffusion/test_cart.py diffusion/test_objectives.py",
    "diffusion/cross_entropy.py": "diffusion/test_cross_entropy.py",
    "likelihood/estimators.py": "likelihood/test_estimators.py",
    "sampling/strategies.py": "sampling/test_strategies.py",
    "sampling/kv_cache.py": "sampling/test_kv_cache.py",
    "scaling/laws/power_laws.py": "scaling/laws/test_power_laws.py scaling/laws/test_gap.py",
    "scaling/laws/optima.py": "scaling/laws/test_optima.py scaling/laws/test_warnings.py",
}
# An operator is only replaced by another of its group: what is left out is a type error or changes nothing.
GROUPS = (
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"},
    {"BitAnd", "BitOr", "BitXor"},
    {"LShift", "RShift"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"},
    {"Is", "IsNot"},
    {"In", "NotIn"},
)
# Third-party modules that the tests need, loaded once: a mutant starts in a fork.
PRELOADED = "chex flax.linen jax jax.numpy optax orbax.checkpoint pytest scipy.optimize scipy.special scipy.stats"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A module with one change.

    Attributes:
      module: the path of the module from the root of the tree.
      place: the definition in which the change is, its column, and which of several like it.
      diff: the changed lines, before and after.
      code: the source of the mutated module.
    """

    module: str
    place: str
    diff: str
    code: str

    @property
    def name(self) -> str:
        """A name that stays the same while other parts of the module change."""
        return f"{self.module} {self.place} {' '.join(self.diff.split())}"


def sample_mutants(root: Path, module: str, sample: int) -> Iterator[Mutant]:
    """Yield `sample` mutants of a module, at as many different places as possible; 0 yields all."""
    source = (root / module).read_text()
    places = collections.defaultdict(list)
    for item in _all_work_items([root / module], {}):
        spec = item.mutations[0]
        if _sensible(spec.operator_name):
            places[spec.start_pos].append(spec)
    generator = random.Random(module)
    columns = [generator.sample(specs, len(specs)) for specs in places.values()]
    generator.shuffle(columns)
    in_turn = (spec for turn in itertools.zip_longest(*columns) for spec in turn if spec)
    names = collections.Counter()
    for spec in in_turn:
        if mutant := _mutate(module, source, spec):
            names[mutant.name] += 1
            count = names[mutant.name]
            yield mutant if count == 1 else dataclasses.replace(mutant, place=f"{mutant.place} ({count})")
            if names.total() == sample:
                return


def _sensible(operator: str) -> bool:
    """Return False for mutation operators whose mutants are type errors or change nothing."""
    _, *names = operator.split("_")
    if operator.startswith(("core/ReplaceBinaryOperator", "core/ReplaceComparisonOperator")):
        return any(set(names) <= group for group in GROUPS)
    return operator != "core/NoOp"


def _mutate(module: str, source: str, spec) -> Mutant | None:
    """Return a mutant, or None if it is no program or computes the same."""
    code = mutate_code(source, get_operator(spec.operator_name)(**spec.operator_args), spec.occurrence)
    try:
        if code is None or _computation(code) == _computation(source):
            return None
    except SyntaxError:
        return None
    lines = difflib.unified_diff(source.splitlines(), code.splitlines(), lineterm="", n=0)
    diff = "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))
    return Mutant(module, f"{spec.definition_name}:{spec.start_pos[1]}", diff, code)


@functools.cache
def _computation(code: str) -> str:
    """Return the syntax tree without what no result depends on."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = None
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arguments):  # how arguments may be given
            node.args = node.posonlyargs + node.args + node.kwonlyargs
            node.posonlyargs, node.kwonlyargs, node.kw_defaults = [], [], []
        if isinstance(node, ast.Call):  # of dataclasses.field
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "repr"]
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [statement for statement in body if not _is_text(statement)]
    return ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    """Return True for docstrings and protocols."""
    if isinstance(node, ast.ClassDef):
        return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def passes(tree: Path, module: str) -> tuple[bool, str]:
    """Run the tests of a module in a copy of the tree; return whether they pass, and the last lines of the output."""
    tests = [str(tree / "tests" / path) for path in TESTS[module.removeprefix("diffusionlm/")].split()]
    output = tree / "output.txt"
    child = os.fork()
    if not child:
        os.setsid()
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(tree)
        sys.path[:0] = [str(tree)]
        sys.dont_write_bytecode = True
        code = 1
        with contextlib.suppress(BaseException):
            arguments = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
            code = int(importlib.import_module("pytest").main(arguments))
        os._exit(code)
    end, status = time.monotonic() + TIMEOUT, None
    while status is None and time.monotonic() < end:
        pid, result = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(result) if pid else None
        time.sleep(0.05)
    if status is None:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return status == 0, "\n".join(output.read_text(errors="replace").splitlines()[-4:])


def work(tree: Path, mutants, results) -> None:
    """Run mutants off a queue in a tree of this process's own, until there is None."""
    while mutant := mutants.get():
        path = tree / mutant.module
        original = path.read_text()
        for bytecode in (path.parent / "__pycache__").glob(f"{path.stem}.*"):  # of a source that may look as old
            bytecode.unlink()
        path.write_text(mutant.code)
        start = time.monotonic()
        survived, tail = passes(tree, mutant.module)
        path.write_text(original)
        results.put((mutant, survived, tail, time.monotonic() - start))


def run(options: argparse.Namespace, output: Path, directory: Path) -> list[Mutant]:
    """Run the sampled mutants that `output` does not call killed, and return all sampled mutants."""
    trees = [directory / str(worker) for worker in range(options.workers)]
    shutil.copytree(ROOT, trees[0], ignore=shutil.ignore_patterns(".git", "runs", ".pytest_cache", "__pycache__"))
    for name in PRELOADED.split():
        importlib.import_module(name)
    compileall.compile_dir(trees[0], quiet=2)
    for module in options.modules if options.baseline else ():
        good, tail = passes(trees[0], module)
        if not good:
            raise SystemExit(f"the tests of {module} fail without any mutation:\n{tail}")
    for tree in trees[1:]:
        shutil.copytree(trees[0], tree)
    by_module = [sample_mutants(trees[0], module, options.sample) for module in options.modules]
    sampled = [mutant for turn in itertools.zip_longest(*by_module) for mutant in turn if mutant]
    killed = {name for name, line in read_results(output).items() if line["outcome"] == "killed"}
    pending = [mutant for mutant in sampled if mutant.name not in killed]
    context = multiprocessing.get_context("fork")
    queue, results = context.Queue(), context.Queue()
    for mutant in (*pending, *[None] * options.workers):
        queue.put(mutant)
    processes = [context.Process(target=work, args=(tree, queue, results)) for tree in trees]
    for process in processes:
        process.start()
    for _ in pending:
        mutant, survived, tail, seconds = results.get()
        outcome = "survived" if survived else "killed"
        line = {"mutant": mutant.name, "outcome": outcome, "diff": mutant.diff, "output": tail}
        with output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{outcome} {seconds:.0f} s {mutant.name}", flush=True)
    for process in processes:
        process.join()
    return sampled


def read_results(output: Path) -> dict[str, dict[str, str]]:
    """Return the last result of each mutant, by name."""
    lines = map(json.loads, output.read_text().splitlines()) if output.exists() else ()
    return {line["mutant"]: line for line in lines}


def summarise(sampled: list[Mutant], output: Path) -> None:
    """Print the survivors, and the number of killed mutants of each module."""
    results = read_results(output)
    counts = collections.defaultdict(collections.Counter)
    for mutant in sorted(sampled, key=lambda mutant: mutant.module):
        outcome = results[mutant.name]["outcome"]
        counts[mutant.module][outcome] += 1
        if outcome == "survived":
            print(f"\n{mutant.module} {mutant.place}\n{mutant.diff}")
    print()
    for module, count in counts.items():
        print(f"{module}: {count['killed']} of {count.total()} killed")


def main() -> None:
    """Read the options, copy the tree and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=[f"diffusionlm/{name}" for name in TESTS])
    parser.add_argument("--sample", type=int, default=30, help="mutants of each module; 0: all")
    parser.add_argument("--workers", type=int, default=2, help="mutants at the same time")
    parser.add_argument("--no-baseline", dest="baseline", action="store_false", help="trust that all tests pass")
    parser.add_argument("--output", type=Path, default=Path("mutation.jsonl"))
    options = parser.parse_args()
    # conftest.py sets these too, but after JAX is loaded here.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    output = options.output.absolute()
    with tempfile.TemporaryDirectory() as directory:
        sampled = run(options, output, Path(directory))
    summarise(sampled, output)


if __name__ == "__main__":
    main()
