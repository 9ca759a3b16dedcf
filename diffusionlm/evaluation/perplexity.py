"""The task `perplexity`: what the text of documents costs."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Any

from diffusionlm.evaluation.results import Metric, Result
from diffusionlm.evaluation.session import Record, Session
from diffusionlm.evaluation.texts import checked_limit, read_texts
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.perplexity import perplexity as likelihood
from diffusionlm.likelihood.perplexity import rolling_windows
from diffusionlm.options import SETTINGS
from diffusionlm.scalars import native

DOCUMENTS = 64  # scored at a time, so that those of one shape share a batch


def perplexity(
    session: Session,
    *,
    data: str,
    field: str = "text",
    limit: int | None = None,
    stride: int | None = None,
    settings: Annotated[LikelihoodConfig, *SETTINGS] = LikelihoodConfig(),  # noqa: B008
) -> Result:
    """Score texts: nats per token and bits per byte.

    Total nats are divided by the number of scored tokens; every document begins with the model's start token, which is
    visible and not scored. For a masked diffusion model the figure is an upper bound, and the standard errors are those
    of its estimate for these texts; 0 where it is exact. The metrics are nats_per_token, perplexity, bits_per_byte,
    tokens, bytes and documents.

    Args:
      session: the model to evaluate.
      data: a .txt file (one document), a .jsonl file (one document per line), or a directory or pattern of such.
      field: the field of a line's object that holds the text.
      limit: the number of documents to score, the first ones; None: all.
      stride: tokens that a window scores at a time in documents longer than the context; None: half the context.
      settings: the settings of the likelihoods.

    Raises:
      UserError: any of `LoadedModel.perplexity`, no such file, a malformed line, or no text.
    """
    model, limit, stride = session.model, checked_limit(limit), native(stride)
    settings.validate()
    texts = read_texts(model, data, field, limit)
    documents, n_bytes = model.encode_documents(texts)
    records = score_documents(session, texts, documents, settings, stride)
    nats, n = math.fsum(record["nats"] for record in records), sum(record["tokens"] for record in records)
    stderr = math.sqrt(math.fsum(record["stderr"] ** 2 for record in records))
    bits, bits_stderr = nats / math.log(2) / sum(n_bytes), stderr / math.log(2) / sum(n_bytes)
    metrics = {
        "nats_per_token": Metric(nats / n, stderr / n),
        "perplexity": Metric(math.exp(nats / n), math.exp(nats / n) * stderr / n),
        "bits_per_byte": Metric(bits, bits_stderr),
        "tokens": Metric(n),
        "bytes": Metric(sum(n_bytes)),
        "documents": Metric(len(texts)),
    }
    config = {"data": data, "field": field, "limit": limit, "stride": stride} | dataclasses.asdict(settings)
    return Result(metrics, config, forwards=sum(record["forwards"] for record in records))


def score_documents(
    session: Session, items: Sequence[Any], documents: list[list[int]], settings: LikelihoodConfig, stride: int | None
) -> list[Record]:
    """Return a record of each document: the nats of all its tokens but the first, their error, and their number.

    Args:
      session: the model, and the records.
      items: what identifies each document when records are taken up, in JSON types.
      documents: token ids, each from its start token on, which is given and not scored.
      settings: the settings of the likelihoods.
      stride: as in `diffusionlm.likelihood.perplexity.perplexity`.
    """
    model = session.model
    counts = [len(rolling_windows(document, model.config.max_length, stride)) for document in documents]
    first_ids = [0, *itertools.accumulate(counts)]  # of the windows, which key their noise

    def score(batch: list[int]) -> list[Record]:
        ids = [i for d in batch for i in range(first_ids[d], first_ids[d + 1])]
        some = [documents[d] for d in batch]
        with model.on_mesh():
            scores = likelihood(
                model.params, model.config, some, settings, stride=stride, request_ids=ids, watch=session.show
            )
        return [
            {"nats": -estimate.log_likelihood, "stderr": estimate.stderr, "tokens": n, "forwards": estimate.nfe}
            for estimate, n in zip(scores.documents, scores.tokens, strict=True)
        ]

    return session.evaluate("score documents", items, score, DOCUMENTS)
