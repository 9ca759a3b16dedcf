"""Two programs that exchange values: a solution that is called, and the tests that call it; only the library's modules.

Each runs in a sandbox of its own, with this text before a call of `answer` or `ask`; what one writes to its standard
output the other reads as its input, a line of JSON for each request and reply. Values are written out by their kinds
(`encode`). An object of another kind stays with the solution, and the tests get a `Remote` that stands for it.

Nothing that the solution can reach holds more of the tests than the arguments of the calls so far, and the tests read
nothing from it but numbers, texts and collections of them, made anew by `decode`.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import json
import os
import sys
import types

MOST_BYTES = 16 << 20  # of a request or reply
COLLECTIONS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
NUMBERS = {"Decimal": decimal.Decimal, "Fraction": fractions.Fraction}
DAYS = {"datetime": datetime.datetime, "date": datetime.date}  # a datetime is a date
VIEWS = {"dict_keys": type({}.keys()), "dict_values": type({}.values()), "dict_items": type({}.items())}
# They end a loop or a generator without a word where a solution raises them inside of the tests' own.
ENDS = (StopIteration, StopAsyncIteration)
PERFORM = {
    "name": lambda names, name: names[name],
    "call": lambda function, args, kwargs: function(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": lambda value, key: value[key],
    "items": list,
    "len": len,
}


def encode(value, refer):
    """Return a value in types of JSON; `refer` gives the number of an object of another kind."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["int", hex(value)]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", value.real.hex(), value.imag.hex()]
    if isinstance(value, (bytes, bytearray)):
        return ["bytearray" if isinstance(value, bytearray) else "bytes", value.hex()]
    if isinstance(value, dict):
        pairs = [[encode(key, refer), encode(item, refer)] for key, item in value.items()]
        if isinstance(value, collections.defaultdict):
            return ["defaultdict", encode(value.default_factory, refer), pairs]
        kinds = [name for name in ("Counter", "OrderedDict") if isinstance(value, getattr(collections, name))]
        return [*kinds, "dict"][:1] + [pairs]
    if isinstance(value, tuple) and len(fields := getattr(value, "_fields", ())) == len(value) > 0:
        return ["namedtuple", type(value).__name__, list(fields), [encode(item, refer) for item in value]]
    if isinstance(value, collections.deque):
        return ["deque", value.maxlen, [encode(item, refer) for item in value]]
    for name, kind in VIEWS.items():
        if isinstance(value, kind):
            return [name, [encode(item, refer) for item in value]]
    for name, kind in COLLECTIONS.items():
        if isinstance(value, kind):
            return [name, [encode(item, refer) for item in value]]
    for name, kind in NUMBERS.items():
        if isinstance(value, kind):
            return [name, str(value)]
    for name, kind in DAYS.items():
        if isinstance(value, kind) and getattr(value, "tzinfo", None) is None:
            return [name, kind.isoformat(value)]
    if isinstance(value, datetime.timedelta):
        return ["timedelta", value.days, value.seconds, value.microseconds]
    if isinstance(value, range):
        return ["range", *(encode(part, refer) for part in (value.start, value.stop, value.step))]
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return ["type", value.__name__]
    return ["object", refer(value)]


def decode(code, resolve):
    """Return the value of what `encode` wrote; `resolve` gives the object of a number."""
    if code is None or isinstance(code, (bool, str)):
        return code
    kind, *parts = code
    if kind == "int":
        return int(parts[0], 16)
    if kind == "float":
        return float.fromhex(parts[0])
    if kind == "complex":
        return complex(*map(float.fromhex, parts))
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(parts[0])
    if kind in ("dict", "Counter", "OrderedDict", "defaultdict"):
        pairs = {decode(key, resolve): decode(item, resolve) for key, item in parts[-1]}
        if kind == "defaultdict":
            return collections.defaultdict(decode(parts[0], resolve), pairs)
        return pairs if kind == "dict" else getattr(collections, kind)(pairs)
    if kind in ("namedtuple", "deque", *VIEWS):
        return decode_others(kind, parts[:-1], [decode(item, resolve) for item in parts[-1]])
    if kind in COLLECTIONS:
        return COLLECTIONS[kind](decode(item, resolve) for item in parts[0])
    if kind in NUMBERS:
        return NUMBERS[kind](parts[0])
    if kind in DAYS:
        return DAYS[kind].fromisoformat(parts[0])
    if kind == "timedelta":
        return datetime.timedelta(*parts)
    if kind == "range":
        return range(*(decode(part, resolve) for part in parts))
    if kind == "type" and isinstance(found := getattr(builtins, parts[0]), type):
        return found
    if kind == "object":
        return resolve(parts[0])
    raise ValueError(f"a value of the unknown kind {kind!r}")


def decode_others(kind, parts, items):
    """Return a collection that is neither one of the builtins nor a dictionary, with these items."""
    if kind == "namedtuple":  # which takes no names but such as a field may have, none with an underscore first
        return collections.namedtuple(parts[0], parts[1])(*items)
    if kind == "deque":
        return collections.deque(items, parts[0])
    if kind == "dict_keys":
        return dict.fromkeys(items).keys()
    return dict(items).items() if kind == "dict_items" else dict(enumerate(items)).values()


def take_channel():
    """Return the two ends of the dialogue, and put nothing and the error stream in their place."""
    reads, writes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return reads, writes


def send(file, message):
    """Write a message as a line."""
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()


def answer(solution):
    """Be the solution: run its text, and then perform what the tests ask for until they end."""
    reads, writes = take_channel()
    module = sys.modules["solution"] = types.ModuleType("solution")
    kept = [module.__dict__]  # the objects that the tests may name, by their numbers

    def refer(value):
        kept.append(value)
        return len(kept) - 1

    def reply(compute):
        try:
            message = [True, encode(compute(), refer)]
        except BaseException as error:  # also what ends programs
            message = [False, type(error).__name__, str(error)[:1000]]
        send(writes, message)

    reply(lambda: exec(compile(solution, "solution.py", "exec"), module.__dict__))
    for line in reads:
        reply(lambda line=line: perform(*json.loads(line), resolve=kept.__getitem__))
    os._exit(0)


def perform(action, *values, resolve):
    """Do what the tests ask for, and return its value."""
    return PERFORM[action](*(decode(value, resolve) for value in values))


class Solution:
    """The tests' end of the dialogue."""

    def __init__(self):
        self.reads, self.writes = take_channel()
        self.receive()  # what became of the solution's text

    def ask(self, action, *values):
        """Return what the solution answers; raise what it raised, by name, where Python has an exception of it."""
        send(self.writes, [action, *(encode(value, number_of) for value in values)])
        return self.receive()

    def receive(self):
        """Return the value of the next reply."""
        line = self.reads.readline(MOST_BYTES)
        if not line.endswith(b"\n"):
            raise EOFError("the solution answers with too much" if line else "the solution has ended")
        fine, *parts = json.loads(line)
        if fine is True:
            return decode(parts[0], lambda number: Remote(self, number))
        name, text = map(str, parts)
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, (UnicodeError, *ENDS)):
            raise kind(text)
        raise RuntimeError(f"{name}: {text}")


class Remote:
    """An object of the solution. Equality and truth are those of this stand-in, which the solution cannot define."""

    def __init__(self, solution, number):
        self.__dict__.update(_solution=solution, _number=number)

    def __call__(self, *args, **kwargs):
        """Call the object."""
        return self._solution.ask("call", self, args, kwargs)

    def __getattr__(self, name):
        return self._solution.ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._solution.ask("setattr", self, name, value)

    def __getitem__(self, key):
        return self._solution.ask("getitem", self, key)

    def __iter__(self):
        return iter(self._solution.ask("items", self))

    def __len__(self):
        return self._solution.ask("len", self)

    def __bool__(self):
        return True


def number_of(value):
    """Return the number of an object of the solution that the tests hand back."""
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"the tests hand {type(value).__name__} to the solution, which is no value")


def ask(preamble, names, tests):
    """Be the tests: run what comes before them, take names from the solution, and run them; an exception is failure."""
    solution = Solution()
    module = sys.modules["tests"] = types.ModuleType("tests")
    exec(compile(preamble, "preamble.py", "exec"), module.__dict__)
    namespace = Remote(solution, 0)
    for name in names:
        try:
            module.__dict__[name] = solution.ask("name", namespace, name)
        except KeyError:
            raise NameError(f"name {name!r} is not defined") from None
    exec(compile(tests, "tests.py", "exec"), module.__dict__)
