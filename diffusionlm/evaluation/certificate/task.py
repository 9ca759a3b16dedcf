"""The task `certificate`: what texts cost a model, and whether that figure can be believed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusionlm.errors import UserError
from diffusionlm.evaluation.certificate.claims import Claim, judge_claims, read_claims
from diffusionlm.evaluation.certificate.figures import Total, draws_agree, estimators_agree, total
from diffusionlm.evaluation.certificate.measure import Documents, Measurements
from diffusionlm.evaluation.certificate.reference import below, over_orders
from diffusionlm.evaluation.certificate.subject import choose_samples, in_dtype
from diffusionlm.evaluation.certificate.value_checks import CLIPPED
from diffusionlm.evaluation.certificate.verdicts import FAIL, NOT_APPLICABLE, PASS, Finding
from diffusionlm.evaluation.results import Metric, Result
from diffusionlm.evaluation.session import Record, Session
from diffusionlm.evaluation.texts import checked_limit, read_texts
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.pairs import Pair
from diffusionlm.scalars import whole


def certificate(
    session: Session,
    *,
    data: str,
    field: str = "text",
    limit: int | None = 16,
    short_targets: int = 3,
    chain_rule: int = 1,
    claims: str | None = None,
    dtype: str = "float32",
    draws: int = 16,
    passes: int = 8,
    seed: int = 0,
    rows: int = 64,
) -> Result:
    """Certify a model's likelihood: its bound by independent estimators, and checks with a verdict each.

    The metrics are the bound in nats per token by two estimators, bits per byte with its 95% interval, the chain rule
    of a few texts beside their bound, the share of the bound that masking rates clipped at 0.001 would hide, and
    counts. The exit code is 1 if a check fails. With 16 draws or more a text takes
    2.25 x draws x passes forward passes, and the checks about ten thousand short ones.

    Args:
      session: the model to evaluate.
      data: a .txt file (a document), a .jsonl file (a document a line), or a directory or pattern of such.
      field: the field of a line's object that holds the text.
      limit: the number of texts to score, the first ones; None: all.
      short_targets: short targets of which every set of masks is tried, from the starts of the first texts.
      chain_rule: texts that are also scored from left to right, a forward pass a token; 0: none.
      claims: a file of JSON lines, {"text", "nats"} and perhaps "stderr", of another implementation, to judge.
      dtype: the number format to compute in, float32 or bfloat16; the checks can tell less apart in the latter.
      draws: forward passes of one pass over a text.
      passes: independent passes, from which standard errors come.
      seed: seed of the masks.
      rows: sequences that the network sees at a time.

    Raises:
      UserError: any of `LoadedModel.perplexity`, no such file, a malformed line, or no text that is long enough.
    """
    settings = LikelihoodConfig(draws=draws, passes=passes, seed=seed, rows=rows)
    settings.validate()
    short_targets, chain_rule = whole("short_targets", short_targets, 1), whole("chain_rule", chain_rule, 0)
    limit, claimed = checked_limit(limit), read_claims(claims)
    texts = read_texts(session.model, data, field, limit)
    measurements = Measurements(session, in_dtype(session.model, dtype), settings)
    documents = Documents.of(measurements.model, texts)
    if not documents.texts:
        raise UserError(f"data={data!r} has no text of two tokens or more, of which the first is given")
    samples = choose_samples(measurements.model, documents.ids, short_targets)
    with jax.default_matmul_precision("highest"):  # GPUs and TPUs would else multiply float32 matrices in fewer bits
        outcome = _certify(measurements, documents, samples, chain_rule)
        finding, records = _judge_claims(measurements, claimed, claims)
    checks = [*outcome.checks, finding.to_json("claims")]
    forwards = sum(record["forwards"] for record in [*outcome.records, *records])
    config = {"data": data, "field": field, "limit": limit, "short_targets": short_targets, "chain_rule": chain_rule}
    config |= {"claims": claims, "dtype": dtype, "draws": draws, "passes": passes, "seed": seed, "rows": rows}
    metrics = outcome.metrics | _counts(documents, checks)
    return Result(metrics, config, forwards=forwards, checks=checks, notes=_notes(metrics, checks))


class _Outcome(NamedTuple):
    """Figures and findings, and the records that they come from."""

    metrics: dict[str, Metric]
    checks: list[dict[str, Any]]
    records: list[Record]


def _certify(measurements: Measurements, documents: Documents, samples: Sequence[Pair], chain_rule: int) -> _Outcome:
    """Measure all but claims."""
    scores = measurements.scores("score texts", documents)
    chains = measurements.left_to_right(documents.first(chain_rule))
    orders, estimates = measurements.costs(samples), measurements.estimates(samples)
    checked = measurements.checks(documents.texts, samples, orders, estimates)
    formats = measurements.own_dtype(samples)
    costs = [np.array(record["costs"]) for record in orders]
    exact = math.fsum(over_orders(cost).mean for cost in costs)
    metrics = _figures(documents, scores) | _chain_rule(documents, scores, chains)
    if not measurements.model.config.autoregressive:
        metrics["share_below_t_0.001"] = Metric(math.fsum(below(cost, CLIPPED) for cost in costs) / exact)
    if formats:
        n = sum(len(target) for _, target in samples)
        metrics["own_dtype_error_per_token"] = Metric((formats[0]["nats"] - exact) / n)
    compared = {"estimators_agree": estimators_agree, "draws_agree": draws_agree}
    checks = [check(scores, documents.tokens).to_json(name) for name, check in compared.items()]
    checks += [{key: value for key, value in record.items() if key != "forwards"} for record in checked]
    return _Outcome(metrics, checks, [*scores, *chains, *orders, *estimates, *checked, *formats])


def _judge_claims(
    measurements: Measurements, claims: Sequence[Claim], source: str | None
) -> tuple[Finding, list[Record]]:
    """Return the finding about claims, and the records of their texts."""
    texts = [claim.text for claim in claims]
    documents = Documents.of(measurements.model, texts)
    if documents.too_short:
        short = next(i for i, text in enumerate(texts) if text not in documents.texts)
        raise UserError(f"claims={source!r}: text {short} has nothing to score: its only token is given; leave it out")
    records = measurements.scores("score claims", documents, compared=False)
    name = "autoregressive" if measurements.model.config.autoregressive else "exact_count"
    totals = [Total(*record[name]) for record in records]
    return judge_claims(claims, totals, documents.tokens, measurements.rounding), records


def _figures(documents: Documents, records: Sequence[Record]) -> dict[str, Metric]:
    """Return the figures of all texts together, by each estimator."""
    n, bits = sum(documents.tokens), math.log(2) * sum(documents.n_bytes)
    exact = "autoregressive" in records[0]
    own = total(records, "autoregressive" if exact else "exact_count")
    metrics = {"nats_per_token": Metric(own.nats / n, own.stderr / n)}
    if not exact:
        iid = total(records, "iid")
        metrics["nats_per_token_iid"] = Metric(iid.nats / n, iid.stderr / n)
    metrics["bits_per_byte"] = Metric(own.nats / bits, own.stderr / bits)
    metrics["bits_per_byte_low"] = Metric((own.nats - own.reach()) / bits)
    metrics["bits_per_byte_high"] = Metric((own.nats + own.reach()) / bits)
    return metrics


def _chain_rule(documents: Documents, records: Sequence[Record], chains: Sequence[Record]) -> dict[str, Metric]:
    """Return the cost of texts from left to right beside the bound of the same texts, which it need not be near."""
    if not chains:
        return {}
    n, bound = sum(documents.tokens[: len(chains)]), total(records[: len(chains)], "exact_count")
    return {
        "left_to_right_nats_per_token": Metric(math.fsum(record["nats"] for record in chains) / n),
        "bound_of_the_same_texts": Metric(bound.nats / n, bound.stderr / n),
    }


def _counts(documents: Documents, checks: Sequence[dict[str, Any]]) -> dict[str, Metric]:
    verdicts = [check["verdict"] for check in checks]
    counts = {"tokens": sum(documents.tokens), "bytes": sum(documents.n_bytes), "documents": len(documents.texts)}
    counts |= {"too_short": documents.too_short, "passed": verdicts.count(PASS), "failed": verdicts.count(FAIL)}
    counts["not_applicable"] = verdicts.count(NOT_APPLICABLE)
    return {name: Metric(count) for name, count in counts.items()}


def _notes(metrics: Mapping[str, Metric], checks: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Return the number of each verdict, and what a tokenizer changes if it is little enough to pass."""
    passed, failed, unasked = (metrics[name].value for name in ("passed", "failed", "not_applicable"))
    note = f"{passed} of {passed + failed} checks passed, {failed} failed, {unasked} not applicable"
    changed = [c for c in checks if c["name"] == "round_trip" and c["verdict"] == PASS and c["value"]]
    return (note, *(check["explanation"] for check in changed))
