"""The numbers of a run that are read again, by the run itself and by sweeps: DONE.json and lines of metrics.jsonl."""

from collections.abc import Iterable
from typing import Any

import msgspec
from etils import epath

from diffusionlm import schema, untrusted
from diffusionlm.schema import Count
from diffusionlm.storage import load_numbers

FILE = "DONE.json"

Number = float | None  # null stands for a number that is not finite


class Evaluation(msgspec.Struct, frozen=True):
    """The bound on held-out records; files of before lack the counts of what was scored.

    Runs with `diffusion.arm_steps` also have the exact loss of next-token prediction.
    """

    nelbo_nats_per_token: Number
    nelbo_stderr: schema.NonNegative | None
    bits_per_byte: Number
    nelbo_per_draw: list[Number]
    tokens: Count | None = None
    bytes: Count | None = None
    autoregressive_nats_per_token: Number = None


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that are read of it; a later version may write more, which say nothing about these."""

    step: Count
    tokens: Count
    flops: schema.NonNegative
    train_loss: Number
    eval: Evaluation
    seconds: schema.NonNegative
    goodput: Number
    seconds_by_kind: dict[str, schema.NonNegative] = {}


class MetricsLine(msgspec.Struct, frozen=True):
    """The fields of a line of metrics.jsonl that are read again."""

    step: Count
    loss: Number = None
    step_seconds: schema.NonNegative | None = None
    eval_autoregressive_nats_per_token: Number = None
    eval_autoregressive_bits_per_byte: Number = None


def parse(text: str | bytes, path: epath.PathLike) -> dict[str, Any]:
    """Return the content of a DONE.json, with NaN for null.

    Args:
      text: the content of the file.
      path: the file; messages begin with it.

    Raises:
      UserError: it is damaged.
    """
    schema.decode(text, Outcome, path)
    return load_numbers(text if isinstance(text, str) else text.decode())


def read(path: epath.PathLike) -> dict[str, Any]:
    """Return the content of a DONE.json, with NaN for null.

    Raises:
      UserError: it is damaged.
      OSError: it cannot be read.
    """
    return parse(untrusted.read_bytes(path), path)


def autoregressive_part(lines: Iterable[dict[str, Any]]) -> dict[str, float] | None:
    """Return the exact figures of a run when its autoregressive part ended; None if they were not measured.

    Args:
      lines: those of metrics.jsonl.

    Returns:
      "step", "nats_per_token" and "bits_per_byte".
    """
    prefix = "eval_autoregressive_"
    exact = prefix + "nats_per_token"
    # In that part the bound is the exact loss. The step would not do: a run that was rolled back may be late.
    measured = [line for line in lines if exact in line and line["eval_nelbo_nats_per_token"] == line[exact]]
    if not measured:
        return None
    last = measured[-1]
    return {"step": last["step"], **{name: last[prefix + name] for name in ("nats_per_token", "bits_per_byte")}}
