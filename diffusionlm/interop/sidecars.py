"""Build the sidecar of an imported model, and the extra config.json fields that let an export preserve one."""

import dataclasses
from typing import Any, NamedTuple

from diffusionlm import config_io
from diffusionlm.checkpoint.sidecar import Sidecar
from diffusionlm.config import DiffusionConfig, ModelConfig
from diffusionlm.data.tokenizers import Tokenizer
from diffusionlm.errors import UserError
from diffusionlm.interop.config_json import NATIVE_KEY, ConfigJson, NativeFields, special_id
from diffusionlm.interop.families import FAMILIES


class Source(NamedTuple):
    """The weights to import: their name, family, config.json, and tokenizer if there is one."""

    name: str
    family: str
    fields: ConfigJson
    tokenizer: Tokenizer | None
    template: dict[str, Any] | None = None  # how prompts are written
    end_ids: tuple[int, ...] = ()  # ids that end a text

    def special_id(self, key: str) -> int | None:
        """Return the tokenizer's special id, or else config.json's, or else the family's."""
        value = getattr(self.tokenizer, f"{key}_id", None)
        if value is None:
            value = special_id(self.fields, key)
        return FAMILIES[self.family].ids.get(key) if value is None else value


def imported_sidecar(source: Source, cfg: ModelConfig, mask_id: int | None, suppress_mask: bool | None) -> Sidecar:
    """Return the sidecar of an imported model.

    Args:
      source: what is imported.
      cfg: its network.
      mask_id: its mask id; None where it is autoregressive.
      suppress_mask: True to never predict a mask id from the vocabulary; None: as the source or its family says.

    Raises:
      UserError: a special id or a length is out of range, or `suppress_mask` is given for an autoregressive model.
    """
    native = NativeFields.read(source.fields) or _family_defaults(source, cfg)
    _require_in_range(source, native, cfg)
    if suppress_mask is not None and cfg.causal:
        raise UserError(f"suppress_mask={suppress_mask} is for masked diffusion models, and this one is autoregressive")
    suppress = native.diffusion.suppress_mask if suppress_mask is None else suppress_mask
    diffusion = dataclasses.replace(
        native.diffusion,
        mask_id=None if cfg.mask_row else mask_id,
        alignment="same" if cfg.causal else native.alignment,
        suppress_mask=suppress,
    )
    eos_id, pad_id = source.special_id("eos"), source.special_id("pad")
    return Sidecar(
        objective="arm" if cfg.causal else "mdm",
        model=config_io.to_dict(cfg),
        diffusion=config_io.to_dict(diffusion),
        mask_id=mask_id,
        pad_id=eos_id if pad_id is None else pad_id,
        eos_id=eos_id,
        bos_id=native.bos_id,
        suppressed_ids=(mask_id,) if suppress and mask_id is not None and mask_id < cfg.vocab_size else (),
        alignment=native.alignment,
        tokenizer=source.tokenizer.to_dict() if source.tokenizer else None,
        canvas={"max_length": native.max_length, "start_id": native.start_id},
        source={"experiment": source.name, "step": 0, "family": source.family},
        template=native.template,
        end_ids=tuple(i for i in native.end_ids if i != eos_id),
    )


def native_fields(format: str, sidecar: Sidecar, cfg: ModelConfig) -> NativeFields:
    """Return what an export must keep of a sidecar besides the standard fields of config.json."""
    return NativeFields(
        family=format,
        objective="arm" if sidecar.objective == "arm" else "mdm",
        alignment="shifted" if sidecar.alignment == "shifted" else "same",
        diffusion=config_io.from_dict(DiffusionConfig, sidecar.diffusion),
        mask_row=cfg.mask_row,
        rope_bf16_tables=cfg.rope_bf16_tables,
        bos_id=sidecar.bos_id,
        start_id=sidecar.start_id,
        max_length=sidecar.canvas.get("max_length", cfg.max_length),
        template=sidecar.template,
        end_ids=list(sidecar.end_ids),
    )


def _family_defaults(source: Source, cfg: ModelConfig) -> NativeFields:
    """Return what a family implies where config.json has no fields of ours."""
    family, bos_id = FAMILIES[source.family], source.special_id("bos")
    return NativeFields(
        family=source.family,
        objective="arm" if cfg.causal else "mdm",
        alignment="shifted" if family.shifted or cfg.causal else "same",
        diffusion=DiffusionConfig() if cfg.causal else DiffusionConfig(suppress_mask=family.suppress_mask),
        mask_row=cfg.mask_row,
        rope_bf16_tables=cfg.rope_bf16_tables,
        bos_id=bos_id,
        start_id=bos_id,
        max_length=cfg.max_length,
        template=source.template,
        end_ids=list(source.end_ids),
    )


def _require_in_range(source: Source, native: NativeFields, cfg: ModelConfig) -> None:
    if not 1 <= native.max_length <= cfg.max_length:
        raise UserError(
            f"config.json has {NATIVE_KEY}.max_length={native.max_length}, which must lie in [1, {cfg.max_length}], "
            "the model's positions; export the model again"
        )
    ids = {
        "bos_token_id": native.bos_id,
        "eos_token_id": source.special_id("eos"),
        "pad_token_id": source.special_id("pad"),
        f"{NATIVE_KEY}.start_id": native.start_id,
    }
    ids |= {f"{NATIVE_KEY}.end_ids[{i}]": value for i, value in enumerate(native.end_ids)}
    for name, i in ids.items():
        if i is not None and not 0 <= i < cfg.embedding_rows:
            raise UserError(
                f"{name}={i} must lie in [0, {cfg.embedding_rows}), the model's input rows; restore config.json"
            )
