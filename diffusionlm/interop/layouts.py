"""How a tensor of a released model holds one or several of ours; every layout is read and written.

Shapes here are of one layer. Ours are (*inputs, *outputs) for matrices and (rows, width) for the embedding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Shape = tuple[int, ...]


class Layout(Protocol):
    """One tensor of theirs, and the tensors of ours that it holds."""

    def shape(self, ours: Sequence[Shape]) -> Shape:
        """Of theirs."""

    def read(self, theirs: np.ndarray, ours: Sequence[Shape]) -> list[np.ndarray]:
        """Theirs as ours."""

    def write(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Ours as theirs."""


@dataclass(frozen=True)
class Vector:
    """A gain or a bias, whatever axes ours has."""

    def shape(self, ours: Sequence[Shape]) -> Shape:
        return (math.prod(ours[0]),)

    def read(self, theirs: np.ndarray, ours: Sequence[Shape]) -> list[np.ndarray]:
        return [theirs.reshape(ours[0])]

    def write(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return ours[0].reshape(-1)


@dataclass(frozen=True)
class Matrix:
    """A linear layer's weight, (outputs, inputs) as PyTorch has it, or (inputs, outputs)."""

    inputs: int = 1  # how many of our axes
    transposed: bool = True

    def shape(self, ours: Sequence[Shape]) -> Shape:
        flat = math.prod(ours[0][: self.inputs]), math.prod(ours[0][self.inputs :])
        return flat[::-1] if self.transposed else flat

    def read(self, theirs: np.ndarray, ours: Sequence[Shape]) -> list[np.ndarray]:
        return [(theirs.T if self.transposed else theirs).reshape(ours[0])]

    def write(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        flat = ours[0].reshape(math.prod(ours[0].shape[: self.inputs]), -1)
        return flat.T if self.transposed else flat


@dataclass(frozen=True)
class Vocabulary:
    """The embedding, or with `head` the output matrix: theirs has a row for each id, ours is padded with zeros."""

    rows: int
    head: bool = False

    def shape(self, ours: Sequence[Shape]) -> Shape:
        return (self.rows, ours[0][0 if self.head else 1])

    def read(self, theirs: np.ndarray, ours: Sequence[Shape]) -> list[np.ndarray]:
        table = np.zeros(ours[0], theirs.dtype)
        if self.head:
            table[:, : self.rows] = theirs.T
        else:
            table[: self.rows] = theirs
        return [table]

    def write(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return ours[0][:, : self.rows].T if self.head else ours[0][: self.rows]


@dataclass(frozen=True)
class Fused:
    """Several tensors side by side along the last axis of theirs, as q, k and v in GPT-2."""

    part: Layout

    def shape(self, ours: Sequence[Shape]) -> Shape:
        parts = [self.part.shape([one]) for one in ours]
        return (*parts[0][:-1], sum(part[-1] for part in parts))

    def read(self, theirs: np.ndarray, ours: Sequence[Shape]) -> list[np.ndarray]:
        ends = np.cumsum([self.part.shape([one])[-1] for one in ours])
        parts = np.split(theirs, ends[:-1], axis=-1)
        return [self.part.read(part, [one])[0] for part, one in zip(parts, ours, strict=True)]

    def write(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([self.part.write([one]) for one in ours], axis=-1)


@dataclass(frozen=True)
class Interleaved:
    """q, k and v of one head after another, (heads, 3, head_dim, inputs) in rows (SMDM; as many key heads as heads)."""

    def shape(self, ours: Sequence[Shape]) -> Shape:
        D, H, K = ours[0]
        return (3 * H * K, D)

    def read(self, theirs: np.ndarray, ours: Sequence[Shape]) -> list[np.ndarray]:
        D, H, K = ours[0]
        by_head_Hx3xKxD = theirs.reshape(H, 3, K, D)
        return [by_head_Hx3xKxD[:, i].transpose(2, 0, 1) for i in range(3)]

    def write(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        by_head_Hx3xKxD = np.stack([one.transpose(1, 2, 0) for one in ours], axis=1)
        return by_head_Hx3xKxD.reshape(-1, ours[0].shape[0])
