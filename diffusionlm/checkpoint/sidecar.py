"""The sidecar of a checkpoint: plain JSON beside the parameters that says what they mean."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from etils import epath

from diffusionlm import config_io, schema, untrusted
from diffusionlm.config import DiffusionConfig, ModelConfig
from diffusionlm.errors import UserError

FORMAT, VERSION = "diffusionlm", 3
FILE = "sidecar/data.json"  # of a checkpoint
ADDED = {
    "template": 2,
    "end_ids": 3,
}  # fields that came after version 1, by the version that brought them; absent, they are unset
# The settings that every version wrote. Those that came later are absent in files of before, and have their defaults.
_MODEL = (
    "d_model n_layers n_heads n_kv_heads head_dim d_ff vocab_size mask_row max_length causal norm norm_eps positions "
    "rope_theta rope_bf16_tables mlp linear_bias qkv_bias tied_head dtype"
).split()
_DIFFUSION = (
    "schedule polynomial_power geometric_min geometric_max t_min timesteps time_sampling mask_sampling random_length "
    "normalization mask_id suppress_mask"
).split()

_Settings = TypeVar("_Settings", ModelConfig, DiffusionConfig)
_Id = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class NewerVersion(UserError):
    """A sidecar is of a version that this program does not know."""


class _Canvas(schema.Record, frozen=True):
    # Absent, they are the model's positions and EOS.
    max_length: schema.Positive | msgspec.UnsetType = msgspec.UNSET
    start_id: _Id | None | msgspec.UnsetType = msgspec.UNSET


class _Fields(schema.Record, frozen=True):
    """The JSON of a sidecar, but for its format and version."""

    objective: Literal["mdm", "arm"]
    model: dict[str, Any]
    diffusion: dict[str, Any]
    mask_id: _Id | None
    pad_id: _Id | None
    eos_id: _Id | None
    bos_id: _Id | None
    suppressed_ids: list[_Id]
    alignment: Literal["same", "shifted"]
    tokenizer: dict[str, Any] | None
    canvas: dict[str, Any]  # a `_Canvas`
    source: dict[str, str | int | float | bool | None]
    template: dict[str, Any] | None = None
    end_ids: list[_Id] = []


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
    end_ids: tuple[int, ...] = ()  # ids besides EOS that end a text, such as the end of a turn

    @property
    def start_id(self) -> int | None:
        """The token that a text begins with, as documents did in training; EOS, which ends the one before, if unset."""
        return self.canvas.get("start_id", self.eos_id)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in JSON types, with the format and its version."""
        values = dataclasses.asdict(self)
        values |= {"suppressed_ids": list(self.suppressed_ids), "end_ids": list(self.end_ids)}
        return {"format": FORMAT, "version": VERSION, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Sidecar":
        """Rebuild a sidecar from its `to_dict`.

        The tokenizer and the template are kept as data; whoever uses them checks them.

        Raises:
          UserError: another format, a newer version, a field that this version cannot interpret, an id that the model
            has no row for, or fields that contradict one another.
        """
        version = values.get("version") if isinstance(values, dict) else None
        if version is None or values.get("format") != FORMAT or type(version) is not int or version < 1:
            raise UserError(f"it is not of format {FORMAT!r}")
        if version > VERSION:
            raise NewerVersion(
                f"it was written by a newer diffusionlm (version {version}), and this one reads up to {VERSION}; "
                "upgrade diffusionlm"
            )
        values = {name: value for name, value in values.items() if name not in ("format", "version")}
        if missing := [name for name, since in ADDED.items() if since <= version and name not in values]:
            raise UserError(f"it lacks the field {missing[0]!r}")
        if early := [name for name, since in ADDED.items() if since > version and name in values]:
            raise UserError(f"it has the field {early[0]!r}, which version {version} has not")
        fields = schema.convert(values, _Fields, "it")
        schema.convert(fields.canvas, _Canvas, "it: canvas")
        model = _settings(ModelConfig, "model", fields.model, _MODEL)
        diffusion = _settings(DiffusionConfig, "diffusion", fields.diffusion, _DIFFUSION)
        _require_consistent(fields, model, diffusion)
        _require_ids(fields, model, diffusion)
        tuples = {"suppressed_ids": tuple(fields.suppressed_ids), "end_ids": tuple(fields.end_ids)}
        return cls(**{**values, **tuples})


def read(path: epath.Path) -> Sidecar:
    """Return the sidecar in a file.

    Raises:
      UserError: it cannot be read, is not JSON, or `Sidecar.from_dict` refuses it; the message says what the file is.
    """
    try:
        return Sidecar.from_dict(schema.read_json(path, dict[str, Any]))
    except NewerVersion as error:
        raise UserError(f"cannot read {path}: {error}") from error
    except UserError as error:
        reason = str(error).replace(untrusted.printable(path), "it", 1).removeprefix("it: ")
        raise UserError(
            f"{path}, which says what the parameters of the checkpoint mean, is damaged ({reason}); use another "
            "checkpoint, or a copy"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _settings(cls: type[_Settings], name: str, values: dict[str, Any], required: Sequence[str]) -> _Settings:
    """Return nested settings; unknown ones would change what the parameters mean, so they are refused here."""
    settings = config_io.from_dict(cls, values)
    settings.validate()
    missing = [field_name for field_name in required if field_name not in values]
    for field_ in dataclasses.fields(settings):  # a group came whole, or not at all
        group = getattr(settings, field_.name)
        if dataclasses.is_dataclass(group) and field_.name in values:
            names = [inner.name for inner in dataclasses.fields(group)]
            missing += [f"{field_.name}.{inner}" for inner in names if inner not in values[field_.name]]
    if missing:
        raise UserError(f"it lacks the field '{name}.{missing[0]}'")
    return settings


def _require_consistent(fields: _Fields, model: ModelConfig, diffusion: DiffusionConfig) -> None:
    objective, causal = fields.objective, model.causal  # an autoregressive model predicts shifted, whatever is said
    if causal != (objective == "arm"):
        raise UserError(f"it has objective={objective!r} and model.causal={causal}, which contradict")
    if objective == "mdm" and fields.diffusion.get("alignment", fields.alignment) != fields.alignment:
        raise UserError(
            f"it has alignment={fields.alignment!r} and diffusion.alignment={diffusion.alignment!r}, which contradict"
        )
    if (length := fields.canvas.get("max_length", 1)) > model.max_length:
        raise UserError(
            f"it has canvas.max_length={length}, which must lie in [1, {model.max_length}], the model's positions"
        )
    if fields.tokenizer is not None:
        for name in ("kind", "sha256"):
            if not isinstance(value := fields.tokenizer.get(name), str):
                raise UserError(f"it has tokenizer.{name}={untrusted.printable(repr(value))}, no text")


def _require_ids(fields: _Fields, model: ModelConfig, diffusion: DiffusionConfig) -> None:
    """Refuse ids without a row, and a mask that is not the one of the model's settings."""
    if diffusion.mask_id is not None and (model.mask_row or not 0 <= diffusion.mask_id < model.vocab_size):
        raise UserError(
            f"it has diffusion.mask_id={diffusion.mask_id}, which must lie in [0, {model.vocab_size}) and "
            f"needs model.mask_row=False, not {model.mask_row}"
        )
    appended = model.vocab_size if model.mask_row else None
    mask_id = appended if diffusion.mask_id is None else diffusion.mask_id
    if fields.mask_id != mask_id and (fields.objective == "mdm" or fields.mask_id is not None):
        raise UserError(f"it has mask_id={fields.mask_id}, and its model and diffusion settings {mask_id}")
    if fields.objective == "mdm" and mask_id is None:
        raise UserError("it has objective='mdm' and no mask_id")
    ids: dict[str, Any] = {"pad_id": fields.pad_id, "eos_id": fields.eos_id, "bos_id": fields.bos_id}
    ids["canvas.start_id"] = fields.canvas.get("start_id")
    ids["template.start_id"] = (fields.template or {}).get("start_id")
    ids |= {f"suppressed_ids[{i}]": value for i, value in enumerate(fields.suppressed_ids)}
    ids |= {f"end_ids[{i}]": value for i, value in enumerate(fields.end_ids)}
    for name, value in ids.items():
        rows = model.vocab_size if name.startswith("suppressed") else model.embedding_rows
        if isinstance(value, int) and not 0 <= value < rows:
            raise UserError(f"it has {name}={value}, which must lie in [0, {rows}), the model's rows")
    suppressed = fields.suppressed_ids
    if len(set(suppressed)) < len(suppressed):
        raise UserError(f"it has suppressed_ids={suppressed}, in which an id comes twice")
    expected = diffusion.suppress_mask and mask_id is not None and mask_id < model.vocab_size
    if fields.objective == "mdm" and (mask_id in suppressed) != expected:
        raise UserError(
            f"it has suppressed_ids={suppressed}, which contradict diffusion.suppress_mask="
            f"{diffusion.suppress_mask} and mask_id={mask_id}"
        )
