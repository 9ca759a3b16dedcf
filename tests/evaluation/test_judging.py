"""A solution passes by what it returns and by nothing else: attempts to deceive the tests, and honest solutions."""

import collections
import dataclasses
import datetime
import decimal
import fractions
import io
import json
from pathlib import Path

import pytest
from support.slow_cases import thinned

from diffusionlm.evaluation import code, judging, records
from diffusionlm.evaluation import sandbox as sandboxes
from diffusionlm.evaluation.judging import Trial, assertion_trial, function_trial, judge
from diffusionlm.evaluation.sandbox import dialogue
from diffusionlm.evaluation.sandbox.backends import Limits

PROMPT = "def add(a, b):\n"
TEST = "def check(f):\n    assert f(1, 2) == 3\n    assert f(2, 2) == 4\n    assert f(9, 1) != 11\n"
ADD = function_trial(PROMPT, "add", TEST)


@pytest.fixture(scope="module")
def place():
    return dataclasses.replace(sandboxes.find(allow_code_execution=True), limits=Limits(seconds=60, clock=300))


# Solutions that are wrong, and try to pass. The first and the third did before the tests had a process of their own.
DECEPTIONS = {
    "a word of its own file": """\
import os, re, sys
for path in (sys.argv[0], __file__ if "__file__" in globals() else "/work/program.py"):
    for word in re.findall("[0-9a-f]{32}", open(path).read()):
        os.write(1, f"\\n{word}\\n".encode())
os._exit(0)
""",
    "the tests in its memory": """\
import gc, re, sys
def texts():
    frame = sys._getframe()
    while frame:
        yield from map(str, [frame.f_locals, frame.f_globals, frame.f_code.co_consts])
        frame = frame.f_back
    yield from (thing for thing in map(repr, gc.get_objects()) if "assert f" in thing or "check" in thing)
def add(a, b):
    for text in texts():
        if expected := re.search(rf"{a}, {b}\\) == (\\d+)", text):
            return int(expected[1])
""",
    "an object that equals everything": """\
class Anything(int):
    __eq__ = __ne__ = __lt__ = __gt__ = lambda self, other: True
    __hash__ = int.__hash__
class Object:
    __eq__ = __ne__ = lambda self, other: True
def add(a, b):
    return Object() if a == 1 else Anything()
""",
    "builtins of its own": """\
import builtins, sys
builtins.AssertionError = builtins.check = builtins.exec = builtins.compile = lambda *args: None
builtins.isinstance = lambda *args: True
sys.excepthook = lambda *args: None
def check(f):
    pass
def add(a, b):
    return True
""",
    "an exit when it is loaded": "raise SystemExit(0)",
    "an exit of its process": "import os\nos._exit(0)",
    "an exit in a call": "def add(a, b):\n    raise SystemExit(0)",
    "an exit of its process in a call": "import os\ndef add(a, b):\n    os._exit(0)",
    "a named tuple that equals everything": """\
import collections
class Three(collections.namedtuple("Three", "__eq__ x", rename=True)):
    _fields = ("__eq__", "x")
    __eq__ = lambda self, other: True
def add(a, b):
    return Three(0, 0)
""",
    "an exit that is registered": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b):\n    return 3",
    "killing everything": """\
import os
def add(a, b):
    for process in (-1, os.getppid(), 1):
        try:
            os.kill(process, 9)
        except OSError:
            pass
    return 3
""",
    "replies of its own": """\
import os
def add(a, b):
    for end in range(32):
        try:
            os.write(end, b'[true, null]\\n[true, true]\\n[false, "SystemExit", "0"]\\n')
        except OSError:
            pass
    return 3
""",
    "too long a reply": "def add(a, b):\n    return 'x' * (1 << 25)",
    "a thread that ends it": """\
import os, threading, time
threading.Thread(target=lambda: (time.sleep(0.05), os._exit(0)), daemon=True).start()
def add(a, b):
    while True:
        pass
""",
}


@pytest.mark.parametrize("name", thinned(DECEPTIONS, every=2))
def test_a_wrong_solution_does_not_pass(name, place):
    record = judge(place, ADD, DECEPTIONS[name])
    assert not record["pass_at_1"] and record["ending"] == "exit" and record["error"], record


@pytest.mark.parametrize("name", ["StopIteration", "StopAsyncIteration", "GeneratorExit"])
@pytest.mark.parametrize("own", [False, True])
def test_a_solution_cannot_end_the_loops_of_its_tests(name, own, place):
    """Loops over a `map` end without a word at a StopIteration of its function, also at one of that name alone."""
    test = """\
def check(f):
    assert all(map(lambda x: f(x, x) == 2 * x, range(3)))
    for y in map(lambda x: f(x, x), range(3)):
        assert y == 0
"""
    start = f"class {name}(Exception):\n    pass\n" if own else ""
    record = judge(place, function_trial(PROMPT, "add", test), f"{start}def add(a, b):\n    raise {name}('no')\n")
    assert record == {"pass_at_1": False, "ending": "exit", "error": f"RuntimeError: {name}: no"}


def test_a_solution_cannot_replace_what_the_tests_compare_by(place):
    """MBPP's tests use builtins and modules, which are those of Python even if the solution defines them."""
    right = "import math\ndef area(r):\n    return {math.pi * r * r}\ndef sum(a, b):\n    return a + b\n"
    tests = ["assert math.isclose(max(area(1)), 3.14159, rel_tol=1e-4)", "assert set(area(0)) == {0.0}"]
    tests.append("assert sum(2, 3) == 5")
    trial = assertion_trial(right, "", tests)
    assert trial[:2] == ("import math", ("area", "sum"))  # also a function with the name of a builtin
    assert judge(place, trial, right)["pass_at_1"]
    cheat = """\
class math:
    isclose = lambda *args, **kwargs: True
set = max = lambda values: 0
def area(r):
    return 0,
def sum(a, b):
    return a + b
"""
    assert judge(place, trial, cheat) == {"pass_at_1": False, "ending": "exit", "error": "AssertionError"}


BINDINGS = """\
import os.path
limit: int = 5
low, (high, *others) = 1, (2, 3)
first = second = 4
try:
    from math import gcd, lcm
except ImportError:
    from fractions import gcd
if low:
    def chosen(x):
        inner = 1
        return x
else:
    chosen = None
with open(os.devnull) as file:
    text = file.read()
for index in range(3):
    count = (last := index)
squares = [element for element in range(3)]
def area(parameter):
    import json
    local = parameter
class Shape:
    member = 1
"""


def test_names_of_a_solution_are_all_that_it_binds():
    bound = "limit low high others first second chosen file text index count last squares area Shape".split()
    unbound = "inner element parameter local member json print".split()
    trial = assertion_trial(BINDINGS, "", [f"assert ({', '.join([*bound, *unbound])})"])
    assert trial.names == tuple(sorted(bound)) and trial.preamble == ""
    trial = assertion_trial(BINDINGS, "", ["assert gcd(area(4), 6) == 2 and os.path.sep"])
    assert trial.names == ("area",) and trial.preamble.startswith(
        "import os.path\ntry:\n    from math import gcd, lcm\n"
    )
    trial = assertion_trial("from math import *\nx = pi", "", ["assert isclose(x, 3.14159, rel_tol=1e-4)"])
    assert trial[:2] == ("from math import *", ("x",))


def test_helpers_of_the_prompt_are_not_the_solutions(place):
    prompt = "import math\ndef double(x):\n    return 2 * x\n\n\ndef half(x):\n    "
    trial = function_trial(prompt, "half", "def check(f):\n    assert f(double(3)) == 3 and math.sqrt(4) == 2\n")
    assert judge(place, trial, f"{prompt}return x / 2\n")["pass_at_1"]
    cheat = "def half(x):\n    return x\ndouble = half\n"  # with whose own `double` the tests would pass
    assert not judge(place, trial, cheat)["pass_at_1"]


def test_honest_solutions_pass_however_they_are_written(place):
    """Solutions may print, keep a state, recurse, and have classes, and code of their own as a main program."""
    solution = """\
from __future__ import annotations
import collections, dataclasses, sys
print("loaded"); sys.stderr.write("loaded")
@dataclasses.dataclass
class Node:
    value: int
    below: Node | None = None
def depth(node):
    print(node)
    return 0 if node is None else 1 + depth(node.below)
def same(value):
    return value
def kinds(values, kind, *, negate=False):
    return [value for value in values if isinstance(value, kind) != negate]
def counted(values):
    return collections.Counter(values)
def lazily(values):
    yield from values
def fails(kind):
    raise kind("as it should")
if __name__ == "__main__":
    raise SystemExit(input())
"""
    tests = """\
root = Node(1)
root.below = Node(2, Node(3))
assert depth(root) == 3 and root.below.value == 2 and same(root) is not None
values = [0, -(10 ** 30), 1.5, float("inf"), True, None, "\\u00e9\\n", b"\\x00", (1, [2]), {1: {2}}, range(3), 2j]
assert same(values) == values and list(map(type, same(values))) == list(map(type, values))
assert same(float("nan")) != same(float("nan"))
assert kinds([1, "a", 2.0], str) == ["a"] and kinds([1, "a"], str, negate=True) == [1]
assert counted("aab") == {"a": 2, "b": 1} and counted("aab")["c" if False else "a"] == 2
assert list(lazily([1, 2])) == [1, 2] and sorted(lazily("ba")) == ["a", "b"] and lazily([1]) != [1]
for kind in (ValueError, ZeroDivisionError):
    try:
        fails(kind)
    except kind as error:
        assert str(error) == "as it should"
    else:
        raise AssertionError
print("the tests may print")
"""
    names = ("Node", "depth", "same", "kinds", "counted", "lazily", "fails")
    assert judge(place, Trial("", names, tests), solution) == {"pass_at_1": True, "ending": "exit", "error": ""}


@pytest.mark.parametrize(
    ("solution", "error"),
    [
        ("def add(a, b):\n    return a - b\n", "AssertionError"),
        ("def add(a, b)\n", "SyntaxError: "),
        ("def plus(a, b):\n    return a + b\n", "NameError: name 'add' is not defined"),
        ("def add(a, b):\n    return a / 0\n", "ZeroDivisionError: division by zero"),
        ("def add(a, b):\n    raise SystemExit(0)\n", "RuntimeError: SystemExit: 0"),
        ("import os\nos._exit(0)\n", "EOFError: the solution has ended"),
        ("text = '\ud800'\n", "RuntimeError: UnicodeEncodeError: "),
    ],
)
def test_a_failure_says_why(solution, error, place):
    record = judge(place, ADD, solution)
    assert not record["pass_at_1"] and record["error"].startswith(error)


LOOP = "def add(a, b):\n    while True:\n        pass\n"


@pytest.mark.slow
def test_a_solution_that_uses_up_its_time_is_out_of_time_for_good(place):
    short = dataclasses.replace(place, limits=Limits(seconds=1, clock=300))
    record = judge(short, ADD, LOOP)
    assert not record["pass_at_1"] and record["ending"] == "time" and not judging.is_late(record)
    assert judging.is_out_of_time(record)
    tests = Trial("", ("add",), "while True:\n    pass\n")  # those of a long list of calls may need as long
    assert judge(short, tests, "add = 1")["ending"] == "time"


@pytest.mark.slow
def test_a_solution_that_the_clock_ends_is_late(place):
    """It may be right: a busy machine gives it little of the processor."""
    hasty = dataclasses.replace(place, limits=Limits(seconds=60, clock=2))
    for solution in (LOOP, "import time\ndef add(a, b):\n    time.sleep(100)\n"):
        record = judge(hasty, ADD, solution)
        assert record == {"pass_at_1": False, "ending": "late", "error": ""}
        assert judging.is_late(record) and judging.is_out_of_time(record)


VALUES = [
    *(None, True, 0, -7, 10**5000, 1.1, -0.0, float("inf"), 1 - 2j, "", "\ud800\n", b"\xff", bytearray(b"a")),
    *((), (1, (2,)), [], [[1], "a"], {1, 2}, frozenset({(1, 2)}), {"a": {1: None}, (1,): [2]}, range(9, 0, -2)),
    *(int, list, decimal.Decimal("1.10"), fractions.Fraction(1, 3)),
    *(datetime.date(2024, 2, 29), datetime.datetime(1, 1, 1, 23, 59, 59, 7), datetime.timedelta(-1, 2, 3)),
    *(collections.deque([1, (2,)]), collections.deque([1], 4), collections.Counter("aab")),
    *(collections.OrderedDict(b=1, a=2), collections.defaultdict(list, {1: [2]}), collections.defaultdict(None)),
    *({1: 2}.keys(), {1: [2]}.items(), {}.keys(), {}.items()),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20] if value != 10**5000 else "long")
def test_a_value_is_the_same_on_the_other_side(value):
    code = json.loads(json.dumps(dialogue.encode(value, None)))
    back = dialogue.decode(code, None)
    assert back == value and type(back) is type(value) and (value == 10**5000 or str(back) == str(value))
    if isinstance(value, float):
        assert back.hex() == value.hex()


def test_a_named_tuple_has_its_fields_on_the_other_side():
    """Its class is another one, of the same name and fields, so that it is written and compared in the same way."""
    value = collections.namedtuple("Point", "x count")(1, [2])
    back = dialogue.decode(json.loads(json.dumps(dialogue.encode(value, None))), None)
    assert back == value == (1, [2]) and (back.x, back.count) == (1, [2]) and str(back) == str(value)


def test_values_of_a_dictionary_keep_their_order():
    back = dialogue.decode(json.loads(json.dumps(dialogue.encode({"b": 1, "a": [2], 0: 1}.values(), None))), None)
    assert list(back) == [1, [2], 1] and str(back) == "dict_values([1, [2], 1])" and len(back) == 3


@pytest.mark.parametrize("name", ["__eq__", "_x", "x y", "x=print()", "def", "x, y"])
def test_a_named_tuple_can_have_no_field_but_a_name(name):
    with pytest.raises(ValueError, match="(?i)field names"):
        dialogue.decode(["namedtuple", "x", [name], [None]], None)


@pytest.mark.parametrize("code", [["type", "print"], ["type", "os"], ["module", "os"], ["int", 3], 7, {"a": 1}])
def test_no_other_value_can_be_sent(code):
    with pytest.raises((AttributeError, TypeError, ValueError)):
        dialogue.decode(code, None)


def test_a_message_that_is_too_long_ends_the_tests(monkeypatch):
    monkeypatch.setattr(dialogue, "MOST_BYTES", 8)
    ends = [(io.BytesIO(text), io.BytesIO()) for text in (b"[true, null]\n", b"")]
    monkeypatch.setattr(dialogue, "take_channel", lambda: ends.pop(0))
    for message in ("too much", "has ended"):
        with pytest.raises(EOFError, match=message):
            dialogue.Solution()


class Solved(code.Problem, frozen=True):
    """A problem of HumanEval with its solution."""

    canonical_solution: str


def problems_of(data_dir, step):
    path = Path(data_dir) / "eval" / "humaneval" / "HumanEval.jsonl.gz"
    return records.read_records(str(path), Solved, None)[::step]


def test_solutions_of_human_eval_pass(data_dir, place):
    for problem in problems_of(data_dir, 41):
        trial = code.trial_of(problem)
        assert judge(place, trial, problem.prompt + problem.canonical_solution)["pass_at_1"]
        assert not judge(place, trial, problem.prompt + "    return 'no'\n")["pass_at_1"]


@pytest.mark.slow
def test_all_solutions_of_human_eval_pass(data_dir, place):
    for problem in problems_of(data_dir, 1):
        record = judge(place, code.trial_of(problem), problem.prompt + problem.canonical_solution)
        assert record["pass_at_1"], (problem.task_id, record)


@pytest.mark.slow
def test_solutions_of_the_infilling_files_pass(data_dir, place):
    for path in sorted((Path(data_dir) / "eval" / "humaneval_infilling").iterdir()):
        for gap in records.read_records(str(path), code.Gap, None)[::50]:
            program = gap.prompt + gap.canonical_solution + gap.suffix
            assert judge(place, code.trial_of(gap), program)["pass_at_1"], gap.task_id
