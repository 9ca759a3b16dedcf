"""The model arguments of the harness, checked: likelihood settings, sampling settings, and a few of their own."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffusionlm.errors import UserError, suggest
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.scalars import is_whole

LIKELIHOOD = {field.name for field in dataclasses.fields(LikelihoodConfig)}
SAMPLING = {field.name for field in dataclasses.fields(SamplingConfig)}
OWN = ("dtype", "devices", "batch_size", "greedy", "scoring", "sequential")
DEVICES = (None, "cuda:0")  # of the harness: nothing was asked for; the second is its own default
BATCH_SIZE = 16
MAX_GEN_TOKS = 256  # the harness' default


@dataclass(frozen=True)
class ModelOptions:
    """The settings that the model arguments ask for.

    Attributes:
      likelihood: the settings of log-likelihoods.
      sampling: the settings of generations, which the arguments of a task replace.
      given: the fields of `sampling` that were given.
      dtype: of the parameters and the computation; None: what the model computes in.
      devices: how many devices the rows of a batch are split over.
      batch_size: prompts that are answered at a time.
      greedy: when greedy decoding is compared with a continuation: where a document has a single one ("auto"), always,
        or never.
      scoring: what stands for a log-likelihood: its estimate, or the confidence of one forward pass.
      sequential: stop the passes of a document's choices once the best one is clear.
    """

    likelihood: LikelihoodConfig = LikelihoodConfig()
    sampling: SamplingConfig = SamplingConfig()
    given: frozenset[str] = frozenset()
    dtype: str | None = None
    devices: int = 1
    batch_size: int = BATCH_SIZE
    greedy: Literal["auto", "always", "never"] = "auto"
    scoring: Literal["likelihood", "confidence"] = "likelihood"
    sequential: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return all settings in JSON types, those of sampling as far as they were given."""
        values = {name: getattr(self, name) for name in OWN}
        sampling = {name: getattr(self.sampling, name) for name in sorted(self.given)}
        return values | {"likelihood": dataclasses.asdict(self.likelihood), "sampling": sampling}


def parse(arguments: Mapping[str, Any]) -> ModelOptions:
    """Return checked options.

    Fields of `LikelihoodConfig` and `SamplingConfig` go by their names. Where both have one, `guidance` and `seed`, it
    sets both; `likelihood.guidance` and `sampling.guidance` set one of them.

    Args:
      arguments: the model arguments but for `pretrained`, with the values that the harness reads from its command line.

    Raises:
      UserError: an unknown argument, or a value that has no meaning.
    """
    likelihood, sampling, own = {}, {}, {}
    for name, value in arguments.items():
        group, _, field = name.rpartition(".")
        places = [("likelihood", LIKELIHOOD, likelihood), ("sampling", SAMPLING, sampling)]
        if name in OWN:
            own[name] = value
            continue
        chosen = [values for title, known, values in places if field in known and group in ("", title)]
        if not chosen:
            raise UserError(
                f"unknown model argument {name!r}{suggest(name, {'pretrained', *OWN, *LIKELIHOOD, *SAMPLING})}"
            )
        for values in chosen:
            values[field] = value
    own["batch_size"] = _batch_size(own.get("batch_size"))
    options = ModelOptions(LikelihoodConfig(**likelihood), SamplingConfig(**sampling), frozenset(sampling), **own)
    options.likelihood.validate()
    options.sampling.validate()
    _check_own(options)
    return options


def _batch_size(value: Any) -> int:
    """Return the number of prompts at a time; the harness hands on a text such as "8" or "auto"."""
    if value is None:
        return BATCH_SIZE
    size = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not is_whole(size) or size < 1:
        raise UserError(f"batch_size={value} must be an integer of at least 1; there is no automatic batch size")
    return size


def _check_own(options: ModelOptions) -> None:
    for name, allowed in (("greedy", ("auto", "always", "never")), ("scoring", ("likelihood", "confidence"))):
        if (value := getattr(options, name)) not in allowed:
            raise UserError(f"{name}={value!r} must be one of {', '.join(allowed)}")
    if not isinstance(options.sequential, bool):
        raise UserError(f"sequential={options.sequential!r} must be True or False")
    if not is_whole(options.devices) or options.devices < 1:
        raise UserError(f"devices={options.devices!r} must be an integer of at least 1")
    if options.sequential and options.likelihood.stop_at_stderr:
        raise UserError("sequential stops at clear decisions, and stop_at_stderr at small errors; give one of them")
    if options.sequential and options.scoring == "confidence":
        raise UserError("sequential needs scoring=likelihood: confidences have no passes to stop")


def refuse_foreign(device: Any, max_batch_size: Any, backend: str) -> None:
    """Raise `UserError` for arguments of the harness that mean nothing here.

    Args:
      device: the harness' `--device`.
      max_batch_size: the harness' `--max_batch_size`.
      backend: the platform that JAX runs on.
    """
    if device not in (*DEVICES, backend):
        raise UserError(
            f"device={device} cannot be chosen here: JAX runs on {backend}; leave it out, and set JAX_PLATFORMS"
        )
    if max_batch_size is not None:
        raise UserError(f"max_batch_size={max_batch_size} has no use: there is no automatic batch size; leave it out")


def parse_text(text: str) -> dict[str, Any]:
    """Return the arguments of a text such as "draws=16,guidance=0.5", with numbers and truth values as such.

    Raises:
      UserError: a part is not of the form name=value, or a name comes twice.
    """
    values: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise UserError(f"cannot read {part!r} in {text!r}; write name=value, with commas between")
        if name in values:
            raise UserError(f"{name} comes twice in {text!r}; give it once")
        values[name] = _value(value)
    return values


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def sampling_of(options: ModelOptions, gen_kwargs: Mapping[str, Any]) -> tuple[SamplingConfig, list[str]]:
    """Return the settings of a generation, and the texts that end it.

    Args:
      options: the model's.
      gen_kwargs: the task's, which replace those of the model: `until`, `max_gen_toks`, `do_sample`, `temperature`, and
        any field of `SamplingConfig`. As in the harness, without `do_sample=True` or a temperature the most probable
        tokens are taken.

    Raises:
      UserError: an unknown argument, or a value that has no meaning.
    """
    arguments = dict(gen_kwargs)
    until = arguments.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list) or not all(isinstance(text, str) for text in until):
        raise UserError(f"until={until!r} must be a text, or a list of texts")
    lengths = {name: arguments.pop(name) for name in ("max_gen_toks", "max_new_tokens") if name in arguments}
    if len(set(lengths.values())) > 1:
        raise UserError(f"max_gen_toks and max_new_tokens name two lengths, {lengths}; give one")
    do_sample = arguments.pop("do_sample", None)
    if do_sample not in (None, True, False):
        raise UserError(f"do_sample={do_sample!r} must be True or False")
    if unknown := sorted(set(arguments) - SAMPLING):
        known = {"until", "max_gen_toks", "do_sample", *SAMPLING}
        raise UserError(f"unknown generation argument {unknown[0]!r}{suggest(unknown[0], known)}")
    if do_sample is False:
        arguments["temperature"] = 0.0
    elif do_sample is None and "temperature" not in options.given:
        arguments.setdefault("temperature", 0.0)
    default = options.sampling.length if "length" in options.given else MAX_GEN_TOKS
    arguments.setdefault("length", next(iter(lengths.values()), default))
    sampling = dataclasses.replace(options.sampling, **arguments)
    sampling.validate()
    return sampling, [text for text in until if text]
