"""A validated request: settings, canvas, and the static structure to compile for."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from diffusionlm.diffusion import schedules
from diffusionlm.errors import UserError
from diffusionlm.model.spec import ModelSpec, suppression_mask
from diffusionlm.sampling.canvas import Template, build_canvas
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.device_settings import Settings
from diffusionlm.sampling.kv_cache import plan_windows
from diffusionlm.sampling.programs import Inputs, Structure
from diffusionlm.sampling.state import State, block_counts, block_steps


@dataclass(frozen=True)
class Request:
    """A generation that is ready to run.

    Attributes:
      inputs: the data for the device; its canvas may have idle rows at the end.
      structure: what is compiled.
      compact: whether rows that still have work may continue in a smaller batch.
      row_names: the numbers by which messages call the rows, one per row that is not idle.
    """

    inputs: Inputs
    structure: Structure
    compact: bool
    row_names: Sequence[int]

    def trace_frames(self) -> int:
        """Return enough frames for every step: a power of two, so that other numbers of steps rarely recompile."""
        canvas, steps = self.inputs.canvas, self.inputs.settings.steps
        blocks = range(int(canvas.block_BxT.max()) + 1)
        most = max(int(steps), len(blocks))  # a row with more blocks than steps takes one step a block
        if self.structure.windows.lockstep:  # the slowest row of each block counts
            count_B = np.asarray(block_counts(canvas))
            steps_BxK = [np.asarray(block_steps(canvas, steps, np.full_like(count_B, b))) for b in blocks]
            most = sum(int(steps_B[count_B > b].max()) for b, steps_B in enumerate(steps_BxK))
        return 1 << most.bit_length()

    def nfe(self, state: State) -> np.ndarray:
        """Return the forward passes of each row that is not idle, int32 (B,); a guided pass counts twice."""
        return np.asarray(state.nfe_B)[: len(self.row_names)] * (2 if self.structure.guided else 1)

    def check_finite(self, state: State) -> None:
        """Raise `UserError` where the model has given NaN logits."""
        finite_B = np.asarray(state.finite_B)
        if not finite_B.all():
            name = self.row_names[int(np.argmin(finite_B))]
            raise UserError(f"the model gives NaN logits for prompt {name}: its parameters are damaged")


def prepare(
    cfg: ModelSpec,
    templates: Sequence[Template],
    sampling: SamplingConfig,
    key: jax.Array | None = None,
    row_ids: Sequence[int] | None = None,
    row_names: Sequence[int] | None = None,
) -> Request:
    """Check templates and settings against a model, and lay out the request.

    Args:
      cfg: the model.
      templates: the rows, without spans.
      sampling: the settings.
      key: the root key of the noise; None: `jax.random.key(sampling.seed)`.
      row_ids: the numbers that key the noise of the rows; None: their indices.
      row_names: the numbers by which messages call the rows; None: their indices.

    Raises:
      UserError: the model cannot fill a template, or not with these settings.
    """
    sampling = sampling.resolve(autoregressive=cfg.autoregressive)
    assert sampling.cache is not None  # `resolve` has filled it in
    if sampling.guidance and sampling.guidance_kind == "standard" and cfg.shifted:
        raise UserError(
            "guidance_kind=standard leaves the prompt out, but this model predicts each token from the position before "
            "it; use guidance_kind=unsupervised"
        )
    # An autoregressive row advances by one position at a time, which is all that a step with a cache computes.
    block_length = 1 if cfg.autoregressive else sampling.block_length
    row_names = range(len(templates)) if row_names is None else row_names
    row_ids = range(len(templates)) if row_ids is None else row_ids
    canvas = build_canvas(cfg, templates, block_length, row_ids, row_names)
    inputs = Inputs(
        suppressed_V=suppression_mask(cfg.model, cfg.suppressed_ids),
        canvas=canvas,
        key=jax.random.key(sampling.seed) if key is None else key,
        settings=Settings.from_config(sampling),
    )
    structure = Structure(
        model=cfg.model,
        schedule=schedules.build(cfg.diffusion),
        shifted=cfg.shifted,
        mask_id=cfg.mask_id,
        eos_ids=cfg.eos_ids,
        guided=sampling.guidance > 0,
        windows=plan_windows(sampling.cache, cfg.shifted, canvas),
    )
    return Request(inputs, structure, sampling.compact, row_names)
