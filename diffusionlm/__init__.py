"""Masked diffusion language models in JAX.

What the command line does is here for notebooks, under short names: `import diffusionlm as dlm`. Each is loaded at its
first use, so importing this package starts no backend and loads neither JAX nor what reads and writes files.
"""

import importlib
from typing import Any

from diffusionlm.version import __version__

_NAMES = {  # public name -> the module that has it
    "train": "training.loop",
    "Run": "training.loop",
    "experiment": "registry",
    "experiment_names": "registry",
    "register": "registry",
    "register_sweep": "scaling.commands",
    "Sweep": "scaling.sweep.recipe",
    "ScalingRecipe": "scaling.sweep.recipe",
    "grid": "scaling.sweep.recipe",
    "compile": "compile_check.compile",
    "load": "pretrained.model",
    "import_weights": "interop.importing",
    "export_weights": "interop.exporting",
    "evaluate": "evaluation.tasks",
    "SamplingConfig": "sampling.config",
    "LikelihoodConfig": "likelihood.config",
    "prepare": "training.prepare",
    "inspect": "data.inspect",
    "open_dataset": "data.pipeline",
    "Config": "config",
    "ModelConfig": "config",
    "DiffusionConfig": "config",
    "OptimConfig": "config",
    "DataConfig": "config",
    "MeshConfig": "config",
    "RunConfig": "config",
    "UserError": "errors",
}
_MODULES = {  # public as modules
    "flops": "flops",
    "presets": "presets",
    "runtime": "parallel.processes",
    "sweep": "scaling.commands",
}

__all__ = ["__version__", *_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"diffusionlm.{_MODULES[name]}")
    if name not in _NAMES:
        raise AttributeError(f"module 'diffusionlm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"diffusionlm.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
