"""Scaling laws: sweeps, fits and reports. The functions and types below are public as `dlm.scaling`.

Each is loaded at its first use, so that a worker of a sweep loads no fits.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers and editors
    from diffusionlm.scaling.fits import ScalingWarning as ScalingWarning
    from diffusionlm.scaling.fits import fit_isoflops as fit_isoflops
    from diffusionlm.scaling.fits import fit_parametric as fit_parametric
    from diffusionlm.scaling.fits import fit_points as fit_points
    from diffusionlm.scaling.fits import fit_surface as fit_surface
    from diffusionlm.scaling.fits import published_laws as published_laws
    from diffusionlm.scaling.fits import read_points as read_points
    from diffusionlm.scaling.laws.analysis import Analysis as Analysis
    from diffusionlm.scaling.laws.bootstrap import Estimate as Estimate
    from diffusionlm.scaling.laws.objective import ObjectiveFit as ObjectiveFit
    from diffusionlm.scaling.laws.parametric import Parametric as Parametric
    from diffusionlm.scaling.laws.published import PublishedLaw as PublishedLaw
    from diffusionlm.scaling.laws.surface_fit import SurfaceFit as SurfaceFit
    from diffusionlm.scaling.sweep.points import Points as Points

_NAMES = {  # public name -> the module that has it
    "read_points": "fits",
    "fit_points": "fits",
    "fit_isoflops": "fits",
    "fit_surface": "fits",
    "fit_parametric": "fits",
    "published_laws": "fits",
    "Analysis": "laws.analysis",
    "Estimate": "laws.bootstrap",
    "ObjectiveFit": "laws.objective",
    "Parametric": "laws.parametric",
    "Points": "sweep.points",
    "PublishedLaw": "laws.published",
    "ScalingWarning": "fits",
    "SurfaceFit": "laws.surface_fit",
}

__all__ = list(_NAMES)  # pyright: ignore[reportUnsupportedDunderAll] listed once, above


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'diffusionlm.scaling' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"diffusionlm.scaling.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_NAMES)
