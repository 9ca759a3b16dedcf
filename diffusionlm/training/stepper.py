"""Dispatches training steps one ahead of the host, so that the devices never wait for it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusionlm.config import Config
from diffusionlm.training.parts import Part, part_of
from diffusionlm.training.state import TrainState
from diffusionlm.training.step import Metrics
from diffusionlm.training.targets import Batch
from diffusionlm.training.timeline import Timeline


class Outcome(NamedTuple):
    """The metrics of a step that the devices have finished, by name, and the batch that it was dispatched with."""

    batch_index: int
    metrics: dict[str, Any]  # floats, and the arrays of `step.Metrics`


class Stepper:
    """The state of a run on its devices, and the step that is in flight.

    The metrics of a step are fetched when the next one has been dispatched. Until then the step is in flight, and may
    turn out to have left its batch out.
    """

    def __init__(
        self,
        cfg: Config,
        train_step: Callable[[TrainState, Batch, np.int32], tuple[TrainState, Metrics]],
        batches: Callable[[int], Iterator[Batch]],
        timeline: Timeline,
    ):
        self._cfg, self._train_step, self._batches, self._timeline = cfg, train_step, batches, timeline
        self._compiled: set[Part] = set()  # the parts whose program has been called

    def set_state(self, state: TrainState) -> None:
        """Continue from `state`, with the batch that it expects."""
        self.state = jax.block_until_ready(state)  # raises where memory was refused; a read of it might wait for ever
        self.step = int(state.step)  # optimizer steps that are known to be taken
        self.batch_index = int(state.next_index)  # of the batch that is dispatched next
        self._in_flight: tuple[int, Metrics] | None = None
        self._stream = self._batches(self.batch_index)

    @property
    def ahead(self) -> int:
        """The number of steps taken if the one in flight is."""
        return self.step + (self._in_flight is not None)

    def dispatch(self) -> Outcome | None:
        """Start the next step, and return the outcome of the one before it, if there is one."""
        with self._timeline.waiting():
            batch = next(self._stream)
        part = part_of(self._cfg, self.batch_index)
        with nullcontext() if part in self._compiled else self._timeline.measure("compile"):
            self.state, metrics = self._train_step(self.state, batch, np.int32(self.batch_index))
        self._compiled.add(part)
        self._timeline.dispatched(functools.partial(jax.block_until_ready, metrics["loss"]))
        before, self._in_flight = self._in_flight, (self.batch_index, metrics)
        self.batch_index += 1
        return self._fetch(before)

    def drain(self) -> Outcome | None:
        """Wait for the step in flight, and return its outcome, if there is one."""
        before, self._in_flight = self._in_flight, None
        return self._fetch(before)

    def release(self) -> None:
        """Free the memory of the devices, whoever still refers to this object: the next state may need all of it.

        Nothing but `set_state` may be called afterwards.
        """
        for name in ("state", "_in_flight", "_stream"):
            self.__dict__.pop(name, None)

    def _fetch(self, dispatched: tuple[int, Metrics] | None) -> Outcome | None:
        if dispatched is None:
            return None
        batch_index, metrics = dispatched
        values = {
            name: value if value.ndim else float(value)
            for name, value in jax.device_get(jax.block_until_ready(metrics)).items()
        }
        self.step += bool(values["applied"])
        return Outcome(batch_index, values)
