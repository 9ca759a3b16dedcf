"""Published scaling laws and points with their sources, which a report overlays and tests of the fits use.

The numbers are in `published.json`, whose notes give units and conventions, and say which laws are missing and why.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Annotated, Literal

import msgspec

from diffusionlm import schema
from diffusionlm.errors import UserError, suggest


@dataclass(frozen=True)
class PublishedLaw:
    """A published law; numbers that its source does not give are None, as is everything that needs them."""

    name: str
    title: str
    source: str
    how: str  # how the numbers were obtained
    objective: str
    convention: Mapping[str, str]  # what N and C count
    data: str | None
    fitted_range: tuple[float, float] | None  # FLOPs
    points: tuple[Mapping[str, float], ...]  # C, N, L
    loss_law: Mapping[str, float] | None
    params_law: Mapping[str, float | None] | None
    tokens_law: Mapping[str, float] | None
    parametric: Mapping[str, float] | None

    def params(self, c: float) -> float | None:
        """Return N* at C by the source's power law, or by the minimum of its parametric loss with C = 6 N D."""
        if self.params_law:
            coefficient, exponent = self.params_law["coefficient"], self.params_law["exponent"]
            assert exponent is not None  # only a coefficient may be unpublished
            if coefficient is None:  # not published: use the best one for the points
                coefficient = math.exp(
                    sum(math.log(p["N"]) - exponent * math.log(p["C"]) for p in self.points) / len(self.points)
                )
            return float(coefficient * c**exponent)
        if self.parametric:
            a, b, alpha, beta = (self.parametric[key] for key in ("A", "B", "alpha", "beta"))
            # dL/dN = 0 along 6 N D = C (2203.15556, Eq. 4)
            return float((alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (c / 6) ** (beta / (alpha + beta)))
        return None

    def tokens(self, c: float) -> float | None:
        """Return D* at C by the source's power law, or as C / (6 N*)."""
        if self.tokens_law:
            return float(self.tokens_law["coefficient"] * c ** self.tokens_law["exponent"])
        n = self.params(c)
        return None if n is None else c / (6 * n)

    def loss(self, c: float) -> float | None:
        """Return L* at C, nats per token of the source's tokenizer and text."""
        if self.loss_law:
            return float(math.exp(self.loss_law["exponent"] * math.log(c) + self.loss_law["log_prefactor"]))
        n, d, p = self.params(c), self.tokens(c), self.parametric
        if n is not None and d is not None and p:
            return float(p["E"] + p["A"] / n ** p["alpha"] + p["B"] / d ** p["beta"])
        return None


_Real = Annotated[float, msgspec.Meta(gt=0)]
_Exponent = Annotated[float, msgspec.Meta(gt=-1, lt=1)]


class _Power(schema.Record, frozen=True):
    exponent: _Exponent
    coefficient: _Real | None


class _Loss(schema.Record, frozen=True):
    exponent: _Exponent
    log_prefactor: float


class _Parametric(schema.Record, frozen=True):
    E: _Real
    A: _Real
    B: _Real
    alpha: _Real
    beta: _Real


class _Entry(schema.Record, frozen=True):
    title: str
    source: str
    how: str
    objective: Literal["mdm", "arm", "uniform"]
    convention: dict[Literal["N", "C"], str]
    data: str | None
    fitted_range: tuple[_Real, _Real] | None
    points: list[dict[Literal["C", "N", "L"], _Real]]
    loss: _Loss | None
    params: _Power | None
    tokens: _Power | None
    parametric: _Parametric | None


class _File(schema.Record, frozen=True):
    version: Literal[1]
    notes: list[str]
    laws: dict[str, _Entry]


@functools.cache
def _file() -> Mapping:
    text = resources.files("diffusionlm.scaling.laws").joinpath("published.json").read_text()
    return msgspec.to_builtins(schema.decode(text, _File, "published.json"))


def names() -> list[str]:
    """Return the names of all published laws."""
    return sorted(_file()["laws"])


def get(name: str) -> PublishedLaw:
    """Return a published law.

    Raises:
      UserError: an unknown name.
    """
    known = _file()["laws"]
    if name not in known:
        raise UserError(f"unknown published law {name!r}{suggest(name, known)}")
    entry = dict(known[name])
    renamed = {f"{key}_law": entry.pop(key) for key in ("loss", "params", "tokens")}
    entry["points"] = tuple(entry["points"])
    entry["fitted_range"] = tuple(entry["fitted_range"]) if entry["fitted_range"] else None
    return PublishedLaw(name=name, **renamed, **entry)
