"""The settings of a generation as data for the device: changing them does not recompile."""

from typing import NamedTuple

import numpy as np

from diffusionlm.parallel.mesh import Array
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.strategies import STRATEGIES, Rules

_INTEGERS = ("steps", "top_k", "refresh")
_NUMBERS = ("temperature", "top_p", "guidance", "eos_penalty")
_SWITCHES = ("growing", "eos_last", "stop_at_eos")


class Settings(NamedTuple):
    """The fields of `SamplingConfig` of the same names, unless said otherwise."""

    steps: Array  # int32: over all blocks of a row
    top_k: Array  # int32
    refresh: Array  # int32
    temperature: Array  # float32
    top_p: Array  # float32
    guidance: Array  # float32
    eos_penalty: Array  # float32
    growing: Array  # bool
    eos_last: Array  # bool
    stop_at_eos: Array  # bool
    strategy: Array  # int32: an index into `STRATEGIES`
    standard_guidance: Array  # bool
    drawn_confidence: Array  # bool
    rules: Rules

    @classmethod
    def from_config(cls, sampling: SamplingConfig) -> "Settings":
        """Return the settings of a resolved configuration."""
        assert sampling.strategy is not None  # `resolve` has filled it in
        return cls(
            *(np.asarray(getattr(sampling, name), np.int32) for name in _INTEGERS),
            *(np.asarray(getattr(sampling, name), np.float32) for name in _NUMBERS),
            *(np.asarray(getattr(sampling, name), np.bool_) for name in _SWITCHES),
            strategy=np.asarray(list(STRATEGIES).index(sampling.strategy), np.int32),
            drawn_confidence=np.asarray(sampling.confidence == "drawn"),
            standard_guidance=np.asarray(sampling.guidance_kind == "standard"),
            rules=Rules(*(np.asarray(getattr(sampling, name), np.float32) for name in Rules._fields)),
        )
