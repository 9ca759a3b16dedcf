"""All checks by name, in the order in which they are reported.

A further check is one function of a `Subject`, and its entry here.
"""

from collections.abc import Callable

from diffusionlm.evaluation.certificate import invariance_checks, text_checks, value_checks
from diffusionlm.evaluation.certificate.subject import Subject
from diffusionlm.evaluation.certificate.verdicts import Finding

CHECKS: dict[str, Callable[[Subject], Finding]] = {
    "sums_to_one": value_checks.sums_to_one,
    "pairs_below_exact": value_checks.pairs_below_exact,
    "exact_score_matches": value_checks.exact_score_matches,
    "estimate_matches_exact": value_checks.estimate_matches_exact,
    "bound_not_below_exact": value_checks.bound_not_below_exact,
    "interval": value_checks.interval,
    "clipping": value_checks.clipping,
    "chain_rule": value_checks.chain_rule,
    "no_leak": invariance_checks.no_leak,
    "padding": invariance_checks.padding,
    "batch": invariance_checks.batch,
    "mask_not_predicted": invariance_checks.mask_not_predicted,
    "mask_not_scored": invariance_checks.mask_not_scored,
    "first_token": text_checks.first_token,
    "tokens_counted": text_checks.tokens_counted,
    "bytes_counted": text_checks.bytes_counted,
    "token_bytes": text_checks.token_bytes,
    "round_trip": text_checks.round_trip,
}


def run(subject: Subject) -> dict[str, Finding]:
    """Return the finding of every check."""
    return {name: check(subject) for name, check in CHECKS.items()}
