"""Which tensor of a family holds which part of a model's parameters: what importing and exporting have in common."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from diffusionlm.config import MeshConfig, ModelConfig
from diffusionlm.errors import UserError
from diffusionlm.interop.families import Family, Rule
from diffusionlm.interop.layouts import Shape, flat_shape, shape_of
from diffusionlm.model.transformer import abstract_params
from diffusionlm.parallel.mesh import make_mesh

STACKED = "blocks/"  # parameters of the blocks have a leading axis of layers


class Place(NamedTuple):
    """A tensor of theirs: the rule that it falls under, its layer if it has one, and its shape."""

    rule: Rule
    layer: int | None
    shape: Shape


def leaves(cfg: ModelConfig, mesh: jax.sharding.Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a model by name, "blocks/q" for instance, with their shardings on `mesh`."""
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1]) if mesh is None else mesh
    return traverse_util.flatten_dict(abstract_params(cfg, mesh), sep="/")


def places(family: Family, cfg: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, Place]:
    """Every tensor that a model has in the family's terms, by name.

    Args:
      family: whose terms.
      cfg: the model.
      shapes: of its parameters by name.

    Raises:
      UserError: the family has no place for some parameter.
    """
    rules = [rule for rule in family.rules if all(name in shapes for name in rule.ours)]
    held = {name for rule in rules for name in rule.ours}
    if homeless := sorted(set(shapes) - held):
        raise UserError(f"this format has no place for the model's {homeless[0]!r}, and {len(homeless) - 1} more")
    found = {}
    for rule in rules:
        stacked = rule.ours[0].startswith(STACKED)
        ours = [flat_shape(name, shapes[name][1:] if stacked else shapes[name]) for name in rule.ours]
        in_head = rule.layout == "columns" and not family.mask_in_head
        shape = shape_of(rule.layout, ours, cfg.vocab_size if in_head else cfg.embedding_rows)
        for layer in range(cfg.n_layers) if stacked else (None,):
            found[rule.theirs.format(i=layer)] = Place(rule, layer, shape)
    return found


def views(place: Place, params: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What a tensor holds of our parameters, as vectors and matrices that share their memory."""
    ours = [params[name] if place.layer is None else params[name][place.layer] for name in place.rule.ours]
    return [one.reshape(flat_shape(name, one.shape)) for name, one in zip(place.rule.ours, ours, strict=True)]


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The dtype that holds the values of all of these exactly."""
    kinds = set(dtypes)
    return kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)  # NumPy knows none for two of 16 bits


def listed(names: Sequence[str]) -> str:
    """The first few of many names, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
