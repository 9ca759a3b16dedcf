"""Programs compute in 32 bits, whatever `jax_enable_x64` says."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def in_32_bits(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that runs without `jax_enable_x64`, for those that compile a program or call a compiled one.

    With that option random numbers are drawn as float64, which are others, and positions and counts become int64, which
    do not fit into the carry of a loop. The whole call is without it and not only the function that is traced: the
    counters of loops get their types after that, and a program with other counters may round differently.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return run
