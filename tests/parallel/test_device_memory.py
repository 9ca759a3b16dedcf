"""What cannot fit beside parameters is refused in one line."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffusionlm import memory
from diffusionlm.config import MeshConfig
from diffusionlm.errors import UserError
from diffusionlm.parallel.device_memory import require_room, room_for
from diffusionlm.parallel.mesh import make_mesh


def test_work_needs_room_beside_the_parameters_of_each_device(monkeypatch):
    """Eight devices of the host share its memory: half of the parameters lies on each, and an eighth of the work."""
    mesh = make_mesh(MeshConfig(data=4, fsdp=2))
    params = {"w": jax.device_put(np.zeros((8, 16), np.float32), NamedSharding(mesh, P("fsdp")))}
    monkeypatch.setattr(memory, "host_limit", lambda: (8 * (256 + 1000), "this machine has"))
    require_room("it", params, {"cache": 8000, "trace": 0}, "use less")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    for tree in (params, shapes):
        with pytest.raises(
            UserError, match=r"it needs at least .* \(parameters [^,]*, cache [^,]*\), and .*; use less"
        ):
            require_room("it", tree, {"cache": 8008, "trace": 0}, "use less")
    require_room("it", {"w": np.zeros(10**6)}, {"cache": 10**9}, "use less")  # not on a device yet


def test_an_allocation_that_is_refused_later_is_one_line():
    """The estimate cannot foresee everything: a forward pass needs more, and others may use memory."""
    params = {"w": jax.numpy.zeros(2**18)}
    with pytest.raises(
        UserError, match=r"not enough memory for it, which needs at least 3 MiB on each .*\(RESOURCE.*; use less"
    ):
        with room_for("it", params, {"cache": 2**21}, "use less"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 40 bytes.\n")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), room_for("it", params, {}, "use less"):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")
