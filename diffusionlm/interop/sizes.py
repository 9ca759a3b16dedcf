"""Check the sizes that config.json gives against the tensors, before anything of these sizes is made or counted."""

import re
from collections.abc import Mapping

from diffusionlm.config import ModelConfig
from diffusionlm.errors import UserError
from diffusionlm.interop.families import Family
from diffusionlm.interop.layouts import Shape


def require_sizes(family: Family, cfg: ModelConfig, shapes: Mapping[str, Shape]) -> None:
    """Refuse a network with a size that no tensor has, or with another number of layers.

    Shapes are compared one by one later. Afterwards that is cheap: no size exceeds what the file holds.

    Args:
      family: the format.
      cfg: the network that config.json describes.
      shapes: the shapes of the tensors in the files.

    Raises:
      UserError: a size is not among the dimensions of the tensors.
    """
    layers = _layers(family, shapes)
    if cfg.n_layers != layers:
        name = family.fields.get("n_layers", "n_layers")
        raise UserError(f"config.json has {name}={cfg.n_layers}, and the weights have {layers} layers; restore it")
    lengths = {length for shape in shapes.values() for length in shape}
    sizes = {
        ("d_model",): cfg.d_model,
        ("d_ff",): cfg.d_ff,
        ("n_heads", "head_dim"): cfg.n_heads * cfg.head_dim,
        ("n_kv_heads", "head_dim"): cfg.n_kv_heads * cfg.head_dim,
        ("vocab_size",): cfg.embedding_rows,
    }
    if cfg.positions == "learned":
        sizes["max_length",] = cfg.max_length
    for names, size in sizes.items():
        if size not in lengths:
            texts = [f"{family.fields.get(name, name)}={getattr(cfg, name)}" for name in names]
            product = f", together {size}" if len(names) > 1 else ""
            raise UserError(
                f"config.json has {' and '.join(texts)}{product}, and no tensor of the weights has a dimension of "
                f"{size}; restore it"
            )


def _layers(family: Family, shapes: Mapping[str, Shape]) -> int:
    patterns = [re.escape(rule.tensor).replace(r"\{i\}", r"(\d{1,9})") for rule in family.rules if "{i}" in rule.tensor]
    pattern = re.compile("|".join(patterns))
    matches = [pattern.fullmatch(name) for name in shapes]
    return len({next(filter(None, match.groups())) for match in matches if match})
