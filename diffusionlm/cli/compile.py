"""The verb `compile`, over `diffusionlm.compile_check`."""

import os
from typing import Annotated

from diffusionlm import hardware, shortening
from diffusionlm.cli.experiments import experiment_first
from diffusionlm.cli.output import print_json
from diffusionlm.config import Config
from diffusionlm.errors import UserError
from diffusionlm.options import SETTINGS, parse
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.training import parts
from diffusionlm.training.parts import Part


def compile_check(args: list[str], prog: str) -> int:
    """Compile a run for a TPU slice, without a TPU: compile EXPERIMENT --topology v5p-128 [--slices N] [--json]."""
    usage = f"{prog} EXPERIMENT --topology v5p-128 [--slices N] [--sampling] [--json] [--FIELD.SUBFIELD VALUE ...]"
    cfg, words = experiment_first(args, prog, usage)
    if cfg is None:
        return 0

    def run(
        topology: str,
        experiment: Annotated[Config, *SETTINGS] = cfg,
        config: str | None = None,
        slices: int = 1,
        sampling: bool = False,
        count: int = 8,
        settings: Annotated[SamplingConfig, *SETTINGS] = SamplingConfig(),  # noqa: B008
        part: Part | None = None,
        json: bool = False,
    ) -> int:
        """Compile a training step of this experiment, or its sampler, for a TPU slice, on a machine without a TPU.

        The compiler is libtpu, for Linux on x86, which the extra tpu installs.

        Args:
          topology: a slice as Google Cloud names it: v4-N, v5p-N or tpu7x-N (N TensorCores, two a chip), v5e-N or v6e-N
            (N chips).
          experiment: the experiment.
          config: a .json or .toml file with fields of the experiment, as of `train`.
          slices: how many such slices; mesh.data must be a multiple.
          sampling: compile the sampler instead of the training step.
          count: with sampling, texts at a time.
          settings: the sampler's settings.
          part: the program of this part of the run alone; by default each program has a report.
          json: print the report as JSON.
        """
        return _compile(experiment, topology, slices, settings if sampling else None, count, part, json)

    return parse(run, words, f"{prog} {cfg.name}")()


def _compile(
    cfg: Config,
    topology: str,
    slices: int,
    sampling: SamplingConfig | None,
    count: int,
    part: Part | None,
    json: bool,
) -> int:
    if sampling and part:
        raise UserError(f"part={part} is a part of training, and --sampling compiles the sampler; drop one of them")
    known: list[Part] = [*parts.parts(shortening.validate(cfg))]
    if part is not None and part not in known:
        raise UserError(f"part={part!r} must be one of those of {cfg.name}: {', '.join(known)}")
    programs: list[Part | None] = [None] if sampling else [part] if part else [*known]
    if json and len(programs) > 1:
        raise UserError(
            f"{cfg.name} has a program for each of its parts, and --json prints one report; choose with --part "
            + " or ".join(map(str, programs))
        )
    hardware.parse(topology, slices)
    hardware.require_libtpu()  # before JAX is imported, which takes seconds
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX looks for a TPU
    from diffusionlm.compile_check import compile as aot
    from diffusionlm.compile_check import table

    fits = True
    for program in programs:
        report = aot.compile(cfg, topology, slices=slices, sampling=sampling, count=count, part=program)
        fits &= report.fits
        if json:
            print_json(table.to_json(report))
        else:
            table.show(report)
    return 0 if fits else 1
