"""Generate answers to prompts as records of a session; tasks of generation share this."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusionlm.data.chat_templates import Message
from diffusionlm.errors import UserError
from diffusionlm.evaluation.results import Metric, Result
from diffusionlm.evaluation.session import Record, Session
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.canvas import CANVAS_MULTIPLE
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import generate
from diffusionlm.scalars import whole


@dataclass(frozen=True)
class Prompt:
    """Hold a prompt that is to be answered.

    Attributes:
      ids: its tokens, with any start token and template.
      item: what identifies it and its grading when records are taken up, in JSON types.
      row_id: the number that keys its noise.
    """

    ids: list[int]
    item: Any
    row_id: int


def encode_prompt(model: LoadedModel, text: str, raw: bool) -> list[int]:
    """Return the ids of a prompt: in the model's chat template, or as a text to go on with if it has none or `raw`."""
    model.require_tokenizer()
    if model.template is None or raw:
        return model.encode(text)
    return model.encode_messages([Message("user", text)])


def fitting(model: LoadedModel, prompts: Sequence[Prompt], length: int) -> tuple[list[int], dict[str, Metric]]:
    """Return the indices of the prompts after which `length` tokens fit, and the count of the others as a metric.

    Raises:
      UserError: none does.
    """
    indices = [i for i, prompt in enumerate(prompts) if len(prompt.ids) + length <= model.config.max_length]
    if not indices:
        raise too_long(model, min(len(prompt.ids) for prompt in prompts), length)
    return indices, {"too_long": Metric(len(prompts) - len(indices))}


def too_long(model: LoadedModel, shortest: int, length: int) -> UserError:
    """Return the error that `length` tokens fit after no prompt, of which the shortest has so many."""
    room = model.config.max_length - shortest
    fix = f"use --length {room} or less" if room > 0 else "no prompt fits with any length"
    return UserError(
        f"length={length} after the shortest prompt, of {shortest} tokens, exceeds the model's context of "
        f"{model.config.max_length}; {fix}"
    )


def answer(
    session: Session,
    title: str,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    batch_size: int,
    grade: Callable[[int, str], Record] = lambda i, text: {},
    again: Callable[[Record], bool] | None = None,
) -> list[Record]:
    """Return a record of each prompt's answer: {"answer": its text, "forwards": passes} and what `grade` gives.

    An answer is generated in a canvas of its own size and a batch that is filled up to `batch_size`, so that it depends
    neither on the prompts beside it nor on where an evaluation was interrupted.

    Args:
      session: the model, and the records.
      title: what is done, for the progress.
      prompts: the prompts, each of which fits (see `fitting`).
      sampling: the settings.
      batch_size: prompts at a time.
      grade: gives the scores of the answer to the prompt with that index, in JSON types.
      again: says of a record in the file that its answer is to be graded once more; None: of none.

    Raises:
      UserError: any of `diffusionlm.sampling.generate.generate`.
    """
    model, batch_size = session.model, whole("batch_size", batch_size, 1)
    sampling = model.sampling_config(sampling)
    rows = min(batch_size, len(prompts))

    def compute(batch: list[int]) -> list[Record]:
        records = dict[int, Record]()
        for members in _by_canvas(prompts, batch, sampling.length):
            filled = members + members[-1:] * (rows - len(members))
            with model.on_mesh():
                result = generate(
                    model.params,
                    model.config,
                    [prompts[i].ids for i in filled],
                    sampling,
                    row_ids=[prompts[i].row_id for i in filled],
                )
            for i, tokens, nfe in zip(members, result.tokens.tolist(), result.nfe.tolist(), strict=False):
                text = model.decode_after(prompts[i].ids, tokens)
                records[i] = {"answer": text, "forwards": nfe} | grade(i, text)
        return [records[i] for i in batch]

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))  # prompts of similar lengths share a batch

    def renew(i: int, record: Record) -> Record | None:
        return record | grade(i, record["answer"]) if again is not None and again(record) else None

    return session.evaluate(title, [prompt.item for prompt in prompts], compute, batch_size, order, renew)


def result(
    model: LoadedModel,
    metrics: dict[str, Metric],
    records: Sequence[Record],
    config: dict[str, Any],
    sampling: SamplingConfig,
    shown: Sequence[dict[str, Any]],
) -> Result:
    """Return the result of a task.

    Args:
      model: the model.
      metrics: the figures.
      records: the records of all answers.
      config: the options of the task; the settings of the generation are added, with all defaults filled in.
      sampling: those settings.
      shown: the examples; none: none were asked for.
    """
    config = config | dataclasses.asdict(model.sampling_config(sampling))
    return Result(metrics, config, list(shown) or None, forwards=sum(record["forwards"] for record in records))


def _by_canvas(prompts: Sequence[Prompt], batch: Sequence[int], length: int) -> list[list[int]]:
    """Group the prompts of a batch by the size of the canvas that each needs."""
    groups: dict[int, list[int]] = {}
    for i in batch:
        groups.setdefault(-(-(len(prompts[i].ids) + length) // CANVAS_MULTIPLE), []).append(i)
    return list(groups.values())
