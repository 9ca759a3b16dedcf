"""Names to builders, with a suggestion for a mistyped name."""

import dataclasses
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

from diffusionlm.config import Config
from diffusionlm.errors import UserError, suggest
from diffusionlm.options import SETTINGS, parse

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from names to zero-argument builders.

    `package`, where given, is a package whose modules are imported at the first look-up, so that registering is one
    decorator in one new file. A name FILE.py:NAME is looked up after that file has been run. With `named`, what is
    built is a dataclass whose `name` becomes the one it was registered under.
    """

    _all: ClassVar[list["Registry"]] = []

    def __init__(self, kind: str, package: str = "", *, named: bool = False):
        self.kind, self._package, self._named = kind, package, named
        self._builders = dict[str, Callable[[], T]]()
        self._files = dict[Path, dict[str, Callable[[], T]]]()  # files that were run, and what each registered here
        Registry._all.append(self)

    def register(self, name: str) -> Callable[[Callable[[], T]], Callable[[], T]]:
        def decorate(builder: Callable[[], T]) -> Callable[[], T]:
            if name in self._builders:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._builders[name] = builder
            return builder

        return decorate

    def names(self) -> list[str]:
        self._load()
        return sorted(self._builders)

    def builder(self, name: str) -> Callable[[], T]:
        self._load()
        file, colon, own = name.rpartition(":")
        if colon and file.endswith(".py"):
            if own not in (found := self._run(Path(file))):
                raise UserError(f"{file} registers no {self.kind} {own!r}{suggest(own, found)}")
            return found[own]
        if name.endswith(".py"):
            raise UserError(f"{name!r} is a file; name the {self.kind} that it registers too: {name}:NAME")
        if name not in self._builders:
            raise UserError(f"unknown {self.kind} {name!r}{suggest(name, self._builders)}")
        return self._builders[name]

    def get(self, name: str) -> T:
        built = self.builder(name)()
        if not self._named:
            return built
        if not dataclasses.is_dataclass(built) or isinstance(built, type):
            returned = "nothing: is its `return` missing?" if built is None else f"a {type(built).__name__}"
            wanted = f"it must return the {self.kind}, a Config or Sweep"
            raise UserError(f"{wanted}, and the function registered as {self.kind} {name!r} returns {returned}")
        return dataclasses.replace(built, name=name.rpartition(":")[2])

    def _run(self, file: Path) -> dict[str, Callable[[], T]]:
        """Runs a user's file, once for all registries; returns what it registered here."""
        if not file.is_file():
            raise UserError(f"no file {str(file)!r}; give FILE.py:NAME, where FILE.py registers the {self.kind} NAME")
        if (file := file.resolve()) not in self._files:
            before = [registry._builders for registry in Registry._all]
            for registry in Registry._all:  # two files may use one name
                others = {name for found in registry._files.values() for name in found}
                registry._builders = {k: builder for k, builder in registry._builders.items() if k not in others}
            kept = [set(registry._builders) for registry in Registry._all]
            spec = importlib.util.spec_from_file_location(f"diffusionlm_user_{file.stem}", file)
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except BaseException:  # once it is mended, it can be run again
                for registry, builders in zip(Registry._all, before, strict=True):
                    registry._builders = builders
                raise
            for registry, builders, names in zip(Registry._all, before, kept, strict=True):
                registry._files[file] = {k: one for k, one in registry._builders.items() if k not in names}
                registry._builders = builders | registry._builders
        return self._files[file]

    def _load(self) -> None:
        if self._package:
            package, self._package = importlib.import_module(self._package), ""
            for module in pkgutil.iter_modules(package.__path__):
                if not module.ispkg:
                    importlib.import_module(f"{package.__name__}.{module.name}")


experiments: Registry = Registry("experiment", package="diffusionlm.experiments", named=True)

sweeps: Registry = Registry("sweep", package="diffusionlm.experiments", named=True)
"""Registered sweeps: functions without arguments that return a `scaling.recipe.Sweep`, in the same files."""


def experiment(name: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The registered experiment of that name, with some fields replaced.

    Args:
      name: as in `diffusionlm experiments`, or FILE.py:NAME for one that a file of your own registers.
      overrides: dotted field -> value, read as the command line reads it: `{"run.steps": 100, "optim.peak_lr": 1e-3}`.

    Raises:
      UserError: an unknown experiment or field, or a value of another type.
    """
    cfg = experiments.get(name)

    def resolve(config: Annotated[Config, *SETTINGS] = cfg) -> Config:
        return config

    args = [f"--{field}={value}" for field, value in (overrides or {}).items()]
    return parse(resolve, args, f"diffusionlm train {name}")()


def register(name: str) -> Callable[[Callable[[], Config]], Callable[[], Config]]:
    """A decorator that makes a function without arguments, which returns a `Config`, an experiment of that name."""
    return experiments.register(name)


def experiment_names() -> list[str]:
    """The names that `experiment` knows, sorted."""
    return experiments.names()
