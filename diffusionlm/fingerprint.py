"""The fingerprint of a run: a hash of the fields that decide its science, and of no path, mesh or logging."""

import hashlib
import json
from typing import Any

from diffusionlm import config_mixture
from diffusionlm.config import Config
from diffusionlm.config_fields import later_defaults
from diffusionlm.config_io import flat


def scientific_fields(config: Any) -> dict[str, Any]:
    """Return dotted name -> value of every field that is part of a run's scientific identity.

    The path of a tokenizer that a checkpoint or a released model brings is not part of it: the dataset knows which
    tokenizer that is. Nor are the places of the datasets of a mixture, whose checkpoints know what these hold.
    """
    values = flat(config, operational=False)
    if "data.mixture" in values:
        values["data.mixture"] = config_mixture.canonical(values["data.mixture"])
    tokenizer = values.get("data.tokenizer")
    if tokenizer and tokenizer not in ("byte", "sentencepiece") and not tokenizer.endswith(".model"):
        values["data.tokenizer"] = "a checkpoint's"
    return values


def fingerprint(config: Config) -> str:
    """Return twelve hex digits that identify the science of a run, whatever its paths, mesh and logging."""
    later = later_defaults(type(config))
    fields = {
        name: value
        for name, value in scientific_fields(config).items()
        if name not in later or value != later[name]  # runs of before have the fingerprint that they had
    }
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
