"""The memory of the devices that parameters lie on: what cannot fit beside them is refused in one line."""

import contextlib
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from diffusionlm import memory
from diffusionlm.errors import UserError
from diffusionlm.parallel.mesh import bytes_per_device
from diffusionlm.tree_types import Params


def require_room(what: str, params: Params, parts: Mapping[str, int], fix: str) -> dict[str, int]:
    """Refuse parameters, and work with them, that cannot fit into the memory of their devices.

    Args:
      what: the work, such as "generating 8 rows".
      params: the parameters, or their shapes with dtypes and shardings.
      parts: bytes of the work's arrays by name, on all devices together: a lower bound.
      fix: the advice at the end of the message.

    Returns:
      The bytes that are needed on each device, by part.

    Raises:
      UserError: they do not fit; the message has the estimate.
    """
    if isinstance(first := jax.tree.leaves(params)[0], np.ndarray):
        return {}  # they lie on no device yet
    shares = {name: size // len(first.sharding.device_set) for name, size in parts.items() if size}
    needs = {"parameters": bytes_per_device(params), **shares}
    memory.require_room(what, needs, [*first.sharding.addressable_devices], fix)
    return needs


@contextlib.contextmanager
def room_for(what: str, params: Params, parts: Mapping[str, int], fix: str) -> Iterator[None]:
    """Refuse work that cannot fit (`require_room`), and then say in one line if it does not fit after all."""
    with refusals(what, require_room(what, params, parts, fix), fix):
        yield


@contextlib.contextmanager
def refusals(what: str, needs: Mapping[str, int], fix: str) -> Iterator[None]:
    """Turn an allocation that a device refuses into a `UserError` with the estimate.

    Args:
      what: the work.
      needs: the bytes that it needs on each device, by part; at least.
      fix: the advice at the end of the message.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or jax.process_count() > 1:
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"there is not enough memory for {what}, which needs at least {memory.gib(math.fsum(needs.values()))} on "
            f"each device ({reason}); {fix}"
        ) from error
