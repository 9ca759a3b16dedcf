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


def test_a_built_dataclass_can_carry_its_registered_name():
    @dataclass(frozen=True)
    class Pie:
        name: str = "unnamed"

    pies = Registry("pie", named=True)
    pies.register("apple")(Pie)
    assert pies.get("apple") == Pie("apple")
