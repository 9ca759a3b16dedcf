"""The task `temporal_shift`: what texts cost, by the time that they are from."""

import dataclasses
import math
from typing import Annotated

import numpy as np

from diffusionlm.data.items import checked_text, lacks_field
from diffusionlm.data.text_files import Files, expand
from diffusionlm.errors import UserError
from diffusionlm.evaluation.diversity import ratio
from diffusionlm.evaluation.perplexity import score_documents
from diffusionlm.evaluation.records import record_of
from diffusionlm.evaluation.results import Metric, Result
from diffusionlm.evaluation.session import Record, Session
from diffusionlm.evaluation.texts import checked_limit
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.monte_carlo import Estimate
from diffusionlm.likelihood.perplexity import Perplexity
from diffusionlm.options import SETTINGS
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.scalars import is_whole, native, whole

MOST_BINS = 100


@dataclasses.dataclass
class Documents:
    """Documents in their order: what identifies each, its tokens, the bytes that are scored, and its bin."""

    items: list[list]
    tokens: list[list[int]]
    n_bytes: list[int]
    bins: list[str]


def temporal_shift(
    session: Session,
    *,
    data: str,
    field: str = "text",
    by: str = "year",
    width: int | None = None,
    first_tokens: int | None = None,
    limit: int | None = None,
    stride: int | None = None,
    settings: Annotated[LikelihoodConfig, *SETTINGS] = LikelihoodConfig(),  # noqa: B008
) -> Result:
    """Score texts, such as books of several years, in bins of a field of their records.

    SMDM compares the perplexities of newer and older text (arXiv 2410.18514). The metrics are, for each bin and for all
    documents, nats_per_token, perplexity and bits_per_byte, and the counts documents and tokens. Standard errors are
    those of choosing other documents of the same bin, with the noise of the estimates in them: documents differ more
    than an estimate is off; they are unknown for a bin of one document.

    Args:
      session: the model to evaluate.
      data: a .jsonl file whose lines have the text and the field to sort by.
      field: the field of a line's object that holds the text.
      by: the field that holds the year, or anything else to sort by.
      width: the width of a bin, for a field of integers; None: each value is a bin.
      first_tokens: the tokens of a document that are scored, from its start; None: all.
      limit: the number of documents to score, the first ones; None: all.
      stride: tokens that a window scores at a time in documents longer than the context; None: half the context.
      settings: the settings of the likelihoods.

    Raises:
      UserError: any of `LoadedModel.perplexity`, no such file, a malformed line, a line without one of the fields, or
        more than 100 bins.
    """
    limit, stride = checked_limit(limit), native(stride)
    width = None if width is None else whole("width", width, 1)
    first_tokens = None if first_tokens is None else whole("first_tokens", first_tokens, 1)
    settings.validate()
    documents = _read(session.model, data, (field, by), width, first_tokens, limit)
    records = score_documents(session, documents.items, documents.tokens, settings, stride)
    metrics = dict[str, Metric]()
    for name in [*sorted(set(documents.bins), key=_order), None]:
        members = [d for d, other in enumerate(documents.bins) if name in (other, None)]
        figures = _figures([records[d] for d in members], [documents.n_bytes[d] for d in members])
        metrics |= {f"{name} {key}" if name else key: metric for key, metric in figures.items()}
    config = {"data": data, "field": field, "by": by, "width": width, "first_tokens": first_tokens, "limit": limit}
    config |= {"stride": stride} | dataclasses.asdict(settings)
    return Result(metrics, config, forwards=sum(record["forwards"] for record in records))


def _read(
    model: LoadedModel,
    data: str,
    fields: tuple[str, str],
    width: int | None,
    first_tokens: int | None,
    limit: int | None,
) -> Documents:
    """Return the documents that are not empty."""
    sizes, documents = model.token_bytes, Documents([], [], [], [])
    for item in Files(expand(data, dialogues=False)):
        if len(documents.items) == limit:
            break
        record = record_of(item) if item.is_json else {}
        if record is None:
            continue
        for name, option in zip(fields, ("field", "by"), strict=True):
            if name not in record:
                raise UserError(f"{item.location}: {lacks_field(name, record)}; choose another with --{option} NAME")
        try:
            text = checked_text(f"field {fields[0]!r}", record[fields[0]])
            label = _bin(fields[1], record[fields[1]], width)
        except ValueError as error:
            raise UserError(f"{item.location}: {error}") from error
        (ids,), (n_bytes,) = model.encode_documents([text])
        end = None if first_tokens is None else 1 + first_tokens
        if len(ids[:end]) < 2:
            continue
        documents.items.append([text, label])
        documents.tokens.append(ids[:end])
        # Only the tokens say how many bytes a part of the text has. A space that the tokenizer adds is in the first one
        # with text.
        if end is not None and end < len(ids):
            n_bytes = int(np.sum(sizes[ids[1:end]])) - (0 if sizes[ids[0]] else model.added_bytes(text))
        documents.n_bytes.append(n_bytes)
        documents.bins.append(label)
    if not documents.items:
        raise UserError(f"data={data!r} holds no text; there is nothing to score")
    if len(names := set(documents.bins)) > MOST_BINS:
        raise UserError(f"{len(names)} values of {fields[1]!r} make more than {MOST_BINS} bins; give a larger --width")
    return documents


def _bin(field: str, value: object, width: int | None) -> str:
    """Return the name of the bin of a field's value; `ValueError` if it has none."""
    if not is_whole(value) and not (isinstance(value, str) and value.strip()):
        raise ValueError(f"field {field!r}: {value!r} is neither an integer nor a text")
    if width is None:
        return str(value)
    try:
        first = int(value) // width * width
    except ValueError as error:
        raise ValueError(
            f"field {field!r}: {value!r} is no integer, which bins of width={width} need; "
            "leave out --width for one bin per value"
        ) from error
    return f"{first}-{first + width - 1}" if width > 1 else str(first)


def _order(name: str) -> tuple[float, str]:
    """Return what sorts bins: by the number that a name begins with."""
    digits = name.lstrip("-").partition("-")[0]
    return (int(digits) * (-1 if name.startswith("-") else 1) if digits.isdecimal() else math.inf), name


def _figures(records: list[Record], n_bytes: list[int]) -> dict[str, Metric]:
    """Return the figures of some documents together."""
    estimates = [Estimate(-record["nats"], record["stderr"], 1, record["forwards"]) for record in records]
    scores = Perplexity(estimates, [record["tokens"] for record in records], n_bytes)
    n = sum(scores.tokens)
    stderr = None if math.isnan(scores.stderr) else scores.stderr / n
    figures = {
        "nats_per_token": Metric(scores.nats_per_token, stderr),
        "perplexity": Metric(scores.perplexity, None if stderr is None else scores.perplexity * stderr),
    }
    if sum(n_bytes):
        bits = [record["nats"] / math.log(2) for record in records]
        figures["bits_per_byte"] = ratio(bits, n_bytes)
    return figures | {"documents": Metric(len(records)), "tokens": Metric(n)}
