"""Judge a program by its tests, which run beside it in a sandbox of their own and talk to it by values alone.

The solution's process never holds the tests: it is handed the arguments of one call after another, and returns values.
The verdict is the exit code of the tests' process. So a solution gains nothing by reading its own files or memory, by
changing builtins, by an early exit, or by an object that claims to equal everything. What remains: it sees the
arguments of the calls and their order, so it may recognise tests that it has learnt by heart; and a fault of the kernel
or of the sandbox. Without a sandbox, a solution can do whatever its user can, also to the process of the tests.

The tests see values. So a solution fails that is right only by changing its arguments in place, by the identity of an
object, or by an object of its own class that compares equal to a value; docs/tasks.md lists all such kinds. No problem
of HumanEval asks for any of them.
"""

import ast
import dis
import re
import symtable
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from diffusionlm.evaluation.sandbox.run import Sandbox
from diffusionlm.evaluation.session import Record

_DIALOGUE = Path(__file__).with_name("sandbox") / "dialogue.py"


class Trial(NamedTuple):
    """Hold the tests of a solution, as texts of Python.

    Attributes:
      preamble: what the tests need besides the solution.
      names: what they take from the solution.
      tests: the tests; they fail by an exception.
    """

    preamble: str
    names: tuple[str, ...]
    tests: str


def function_trial(prompt: str, entry_point: str, test: str) -> Trial:
    """Return the tests of a problem of HumanEval: `check` of its one function.

    What the prompt has before the function, its imports and helpers, the tests use too, and not from the solution.
    """
    head = re.search(rf"^def\s+{entry_point}\b", prompt, re.MULTILINE)
    return Trial(prompt[: head.start()] if head else "", (entry_point,), f"{test}\ncheck({entry_point})\n")


def assertion_trial(code: str, setup: str, assertions: Sequence[str]) -> Trial:
    """Return the tests of a problem of MBPP: what they use of the right solution's names is taken from the solution.

    So a solution cannot replace a builtin that the tests compare by. Modules that the right solution imports, the tests
    import themselves, by the same statements, such as a `try` with an import in it.

    Args:
      code: the right solution.
      setup: what is to run before the assertions.
      assertions: the tests.

    Raises:
      SyntaxError: any of the texts is no program.
    """
    tests = "\n".join([setup, *assertions, ""])
    with warnings.catch_warnings(action="ignore"):  # of escapes in texts, such as "\d"
        body, used = ast.parse(code).body, {n.id for n in ast.walk(ast.parse(tests)) if isinstance(n, ast.Name)}
        symbols = symtable.symtable(code, "solution.py", "exec").get_symbols()
        module = compile(code, "solution.py", "exec", dont_inherit=True)
    assigned = {symbol.get_name() for symbol in symbols if symbol.is_assigned()}  # also by `def` and `class`
    # Since Python 3.12 the variables of comprehensions are among them, though the module does not keep these.
    defined = assigned & {step.argval for step in dis.get_instructions(module) if step.opname == "STORE_NAME"}
    imports = [ast.unparse(statement) for statement in body if _imported(statement) & (used | {"*"})]
    return Trial("\n".join(imports), tuple(sorted(defined & used)), tests)


def _imported(statement: ast.stmt) -> set[str]:
    """Return the names that a statement imports where it stands; "*" for all of a module."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return set()
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
    return set().union(
        *(_imported(part) for part in ast.walk(statement) if isinstance(part, ast.Import | ast.ImportFrom))
    )


def judge(place: Sandbox, trial: Trial, solution: str) -> Record:
    """Run the tests of a solution: {"pass_at_1", "ending": see `Outcome`, "error": the last line about a failure}."""
    dialogue = _DIALOGUE.read_text(encoding="utf-8")
    outcome = place.converse(f"{dialogue}\nanswer({solution!r})\n", f"{dialogue}\nask{tuple(trial)!r}\n")
    passed = outcome.ending == "exit" and outcome.code == 0
    error = "" if passed else outcome.output.strip().rpartition("\n")[2][:200]
    return {"pass_at_1": passed, "ending": outcome.ending, "error": error}


def is_late(record: Record) -> bool:
    """Return True if a judgement was ended by the clock, before the program had used its time: it is to be repeated."""
    return record["ending"] == "late"


def is_out_of_time(record: Record) -> bool:
    """Return True if a program did not end in time, by the clock or by what it used of a processor."""
    return record["ending"] in ("late", "time")
