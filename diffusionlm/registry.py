"""Registries map names to builders, and suggest a name for a mistyped one."""

import dataclasses
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar, cast

from diffusionlm.config import Config
from diffusionlm.errors import UserError, suggest
from diffusionlm.options import SETTINGS, parse
from diffusionlm.storage import disk_path
from diffusionlm.twin import SUFFIX, autoregressive_twin
from diffusionlm.untrusted import printable

T = TypeVar("T")


@dataclass(frozen=True)
class PublishedData:
    """The data that an experiment was published with; a user may give any other."""

    mixture: str  # of datasets by name, as `data.mixture` has it; NAME=1 for a single one
    commands: tuple[str, ...]  # which prepare each of them from the published files as data/NAME
    start: str = ""  # the imported model that the run starts from

    @property
    def options(self) -> str:
        """The options that train on these datasets."""
        name, _, weight = self.mixture.partition("=")
        start = f" --run.init_from {self.start}" if self.start else ""
        data = f"--data.path data/{name}" if weight == "1" else f"--data.mixture {self.mixture} --data.path data"
        return data + start


class Registry(Generic[T]):
    """A mapping from names to zero-argument builders.

    A name FILE.py:NAME is looked up after that file has been run, once for all registries.

    Args:
      kind: what is registered, for messages: "experiment".
      package: a package whose modules are imported at the first look-up, so that registering is one decorator in one
        new file; empty: none.
      named: what is built is a dataclass, and its field `name` becomes the name it was registered under.
      derived: suffix -> a function of what is built. A name that ends in the suffix, and is not registered itself, is
        that function of what is registered without it.
    """

    _all: ClassVar[list["Registry"]] = []
    _folders: ClassVar[set[Path]] = set()  # of users' files

    def __init__(
        self,
        kind: str,
        package: str = "",
        *,
        named: bool = False,
        derived: Mapping[str, Callable[[T], T]] | None = None,
    ):
        self.kind, self._package, self._named, self._derived = kind, package, named, derived or {}
        self._builders: dict[str, Callable[[], T]] = {}
        self._data: dict[str, PublishedData] = {}
        self._files: dict[Path, set[str]] = {}  # the users' files that were run, with the names that each registered
        Registry._all.append(self)

    def register(self, name: str, data: PublishedData | None = None) -> Callable[[Callable[[], T]], Callable[[], T]]:
        """Return a decorator that registers a builder, and raises `UserError` if the name is taken.

        Args:
          name: the name.
          data: those that it was published with, if it names none itself.
        """

        def decorate(builder: Callable[[], T]) -> Callable[[], T]:
            if name in self._builders:
                raise UserError(f"{self.kind} {name!r} is registered twice; give one of them another name")
            self._builders[name] = builder
            if data:
                self._data[name] = data
            return builder

        return decorate

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        self._load()
        return sorted(self._builders)

    def builder(self, name: str) -> Callable[[], T]:
        """Return the builder of that name, NAME or FILE.py:NAME.

        Raises:
          UserError: no builder or no file has that name; the message suggests one.
        """
        self._load()
        file, colon, own_name = name.rpartition(":")
        if colon and file.endswith(".py"):
            registered = self._run(disk_path(file))
            builder = self._find(own_name, registered)
            if builder is None:
                raise UserError(f"{file} registers no {self.kind} {own_name!r}{suggest(own_name, registered)}")
            return builder
        if name.endswith(".py"):
            raise UserError(f"{name!r} is a file; name the {self.kind} that it registers too: {name}:NAME")
        builder = self._find(name, self._builders)
        if builder is None:
            raise UserError(f"unknown {self.kind} {name!r}{suggest(name, self._builders)}")
        return builder

    def published_data(self, name: str) -> PublishedData | None:
        """Return the data that were registered with a name, or with the one that it is derived from; or None."""
        self._load()
        stems = [name, *(name.removesuffix(suffix) for suffix in self._derived)]
        return next((self._data[stem] for stem in stems if stem in self._data), None)

    def knows(self, name: str) -> bool:
        """Return True if a name without a file is registered, or derived from one that is."""
        self._load()
        return self._find(name, self._builders) is not None

    def _find(self, name: str, among: Collection[str]) -> Callable[[], T] | None:
        """Return the builder of one of these names, or of one that is derived from it; None if there is none."""
        if name in among:
            return self._builders[name]
        for suffix, derive in self._derived.items():
            if (stem := name.removesuffix(suffix)) in among and stem != name:
                return _derived(self._builders[stem], derive)
        return None

    def get(self, name: str) -> T:
        """Build what is registered under that name.

        Raises:
          UserError: the name is unknown, or the builder does not return a dataclass where one is needed.
        """
        built = self.builder(name)()
        if not self._named:
            return built
        if not dataclasses.is_dataclass(built) or isinstance(built, type):
            returned = "nothing: is its `return` missing?" if built is None else f"a {type(built).__name__}"
            needed = f"it must return the {self.kind}, a Config or Sweep"
            raise UserError(f"{needed}, and the function registered as {self.kind} {name!r} returns {returned}")
        return cast(T, dataclasses.replace(built, name=name.rpartition(":")[2]))

    def _run(self, file: Path) -> set[str]:
        """Run a user's file, unless it was run before; return the names that it registered here."""
        if not file.is_file():
            raise UserError(f"no file {str(file)!r}; give FILE.py:NAME, where FILE.py registers the {self.kind} NAME")
        path = file.resolve()
        if path in self._files:
            return self._files[path]
        loaded = _neighbours(path.parent)
        before = {registry: dict(registry._builders) for registry in Registry._all}
        module_name = f"diffusionlm_user_{path.stem}"
        try:
            _execute(path, module_name)
        except BaseException as error:  # once the file is mended, it can be run again
            for name in _neighbours(path.parent) - loaded:
                sys.modules.pop(name, None)
            for registry, builders in before.items():
                registry._builders = builders
            if isinstance(error, UserError):
                raise UserError(f"{file}: {error}") from error
            if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
                raise UserError(f"{_place(error)}: {error.msg}: {printable((error.text or '').strip())}") from error
            raise
        for registry, builders in before.items():
            registry._files[path] = set(registry._builders) - set(builders)
        return self._files[path]

    def _load(self) -> None:
        if self._package:
            package, self._package = importlib.import_module(self._package), ""
            for module in pkgutil.iter_modules(package.__path__):
                if not module.ispkg:
                    importlib.import_module(f"{package.__name__}.{module.name}")


def _derived(builder: Callable[[], T], derive: Callable[[T], T]) -> Callable[[], T]:
    """Return a builder of what `derive` makes of what another one builds, with the description of `derive`."""

    def build() -> T:
        return derive(builder())

    build.__doc__ = derive.__doc__
    return build


def _execute(path: Path, module_name: str) -> None:
    """Run a file as a module of that name; dataclasses in it look their module up.

    It may import its neighbours, as a script may, then and later. What is installed goes before them: a neighbour that
    is named like a package does not take its place in the libraries that import it.
    """
    folders = Registry._folders
    for neighbour in path.parent.glob("*.py"):
        loaded = Path(getattr(sys.modules.get(neighbour.stem), "__file__", None) or "none")
        if loaded.parent in folders and loaded.parent != path.parent:
            raise UserError(
                f"its neighbour {neighbour.name} is not the one that is loaded, {loaded}; rename one of them"
            )
    folders.add(path.parent)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()  # a neighbour may be younger than the last look
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None, path  # given for every .py file
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _neighbours(folder: Path) -> set[str]:
    """Return the names of the modules that were loaded from a folder."""
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    return {name for name, file in files.items() if file and Path(file).parent == folder}


def _place(error: SyntaxError) -> str:
    return f"{printable(error.filename)}:{error.lineno}"


experiments: Registry[Config] = Registry(
    "experiment", package="diffusionlm.experiments", named=True, derived={SUFFIX: autoregressive_twin}
)
"""Registered experiments: functions without arguments that return a `Config`; NAME_arm is the twin of each NAME."""

sweeps: Registry[Any] = Registry("sweep", package="diffusionlm.experiments", named=True)
"""Registered sweeps: functions without arguments that return a `scaling.sweep.recipe.Sweep`, in the same files."""


def experiment(name: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """Return the registered experiment of that name, with some fields replaced.

    Args:
      name: a name that `diffusionlm experiments` lists, or FILE.py:NAME for one that a file of your own registers;
        with _arm at its end, the autoregressive twin of that experiment.
      overrides: dotted field -> value, read as the command line reads it: `{"run.steps": 100, "optim.peak_lr": 1e-3}`.

    Raises:
      UserError: an unknown experiment or field, or a value of another type.
    """
    cfg = experiments.get(name)
    if not overrides:
        return cfg

    def resolve(config: Annotated[Config, *SETTINGS] = cfg) -> Config:
        return config

    args = [f"--{field}={value}" for field, value in overrides.items()]
    return parse(resolve, args, f"diffusionlm train {name}")()


def register(name: str) -> Callable[[Callable[[], Config]], Callable[[], Config]]:
    """Return a decorator that registers a function without arguments, which returns a `Config`, as an experiment."""
    return experiments.register(name)


def experiment_names() -> list[str]:
    """Return the names that `experiment` knows, sorted."""
    return experiments.names()
