"""Import foreign weights as our checkpoint, one tensor at a time (`config_json` reads config.json)."""

import contextlib
import dataclasses
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from diffusionlm import config_io, flops, hub, memory, untrusted
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.config import ModelConfig
from diffusionlm.data import tokenizers
from diffusionlm.errors import UserError
from diffusionlm.interop import chats, config_json, safetensors
from diffusionlm.interop.config_json import ConfigJson, NativeFields
from diffusionlm.interop.config_keys import detect_family, require_architecture
from diffusionlm.interop.families import FAMILIES, Family
from diffusionlm.interop.layouts import paired_views
from diffusionlm.interop.placement import (
    Placement,
    abridged,
    abstract_leaves,
    common_dtype,
    parameter_views,
    placements,
)
from diffusionlm.interop.sidecars import Source, imported_sidecar
from diffusionlm.interop.sizes import require_sizes
from diffusionlm.ownership.claims import owned_output
from diffusionlm.parallel import processes
from diffusionlm.scalars import is_whole, native
from diffusionlm.storage import disk_path

log = logging.getLogger(__name__)

Tensors = dict[str, safetensors.Tensor]
EXPONENTS = {np.dtype(np.float32): 0x7F800000, np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00}
FINITE_CHUNK = 1 << 17  # values that are checked at a time, which stay in a processor's cache


def import_weights(
    source: str | os.PathLike,
    output: str | os.PathLike,
    family: str | None = None,
    *,
    tokenizer: str | None = None,
    mask_id: int | None = None,
    suppress_mask: bool | None = None,
    chat_template: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Path:
    """Convert released weights to a checkpoint that can be sampled, scored, fine-tuned or adapted.

    Tensors keep their dtype and are bit-equal to those of the source. Peak memory is little more than the model itself.

    Args:
      source: a Hugging Face directory (config.json, safetensors in one file or several, tokenizer files), or a
        .safetensors file.
      output: the checkpoint, a new directory.
      family: gpt2, llama, mistral, qwen2, qwen3, dream, llada, smdm, diffugpt or diffullama; None: detect it.
      tokenizer: a tokenizer file or directory, or hf://OWNER/NAME; None: the source's own, if it has one.
      mask_id: the id of [MASK]; None: config.json's, or else the one that the family published.
      suppress_mask: True to never predict a mask id from the vocabulary; None: as the family's reference does.
      chat_template: the name of one of several chat templates, or "none"; None: the default one, if there is one.
      mesh: devices to place the parameters on before they are written; each process writes its part.

    Returns:
      The path of the checkpoint.

    Raises:
      UserError: the source is damaged, incomplete or of an architecture that our network does not compute; the
        tokenizer has more ids than the model has rows; `output` exists, or another process is making it.
    """
    source, output = disk_path(source), disk_path(output)
    _require_usable(source, output, family)
    tensors, directory = safetensors.find(source), source if source.is_dir() else source.parent
    # A single file of SMDM's lies among others and has no config.json; one beside it is another model's.
    fields = config_json.read(directory) if family != "smdm" or source.is_dir() else {}
    with _importing(source):
        name = _family(family, fields, tensors)
        tensors = _renamed(FAMILIES[name], tensors)
        cfg, mask_id = _model(FAMILIES[name], fields, tensors, mask_id)
        require_sizes(FAMILIES[name], cfg, {name: tensor.shape for name, tensor in tensors.items()})
        abstract = abstract_leaves(cfg, mesh)
        placed = placements(FAMILIES[name], cfg, {name: leaf.shape for name, leaf in abstract.items()})
        tensors = _complete(FAMILIES[name], cfg, tensors, placed)
        dtypes = _dtypes(tensors, placed)
        _require_room(source, abstract, dtypes, tensors)
    loaded = _load_tokenizer(directory, fields, tokenizer, cfg)
    with _importing(source):
        origin = _origin(source, name, fields, loaded, cfg, _directories(directory, tokenizer), chat_template)
        sidecar = imported_sidecar(origin, cfg, mask_id, suppress_mask)
    with processes.on_first_process(lambda: owned_output(output)):
        with _importing(source):
            params = _filled(cfg, abstract, dtypes, placed, tensors, mesh)
        checkpoint.save_params(output, traverse_util.unflatten_dict(params, sep="/"), sidecar, compress=False)
    return output


def _require_usable(source: Path, output: Path, family: str | None) -> None:
    """Refuse an output that exists, an unknown family, and a source that is a checkpoint of ours."""
    if output.exists():
        raise UserError(f"output={output} exists; delete it or choose another directory")
    if family is not None and family not in FAMILIES:
        raise UserError(f"family={family!r} must be one of {', '.join(FAMILIES)}")
    try:
        checkpoint.find(source)
    except UserError:
        return
    raise UserError(f"{source} is a checkpoint of diffusionlm and needs no import; use it: diffusionlm sample {source}")


@contextlib.contextmanager
def _importing(source: Path) -> Iterator[None]:
    """Put the source in front of the messages of this block, which name its files without the directory."""
    try:
        yield
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(str(source)) else f"{source}: {message}") from error


def summary(sidecar: Sidecar) -> str:
    """Return a short description of an imported checkpoint."""
    cfg = config_io.from_dict(ModelConfig, sidecar.model)
    kind = "autoregressive" if sidecar.objective == "arm" else f"masked diffusion, mask id {sidecar.mask_id}"
    tokenizer = "its tokenizer" if sidecar.tokenizer else "no tokenizer"
    if sidecar.template:
        tokenizer += f", chat template: {untrusted.printable(sidecar.template['name'])}"
    return f"{sidecar.source['family']}, {flops.parameters(cfg).total:,} parameters, {kind}, {tokenizer}"


def _family(named: str | None, fields: ConfigJson, tensors: Tensors) -> str:
    """Return the family that the user named, or else that of config.json and the tensors.

    Raises:
      UserError: there is none, or config.json is another family's.
    """
    native = NativeFields.read(fields)
    if named and native and native.family != named:
        raise UserError(f"config.json was exported as {native.family}; import it without --family {named}")
    name = named or (native.family if native else detect_family(fields, tensors))
    require_architecture(name, fields)
    if name == "llama" and not named and not native:
        log.warning(
            "this config.json is also that of DiffuLLaMA, a diffusion model adapted from LLaMA; if these weights are "
            "DiffuLLaMA's, import them with --family diffullama"
        )
    return name


def _renamed(family: Family, tensors: Tensors) -> Tensors:
    """Return the tensors under the names that the rules use, without those that hold no parameters."""
    kept = {name: tensor for name, tensor in tensors.items() if not re.fullmatch(family.ignored, name)}
    if family.prefix and not any(name.startswith(family.prefix) for name in kept):
        kept = {name if name == family.head else family.prefix + name: tensor for name, tensor in kept.items()}
    return kept


def _model(family: Family, fields: ConfigJson, tensors: Tensors, mask_id: int | None) -> tuple[ModelConfig, int | None]:
    """Return the network and its mask id, None where it is autoregressive."""
    cfg = _network(family, fields, tensors)
    rows = cfg.embedding_rows
    ends = [tensor for name, tensor in tensors.items() if name in (family.embedding, family.head)]
    narrow = all(tensor.dtype.itemsize == 2 for tensor in ends)
    cfg = dataclasses.replace(cfg, dtype="bfloat16" if narrow else "float32")
    if native := NativeFields.read(fields):
        cfg = dataclasses.replace(cfg, causal=native.objective == "arm", rope_bf16_tables=native.rope_bf16_tables)
        cfg.validate()
    if cfg.causal:
        if mask_id is not None:
            raise UserError(
                f"mask_id={mask_id} is for masked diffusion models, and this one is autoregressive; omit it"
            )
        return cfg, None
    if cfg.mask_row:  # SMDM appends it itself
        return cfg, cfg.vocab_size
    mask_id = _mask_id(family, fields, rows, mask_id)
    appended = native.mask_row if native else family.mask_id is not None
    if appended and mask_id == rows - 1:
        cfg = dataclasses.replace(cfg, vocab_size=rows - 1, mask_row=True)
    return cfg, mask_id


def _network(family: Family, fields: ConfigJson, tensors: Tensors) -> ModelConfig:
    """Return the network of a config.json or, in a format without one, of the shapes of the tensors."""
    if not family.fields:
        return config_json.ladder_config({name: tensor.shape for name, tensor in tensors.items()})
    if not fields:
        raise UserError("there is no config.json beside the weights to describe them; restore it")
    cfg = config_json.to_model_config(family, fields)
    stored = tensors.get(family.embedding) or tensors.get(family.head)
    return dataclasses.replace(cfg, vocab_size=stored.shape[0]) if stored and family.mask_id else cfg


def _mask_id(family: Family, fields: ConfigJson, rows: int, mask_id: int | None) -> int:
    """Return the mask id that the user chose, or config.json's, or else the family's."""
    if mask_id is None:
        mask_id = config_json.special_id(fields, "mask")
    if mask_id is None and family.mask_id:
        mask_id = family.mask_id(rows)
    if mask_id is None:
        raise UserError("config.json has no mask_token_id; give the id of the mask with --mask_id")
    row = native(mask_id)
    if not is_whole(row) or not 0 <= row < rows:
        raise UserError(f"mask_id={row} must lie in [0, {rows}), the model's input rows; choose another")
    return row


def _origin(
    source: Path,
    family: str,
    fields: ConfigJson,
    tokenizer: tokenizers.Tokenizer | None,
    cfg: ModelConfig,
    directories: list[Path],
    chat_template: str | None,
) -> Source:
    """Return what is imported, with the chat template and the end tokens that the directories have."""
    name = source.stem if source.is_file() else source.resolve().name
    template = chats.chat_template(directories, family, name, tokenizer, chat_template)
    rows, has_chats = cfg.embedding_rows, template is not None
    end_ids = chats.end_ids(directories[-1:], fields, family, tokenizer, chats=has_chats, rows=rows)
    return Source(name, family, fields, tokenizer, template and template.to_dict(), end_ids)


def _directories(source: Path, tokenizer: str | None) -> list[Path]:
    """Return where a model's chat template may be: beside the tokenizer that the user named, and beside the weights."""
    if tokenizer is None or tokenizer == "byte":
        return [source]
    if hub.is_address(tokenizer):
        return [hub.fetch(tokenizer, tokenizers.HUB_FILES).path, source]
    named = Path(tokenizer)
    return [named if named.is_dir() else named.parent, source]


def _load_tokenizer(
    directory: Path, fields: ConfigJson, path: str | None, cfg: ModelConfig
) -> tokenizers.Tokenizer | None:
    """Return the tokenizer at `path`, or else that of the source, or None."""
    tokenizer = tokenizers.load(path) if path is not None else tokenizers.load_directory(directory, fields)
    if tokenizer is not None and tokenizer.vocab_size > cfg.embedding_rows:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, and the model {cfg.embedding_rows} input rows; give the "
            "model's own with --tokenizer"
        )
    return tokenizer


def _complete(family: Family, cfg: ModelConfig, tensors: Tensors, placed: Mapping[str, Placement]) -> Tensors:
    """Return exactly the tensors that `placed` names; a tied model's head, if stored alone, is its embedding too."""
    tensors = dict(tensors)
    if cfg.tied_head and family.head in tensors:
        head = tensors.pop(family.head)
        embedding = tensors.setdefault(family.embedding, head)
        if embedding is not head and not _bit_equal(embedding, head):
            raise UserError(
                f"the model is tied, and its {family.head} differs from {family.embedding}; set its field for tied "
                "heads in config.json to false"
            )
    if missing := sorted(set(placed) - set(tensors)):
        raise UserError(f"the source lacks {len(missing)} of {len(placed)} tensors: {abridged(missing)}; complete it")
    if unknown := sorted(set(tensors) - set(placed)):
        raise UserError(
            f"the source has {len(unknown)} tensors that this family does not know: {abridged(unknown)}; "
            "the files of another model or a damaged config.json do that"
        )
    if different := [name for name, placement in placed.items() if tensors[name].shape != placement.shape]:
        texts = [f"{name} {list(tensors[name].shape)} instead of {list(placed[name].shape)}" for name in different]
        raise UserError(f"{len(texts)} tensors have other shapes than config.json says: {abridged(texts)}; restore it")
    return tensors


def _bit_equal(first: safetensors.Tensor, second: safetensors.Tensor) -> bool:
    return np.array_equal(first.read().view(np.uint8), second.read().view(np.uint8))


def _dtypes(tensors: Tensors, placed: Mapping[str, Placement]) -> dict[str, np.dtype]:
    """Return the dtype of each parameter, which holds the values of all its tensors exactly."""
    dtypes: dict[str, list[np.dtype]] = {}
    for name, placement in placed.items():
        for parameter in placement.rule.parameters:
            dtypes.setdefault(parameter, []).append(tensors[name].dtype)
    return {parameter: common_dtype(found) for parameter, found in dtypes.items()}


@processes.on_all_processes
def _require_room(
    source: Path, abstract: Mapping[str, jax.ShapeDtypeStruct], dtypes: Mapping[str, np.dtype], tensors: Tensors
) -> None:
    """Refuse parameters that cannot fit into the memory of this host, with the largest tensor while it is read."""
    parts = {
        "parameters": sum(math.prod(leaf.shape) * dtypes[name].itemsize for name, leaf in abstract.items()),
        "the largest tensor": max(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values()),
    }
    memory.require_room(f"importing {source}", parts, None, "use a machine with more memory")


def _filled(
    cfg: ModelConfig,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    dtypes: Mapping[str, np.dtype],
    placed: Mapping[str, Placement],
    tensors: Tensors,
    mesh: jax.sharding.Mesh | None,
) -> Mapping[str, np.ndarray | jax.Array]:
    """Return the parameters by name, with layers stacked and zeros in the rows that pad the vocabulary.

    They are on the mesh, if there is one.

    Raises:
      UserError: a tensor has values that are not finite.
    """
    params = {name: np.zeros(leaf.shape, dtypes[name]) for name, leaf in abstract.items()}

    def size(item: tuple[str, Placement]) -> int:
        return math.prod(item[1].shape)

    # Largest first: the operating system commits the pages of an array when they are written, so the peak, parameters
    # plus the tensor being read, is lowest if the largest tensors are read while few parameters are filled.
    for name, placement in sorted(placed.items(), key=size, reverse=True):
        views = parameter_views(placement, params)
        tensor = tensors[name].read()
        _require_finite(name, tensor)
        for target, part in paired_views(placement.rule.layout, views, tensor, cfg):
            target[...] = part
    if mesh is None:
        return params
    return {
        name: jax.make_array_from_callback(leaf.shape, leaf.sharding, params[name].__getitem__)
        for name, leaf in abstract.items()
    }


def _require_finite(name: str, tensor: np.ndarray) -> None:
    """Refuse a tensor with NaN or infinity: a float whose exponent bits are all set.

    Raises:
      UserError: there are such values.
    """
    bits = tensor.reshape(-1).view(np.uint16 if tensor.dtype.itemsize == 2 else np.uint32)
    exponent = bits.dtype.type(EXPONENTS[tensor.dtype])
    masked = np.empty(min(bits.size, FINITE_CHUNK), bits.dtype)
    count = 0
    for start in range(0, bits.size, FINITE_CHUNK):
        chunk = bits[start : start + FINITE_CHUNK]
        part = np.bitwise_and(chunk, exponent, out=masked[: chunk.size])
        if part.max() == exponent:
            count += int(np.count_nonzero(part == exponent))
    if count:
        raise UserError(
            f"{name} has {count:,} of {bits.size:,} values that are NaN or infinite; the weights are damaged, or "
            "their training diverged: get them again"
        )
