"""Masked diffusion language models in JAX.

The work of every verb of the command line is a function here, for notebooks: `import diffusionlm as dlm`. Each name is
loaded at its first use, so importing this package starts no backend and loads neither JAX nor libraries for files.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusionlm.checkout import find_experiments
from diffusionlm.version import __version__

if TYPE_CHECKING:  # the same names for type checkers and editors
    from diffusionlm import flops as flops
    from diffusionlm import presets as presets
    from diffusionlm import scaling as scaling
    from diffusionlm.compile_check.compile import compile as compile
    from diffusionlm.config import Config as Config
    from diffusionlm.config import DataConfig as DataConfig
    from diffusionlm.config import DiffusionConfig as DiffusionConfig
    from diffusionlm.config import MeshConfig as MeshConfig
    from diffusionlm.config import ModelConfig as ModelConfig
    from diffusionlm.config import OptimConfig as OptimConfig
    from diffusionlm.config import RunConfig as RunConfig
    from diffusionlm.config import SafetyConfig as SafetyConfig
    from diffusionlm.data.chat_templates import Message as Message
    from diffusionlm.data.inspect import inspect as inspect
    from diffusionlm.data.pipeline import open_dataset as open_dataset
    from diffusionlm.errors import UserError as UserError
    from diffusionlm.evaluation.tasks import evaluate as evaluate
    from diffusionlm.evaluation.training import train as train
    from diffusionlm.interop.exporting import export_weights as export_weights
    from diffusionlm.interop.importing import import_weights as import_weights
    from diffusionlm.likelihood.config import LikelihoodConfig as LikelihoodConfig
    from diffusionlm.parallel import processes as runtime  # noqa: F401
    from diffusionlm.pretrained.completion import Completion as Completion
    from diffusionlm.pretrained.conversation import Conversation as Conversation
    from diffusionlm.pretrained.loading import load as load
    from diffusionlm.pretrained.model import LoadedModel as LoadedModel
    from diffusionlm.registry import experiment as experiment
    from diffusionlm.registry import experiment_names as experiment_names
    from diffusionlm.registry import register as register
    from diffusionlm.sampling.config import SamplingConfig as SamplingConfig
    from diffusionlm.scaling import commands as sweep  # noqa: F401
    from diffusionlm.scaling.commands import register_sweep as register_sweep
    from diffusionlm.scaling.sweep.recipe import ScalingRecipe as ScalingRecipe
    from diffusionlm.scaling.sweep.recipe import Sweep as Sweep
    from diffusionlm.scaling.sweep.recipe import grid as grid
    from diffusionlm.sharing.card import model_card as model_card
    from diffusionlm.sharing.push import push_to_hub as push_to_hub
    from diffusionlm.training.loop import DivergenceError as DivergenceError
    from diffusionlm.training.loop import Run as Run
    from diffusionlm.training.prepare import prepare as prepare

_NAMES = {  # public name -> the module that has it
    "train": "evaluation.training",
    "Run": "training.loop",
    "DivergenceError": "training.loop",
    "experiment": "registry",
    "experiment_names": "registry",
    "register": "registry",
    "register_sweep": "scaling.commands",
    "Sweep": "scaling.sweep.recipe",
    "ScalingRecipe": "scaling.sweep.recipe",
    "grid": "scaling.sweep.recipe",
    "compile": "compile_check.compile",
    "load": "pretrained.loading",
    "LoadedModel": "pretrained.model",
    "Completion": "pretrained.completion",
    "Conversation": "pretrained.conversation",
    "Message": "data.chat_templates",
    "import_weights": "interop.importing",
    "export_weights": "interop.exporting",
    "model_card": "sharing.card",
    "push_to_hub": "sharing.push",
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
    "SafetyConfig": "config",
    "UserError": "errors",
}
_MODULES = {  # public as modules
    "flops": "flops",
    "presets": "presets",
    "runtime": "parallel.processes",
    "scaling": "scaling",
    "sweep": "scaling.commands",
}

__all__ = ["__version__", *_NAMES, *_MODULES]  # pyright: ignore[reportUnsupportedDunderAll] listed once, above

find_experiments(Path(__file__).resolve().parent)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"diffusionlm.{_MODULES[name]}")
    if name not in _NAMES:
        raise AttributeError(f"module 'diffusionlm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"diffusionlm.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
