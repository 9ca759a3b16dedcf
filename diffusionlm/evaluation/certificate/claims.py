"""Figures of another implementation, text by text, judged against this library's intervals."""

from collections.abc import Sequence

from diffusionlm import schema, untrusted
from diffusionlm.errors import UserError
from diffusionlm.evaluation.certificate.figures import Total
from diffusionlm.evaluation.certificate.verdicts import Finding, judge, not_applicable

STDERRS = 3 * 1.96  # of a claim that are allowed, as many as of an interval here


class Claim(schema.Record, frozen=True):
    """The nats of a text, as someone says: all tokens after what begins a document, together."""

    text: str
    nats: float
    stderr: schema.NonNegative = 0.0


def read_claims(path: str | None) -> list[Claim]:
    """Return the claims of a file, one JSON object a line; none without a file.

    Raises:
      UserError: a line is no claim, or there is none.
      OSError: the file cannot be read.
    """
    if path is None:
        return []
    lines = untrusted.read_bytes(path).splitlines()
    claims = [schema.decode(line, Claim, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not claims:
        raise UserError(f"claims={path!r} has no line with a text and its nats")
    for i, claim in enumerate(claims):
        if (reason := untrusted.unencodable(claim.text)) is not None or not claim.text:
            raise UserError(f"claims={path!r}: text {i} {f'has {reason}' if reason else 'is empty'}; give other text")
    return claims


def judge_claims(claims: Sequence[Claim], totals: Sequence[Total], tokens: Sequence[int], rounding: float) -> Finding:
    """Compare each claim with the interval of its text.

    Args:
      claims: the claims.
      totals: what the same texts cost here.
      tokens: the scored tokens of each.
      rounding: nats a token by which correct computations may differ.
    """
    if not claims:
        return not_applicable("No claims were given (--claims FILE).")
    outside, first = 0, ""
    for i, (claim, own, n) in enumerate(zip(claims, totals, tokens, strict=True)):
        allowed = 3 * own.reach() + STDERRS * claim.stderr + rounding * n
        if not abs(claim.nats - own.nats) <= allowed:
            outside += 1
            side = "below" if claim.nats < own.nats else "above"
            first = first or (
                f" The first is text {i}: {claim.nats:.3f} nats are {side} {own.nats:.3f} +/- {allowed:.3f}."
            )
    return judge(
        outside / len(claims),
        0.0,
        f"The share of {len(claims)} claims that lie outside 3 half-widths of the 95% intervals of their texts, with "
        f"the claims' own errors.{first}",
    )
