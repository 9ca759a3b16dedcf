"""A checkout that is on the path without being installed: its experiments are in a directory beside the package.

An installed package has them inside, as `setup.cfg` says.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

NAME = "diffusionlm.experiments"


class ExperimentsFinder:
    """Finds the package `diffusionlm.experiments` in a directory; Python asks it after all others."""

    def __init__(self, directory: Path):
        self.directory = directory

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Return how to import the package; None for any other name."""
        if name != NAME:
            return None
        file, places = self.directory / "__init__.py", [str(self.directory)]
        return importlib.util.spec_from_file_location(name, file, submodule_search_locations=places)


def find_experiments(package: Path) -> None:
    """Let Python find the experiments of a checkout; nothing changes for an installed package, which has its own.

    Args:
      package: the directory of `diffusionlm`.
    """
    directory = package.parent / "experiments"
    in_checkout = (package.parent / "setup.cfg").is_file() and (directory / "__init__.py").is_file()
    if in_checkout and not (package / "experiments").exists():
        sys.meta_path.append(ExperimentsFinder(directory))
