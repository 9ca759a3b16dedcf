"""Saves and restores the checkpoints of a run, each with the sidecar that says what its parameters mean."""

import time

from etils import epath
from jax.sharding import Mesh

from diffusionlm import config_io, fingerprint
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.checkpoint.store import CheckpointManager
from diffusionlm.config import Config
from diffusionlm.data.mixtures import Mixture
from diffusionlm.data.pipeline import Dataset
from diffusionlm.errors import UserError
from diffusionlm.parallel import processes
from diffusionlm.training.parts import config_of, ends_as_autoregressive
from diffusionlm.training.state import TrainState, abstract_state
from diffusionlm.training.timeline import Timeline
from diffusionlm.version import __version__


class Saver:
    """The checkpoints of one run; a context manager that waits for the last save when it closes."""

    def __init__(self, cfg: Config, workdir: epath.Path, dataset: Dataset | Mixture, timeline: Timeline):
        self._cfg, self._workdir, self._dataset, self._timeline = cfg, workdir, dataset, timeline
        self._checkpoints = CheckpointManager(workdir, cfg.run.keep, cfg.run.keep_every)
        self._saved_at = time.monotonic()
        self.next_index: int | None = None  # of the newest checkpoint

    def has_checkpoint(self) -> bool:
        """Return True if this process sees a checkpoint."""
        return self._checkpoints.latest_step() is not None

    def newest_step(self) -> int | None:
        """Return the step of the newest checkpoint, which every process must see; None where there is none."""

        @processes.on_all_processes
        def newest() -> int | None:
            self._checkpoints.wait()
            return self._checkpoints.latest_step()

        step = newest()
        processes.require_equal(
            {"newest checkpoint": step},
            f"what it sees of {self._workdir} is out of date or another directory; start again",
        )
        return step

    @processes.on_all_processes
    def restore(self, step: int, mesh: Mesh) -> TrainState:
        """Return the state that was saved at `step`, laid out on `mesh`.

        Raises:
          UserError: the run was trained on another dataset, or a file is damaged.
        """
        trained_on, sha256 = self._checkpoints.sidecar(step).source.get("dataset"), self._dataset.sha256
        if trained_on != sha256:
            raise UserError(
                f"{self._workdir} was trained on another dataset ({trained_on}) than {self._dataset.path} ({sha256}); "
                "use another --workdir, or that dataset"
            )
        state = self._checkpoints.restore(abstract_state(self._cfg, mesh), step)
        self.next_index = int(state.next_index)
        return state

    def overdue(self) -> bool:
        """Return True if `run.checkpoint_minutes` have passed since the last save."""
        return 0 < self._cfg.run.checkpoint_minutes * 60 < time.monotonic() - self._saved_at

    def save(self, state: TrainState) -> None:
        """Start to save `state`; a step is saved only once."""
        step = int(state.step)
        if step != self._checkpoints.latest_step():
            self.next_index = int(state.next_index)
        with self._timeline.measure("save"):
            self._checkpoints.save(step, state, self._sidecar(step, int(state.next_index)))
        self._saved_at = time.monotonic()

    def _sidecar(self, step: int, next_batch: int) -> Sidecar:
        return make_sidecar(self._cfg, self._dataset, step, ends_as_autoregressive(self._cfg, next_batch))

    def wait(self) -> None:
        """Block until the save in flight is on disk."""
        with self._timeline.measure("save"):
            self._checkpoints.wait()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpoints.close()


def make_sidecar(cfg: Config, dataset: Dataset | Mixture, step: int, autoregressive: bool = False) -> Sidecar:
    """Return what a reader of the checkpoint at `step` must know beside the parameters.

    Args:
      cfg: the run.
      dataset: its data.
      step: the optimizer steps taken.
      autoregressive: true where the run has trained next-token prediction alone so far (`parts`).
    """
    run, cfg = cfg, config_of(cfg, "autoregressive") if autoregressive else cfg
    tokenizer, template = dataset.tokenizer, dataset.metadata.template
    document_start = tokenizer.bos_id if dataset.metadata.bos else None
    starts = {
        "chunk": tokenizer.bos_id if dataset.metadata.bos else tokenizer.eos_id,
        "segments": document_start,
        **dict.fromkeys(("examples", "packed_examples"), template and template["start_id"]),
    }
    return Sidecar(
        objective=cfg.objective,
        model=config_io.to_dict(cfg.model),
        diffusion=config_io.to_dict(cfg.diffusion),
        mask_id=cfg.mask_id,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        suppressed_ids=cfg.suppressed_ids,
        tokenizer=tokenizer.to_dict(),
        alignment="shifted" if cfg.objective == "arm" else cfg.diffusion.alignment,
        # start_id stood before each document in training, so that a sampler can begin a text as a document began.
        canvas={"max_length": cfg.data.sequence_length, "start_id": starts[cfg.data.packing]},
        template=template,
        source={
            "experiment": cfg.name,
            "fingerprint": fingerprint.fingerprint(run),
            "dataset": dataset.sha256,
            "diffusionlm": __version__,
            "step": step,
            "tokens": step * cfg.data.batch_size * cfg.data.sequence_length,
            **({"init_id": cfg.run.init_id} if cfg.run.init_id else {}),
            **({"continue_id": cfg.run.continue_id} if cfg.run.continue_id else {}),
            **(_sources(dataset) if isinstance(dataset, Mixture) else {}),
        },
    )


def _sources(mixture: Mixture) -> dict[str, str]:
    """Return what a checkpoint says of a mixture: its shares, and the identity of each source."""
    known = zip(mixture.labels, mixture.datasets, strict=True)
    return {"mixture": mixture.spec.canonical, **{f"dataset/{label}": dataset.sha256 for label, dataset in known}}
