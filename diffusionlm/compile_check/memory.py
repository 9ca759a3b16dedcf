"""The HBM that a compiled program needs on each chip."""

from dataclasses import dataclass

import jax

from diffusionlm.compile_check.workloads import Workload
from diffusionlm.hardware import Topology
from diffusionlm.parallel.mesh import bytes_per_device


@dataclass(frozen=True)
class Hbm:
    """Bytes of HBM on each chip.

    Attributes:
      limit: what a program may use.
      params: the parameters.
      optimizer: the optimizer's state.
      temporary: activations, gradients and gathered weights.
      peak: everything at once, with the batch and the program itself.
    """

    limit: int
    params: int
    optimizer: int
    temporary: int
    peak: int

    @property
    def headroom(self) -> int:
        """The bytes that remain free, negative if the program does not fit."""
        return self.limit - self.peak


def hbm_per_chip(
    topology: Topology, workload: Workload, executable: jax.stages.Compiled | None, requested_bytes: int
) -> Hbm:
    """Return the memory of each chip.

    Args:
      topology: the slice.
      workload: the arguments of the program.
      executable: the compiled program; None if the compiler refused it.
      requested_bytes: the temporaries on each device that the compiler refused, which is all that it says then.
    """
    chip = topology.chip
    params, optimizer = (bytes_per_device(tree) * chip.devices for tree in (workload.params, workload.optimizer))
    if executable is None:
        temporary = requested_bytes * chip.devices
        return Hbm(chip.hbm_bytes, params, optimizer, temporary, params + optimizer + temporary)
    stats = executable.memory_analysis()
    assert stats is not None, "libtpu reports the memory of every program"
    arguments = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    peak = arguments + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
    temporary = stats.temp_size_in_bytes * chip.devices
    return Hbm(chip.hbm_bytes, params, optimizer, temporary, peak * chip.devices)
