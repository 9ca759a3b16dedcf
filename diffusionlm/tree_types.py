"""Names for trees of arrays in annotations; JAX has no type for "a tree of"."""

from collections.abc import Mapping
from typing import Any

PyTree = Any  # anything that `jax.tree.map` maps over
Params = Mapping[str, Any]  # nested dicts of arrays: parameters, their gradients, or their abstract shapes
Shardings = Any  # one `Sharding`, or a tree of them with the structure of the tree that they place
