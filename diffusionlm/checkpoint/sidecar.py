"""The sidecar of a checkpoint: plain JSON beside the parameters that says what they mean."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from diffusionlm import config_io
from diffusionlm.config import DiffusionConfig, ModelConfig
from diffusionlm.errors import UserError, suggest

FORMAT, VERSION = "diffusionlm", 2  # version 1 has no chat templates, and is read as one without


@dataclass(frozen=True)
class Sidecar:
    """The information that a reader needs beside the parameters."""

    objective: str  # mdm | arm
    model: dict[str, Any]  # ModelConfig as a dict
    diffusion: dict[str, Any]  # DiffusionConfig as a dict
    mask_id: int | None
    pad_id: int | None = None
    eos_id: int | None = None
    bos_id: int | None = None
    suppressed_ids: tuple[int, ...] = ()  # in-vocabulary ids that are never predicted
    alignment: str = "same"  # same: position i predicts token i; shifted: token i + 1
    tokenizer: dict[str, Any] | None = None  # the embedded tokenizer with its sha256
    canvas: dict[str, Any] = field(default_factory=dict)  # rules for the sampler's canvas: max_length, start_id
    source: dict[str, Any] = field(default_factory=dict)  # for people: experiment, fingerprint, dataset, step, ...
    template: dict[str, Any] | None = None  # how prompts are written: `Template.to_dict`; None: unchanged

    @property
    def start_id(self) -> int | None:
        """The token that a text begins with, as documents did in training; EOS, which ends the one before, if unset."""
        return self.canvas.get("start_id", self.eos_id)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON types, with the format and its version."""
        values = dataclasses.asdict(self) | {"suppressed_ids": list(self.suppressed_ids)}
        return {"format": FORMAT, "version": VERSION, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Sidecar":
        """Rebuild a sidecar from its `to_dict`.

        The tokenizer and the template are kept as data; whoever uses them checks them.

        Raises:
          UserError: another format, a newer version, or a field that this version cannot interpret.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT or not isinstance(values.get("version"), int):
            raise UserError(f"its sidecar is not of format {FORMAT!r}")
        if (version := values["version"]) > VERSION:
            raise UserError(f"written by a newer diffusionlm (version {version}); this one reads {VERSION}: upgrade")
        values = {name: value for name, value in values.items() if name not in ("format", "version")}
        fields = [f.name for f in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(fields)):
            raise UserError(f"its sidecar has an unknown field {unknown[0]!r}{suggest(unknown[0], fields)}")
        if missing := [name for name in ("objective", "model", "diffusion", "mask_id") if name not in values]:
            raise UserError(f"its sidecar lacks the field {missing[0]!r}")
        for name, allowed in (("objective", ("mdm", "arm")), ("alignment", ("same", "shifted"))):
            if (value := values.get(name, allowed[0])) not in allowed:
                raise UserError(f"its sidecar has {name}={value!r}; this version knows {', '.join(allowed)}")
        if values["mask_id"] is None and values["objective"] == "mdm":
            raise UserError("its sidecar has objective='mdm' and no mask_id")
        # Unknown settings inside would change what the parameters mean, so they are refused here and not at first use.
        config_io.from_dict(ModelConfig, values["model"])
        config_io.from_dict(DiffusionConfig, values["diffusion"])
        return cls(**{**values, "suppressed_ids": tuple(values.get("suppressed_ids", ()))})
