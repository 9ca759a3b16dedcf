"""Names to builders: suggestions, duplicates, and packages that are imported at the first look-up only."""

import sys
from dataclasses import dataclass

import pytest

from diffusionlm.errors import UserError, suggest
from diffusionlm.registry import Registry


@pytest.fixture
def fruit():
    registry = Registry("fruit")
    registry.register("apple")(lambda: "red")
    registry.register("banana")(lambda: "yellow")
    return registry


def test_get_builds_what_was_registered(fruit):
    assert fruit.get("banana") == "yellow"
    assert fruit.names() == ["apple", "banana"]


@pytest.fixture
def vegetables():
    """A registry in which dried_NAME is derived from NAME."""
    registry = Registry("vegetable", derived={"_dried": lambda colour: f"pale {colour}"})
    registry.register("pea")(lambda: "green")
    registry.register("bean_dried")(lambda: "brown")
    registry.register("bean")(lambda: "white")
    return registry


def test_a_suffix_derives_from_what_is_registered(vegetables):
    assert vegetables.get("pea_dried") == "pale green"
    assert vegetables.get("bean_dried") == "brown"  # what is registered goes first
    assert vegetables.names() == ["bean", "bean_dried", "pea"]
    known = ("pea", "pea_dried", "bean_dried", "kale_dried", "_dried", "pea_dried_dried")
    assert [vegetables.knows(name) for name in known] == [True, True, True, False, False, False]


@pytest.mark.parametrize("name", ["kale_dried", "_dried", "pea_dried_dried"])
def test_nothing_is_derived_from_an_unknown_name(name, vegetables):
    with pytest.raises(UserError, match=f"unknown vegetable {name!r}"):
        vegetables.get(name)


def test_register_returns_the_builder():
    @Registry("fruit").register("apple")
    def apple():
        return "red"

    assert apple() == "red"


@pytest.mark.parametrize("typo", ["aple", "appel", "apples"])
def test_a_typo_gets_a_suggestion(fruit, typo):
    with pytest.raises(UserError, match=f"unknown fruit {typo!r}; did you mean 'apple'"):
        fruit.get(typo)


def test_a_name_like_none_gets_the_list(fruit):
    with pytest.raises(UserError, match="unknown fruit 'zzz'; known: apple, banana$"):
        fruit.get("zzz")


def test_suggest_takes_any_iterable():
    assert suggest("lineer", (name for name in ("cosine", "linear"))) == "; did you mean 'linear'?"


def test_a_duplicate_is_refused(fruit):
    with pytest.raises(UserError, match="fruit 'apple' is registered twice"):
        fruit.register("apple")(lambda: "green")
    assert fruit.get("apple") == "red"


def test_a_package_is_imported_at_the_first_look_up(tmp_path, monkeypatch):
    package = tmp_path / "orchard"
    (package / "tools").mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from diffusionlm.registry import Registry\nfruit = Registry('fruit', 'orchard')\n"
    )
    (package / "trees.py").write_text(
        "from orchard import fruit\n\n@fruit.register('pear')\ndef pear():\n    return 'green'\n"
    )
    (package / "tools" / "__init__.py").write_text("raise RuntimeError('packages below are not imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import orchard

    try:
        assert "orchard.trees" not in sys.modules
        assert orchard.fruit.get("pear") == "green"
        assert "orchard.trees" in sys.modules
    finally:
        for module in [name for name in sys.modules if name.split(".")[0] == "orchard"]:
            del sys.modules[module]


def test_a_users_file_is_run_once_and_registers_its_names(tmp_path, monkeypatch):
    file = tmp_path / "garden.py"
    file.write_text("import test_registry\n\n@test_registry.SHARED.register('plum')\ndef plum():\n    return 'blue'\n")
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    assert SHARED.get(f"{file}:plum") == "blue"
    assert SHARED.get(f"{file}:plum") == "blue"  # run again, it would register the name twice
    SHARED.register("pear")(lambda: "green")
    for other in ("plun", "pear"):  # a typo, and a name of another file
        with pytest.raises(UserError, match=f"garden.py registers no fruit '{other}'"):
            SHARED.get(f"{file}:{other}")
    with pytest.raises(UserError, match="no file 'nowhere.py'; give FILE.py:NAME"):
        SHARED.get("nowhere.py:plum")


def test_what_a_users_file_registers_can_be_derived_from(tmp_path, monkeypatch, vegetables):
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    monkeypatch.setattr(sys.modules[__name__], "SHARED", vegetables)
    file = tmp_path / "patch.py"
    file.write_text("import test_registry\n\ntest_registry.SHARED.register('leek')(lambda: 'white')\n")
    assert vegetables.get(f"{file}:leek_dried") == "pale white"
    with pytest.raises(UserError, match="patch.py registers no vegetable 'pea_dried'"):
        vegetables.get(f"{file}:pea_dried")


def test_a_second_file_that_registers_a_taken_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    text = "import test_registry\n\n@test_registry.SHARED.register({!r})\ndef fruit():\n    return {!r}\n"
    first, second = tmp_path / "first.py", tmp_path / "second.py"
    first.write_text(text.format("kiwi", "green"))
    second.write_text(text.format("guava", "pink") + text.format("kiwi", "golden"))
    assert SHARED.get(f"{first}:kiwi") == "green"
    with pytest.raises(UserError, match=r"second.py: fruit 'kiwi' is registered twice; give one of them another name$"):
        SHARED.get(f"{second}:kiwi")
    assert SHARED.get("kiwi") == SHARED.get(f"{first}:kiwi") == "green"
    with pytest.raises(UserError, match="unknown fruit 'guava'"):  # nothing of the file is kept
        SHARED.get("guava")
    second.write_text(text.format("guava", "pink"))
    assert SHARED.get(f"{second}:guava") == "pink"


def test_a_file_that_fails_can_be_mended_and_run_again(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "test_registry", sys.modules[__name__])
    file, text = (
        tmp_path / "orchard_of_mine.py",
        (
            "from __future__ import annotations\nimport dataclasses, test_registry\n\n"
            "@dataclasses.dataclass\nclass Fig:\n    colour: str = 'purple'\n\n"
            "@test_registry.SHARED.register('fig')\ndef fig():\n    return Fig().colour\n"
        ),
    )
    file.write_text(text + "1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        SHARED.get(f"{file}:fig")
    file.write_text(text)
    assert SHARED.get(f"{file}:fig") == "purple"


SHARED = Registry("fruit")


@pytest.fixture
def user_files(tmp_path, monkeypatch):
    """A function that writes a user's file; what it makes Python import is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(Registry, "_folders", set())
    monkeypatch.setattr(Registry, "_all", [])
    before = set(sys.modules)

    def write(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


REGISTER = (
    "from diffusionlm.registry import Registry\nfruit = next(r for r in Registry._all if r.kind == 'fruit_of_users')\n"
)


def test_a_users_file_may_import_its_neighbour(user_files):
    fruit = Registry("fruit_of_users")
    user_files("colours.py", "RED = 'red'")
    user_files("shapes.py", "ROUND = 'round'")
    later = "@fruit.register('plum')\ndef plum():\n    from shapes import ROUND\n    return colours.RED, ROUND\n"
    file = user_files("mine.py", "import colours\n" + REGISTER + later)
    assert fruit.get(f"{file}:plum") == ("red", "round")


def test_a_neighbour_that_is_named_like_a_library_does_not_take_its_place(user_files):
    fruit = Registry("fruit_of_users")
    user_files("fractions.py", "raise RuntimeError('the neighbour')")
    sys.modules.pop("fractions", None)
    user_files("mine.py", "import fractions\n" + REGISTER + "fruit.register('plum')(lambda: fractions.Fraction(1, 2))")
    assert fruit.get(f"{user_files('none.py', '').parent / 'mine.py'}:plum") == 0.5


def test_a_neighbour_of_another_file_is_not_taken_for_its_own(user_files):
    fruit = Registry("fruit_of_users")
    for folder in ("a", "b"):
        user_files(f"{folder}/colours.py", f"COLOUR = {folder!r}")
        file = user_files(
            f"{folder}/{folder}.py",
            "import colours\n" + REGISTER + f"fruit.register({folder!r})(lambda: colours.COLOUR)",
        )
        if folder == "a":
            assert fruit.get(f"{file}:a") == "a"
    with pytest.raises(
        UserError, match=r"b\.py: its neighbour colours.py is not the one that is loaded, .*a/colours.py"
    ):
        fruit.get(f"{file}:b")


@pytest.mark.parametrize("broken", ["mine.py", "colours.py"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = 1\ndef f(:\n    pass\n", r":2: invalid syntax: def f\(:"),
        ("if True:\npass\n", r":2: expected an indented block after 'if' statement on line 1: pass"),
        ("a = '\x1b[31m\n", r":1: unterminated string literal .*: a = '\\x1b\[31m"),
    ],
)
def test_a_syntax_error_is_one_line_with_its_place(broken, text, reason, user_files):
    fruit = Registry("fruit_of_users")
    user_files("colours.py", "RED = 'red'")
    file = user_files(
        "mine.py", good := "import colours\n" + REGISTER + "fruit.register('plum')(lambda: colours.RED)\n"
    )
    user_files(broken, text)
    with pytest.raises(UserError, match=broken + reason) as error:
        fruit.get(f"{file}:plum")
    assert "\n" not in str(error.value)
    user_files("mine.py", good)
    user_files("colours.py", "RED = 'mended'")
    assert fruit.get(f"{file}:plum") == "mended"


def test_a_built_dataclass_can_carry_its_registered_name():
    @dataclass(frozen=True)
    class Pie:
        name: str = "unnamed"

    pies = Registry("pie", named=True)
    pies.register("apple")(Pie)
    assert pies.get("apple") == Pie("apple")
