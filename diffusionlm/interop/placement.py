"""Map each of our parameters to the foreign tensor that holds it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from diffusionlm.config import MeshConfig, ModelConfig
from diffusionlm.errors import UserError
from diffusionlm.interop.families import Family
from diffusionlm.interop.layouts import Shape, flat_shape, tensor_shape
from diffusionlm.interop.rules import Rule
from diffusionlm.model.transformer import abstract_params
from diffusionlm.parallel.mesh import make_mesh

STACKED = "blocks/"  # parameters of the blocks have a leading axis of layers


class Placement(NamedTuple):
    """A tensor of a format: its rule, the layer that it belongs to if any, and its shape."""

    rule: Rule
    layer: int | None
    shape: Shape


def abstract_leaves(cfg: ModelConfig, mesh: jax.sharding.Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the abstract parameters of a model by name ("blocks/q"), with their shardings on `mesh`."""
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1]) if mesh is None else mesh
    flat: dict[str, Any] = traverse_util.flatten_dict(abstract_params(cfg, mesh), sep="/")
    return flat


def placements(family: Family, cfg: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, Placement]:
    """Return the placement of every tensor that a model has in a family's format, by the tensor's name.

    Args:
      family: the format.
      cfg: the model.
      shapes: the shapes of its parameters by name.

    Raises:
      UserError: the format has no tensor for some parameter.
    """
    rules = [rule for rule in family.rules if all(name in shapes for name in rule.parameters)]
    placed = {name for rule in rules for name in rule.parameters}
    if unplaced := sorted(set(shapes) - placed):
        raise UserError(f"this format has no place for {len(unplaced)} of the model's parameters: {abridged(unplaced)}")
    result = {}
    for rule in rules:
        stacked = rule.parameters[0].startswith(STACKED)
        flat = [flat_shape(name, shapes[name][1:] if stacked else shapes[name]) for name in rule.parameters]
        without_mask = rule.layout == "columns" and not family.mask_in_head
        shape = tensor_shape(rule.layout, flat, cfg.vocab_size if without_mask else cfg.embedding_rows)
        for layer in range(cfg.n_layers) if stacked else (None,):
            result[rule.tensor.format(i=layer)] = Placement(rule, layer, shape)
    return result


def parameter_views(placement: Placement, params: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return the parameters that a tensor holds, as vectors and matrices that share their memory."""
    views = []
    for name in placement.rule.parameters:
        array = params[name] if placement.layer is None else params[name][placement.layer]
        views.append(array.reshape(flat_shape(name, array.shape)))
    return views


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Return a dtype that holds the values of all of `dtypes` exactly."""
    distinct = set(dtypes)
    # NumPy promotes no pair of different 16-bit floats.
    return distinct.pop() if len(distinct) == 1 else np.dtype(np.float32)


def abridged(names: Sequence[str]) -> str:
    """Return the first three of many names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
