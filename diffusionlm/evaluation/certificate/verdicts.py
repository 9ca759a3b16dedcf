"""The outcome of a check."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "not applicable"
Verdict = Literal["pass", "fail", "not applicable"]


@dataclass(frozen=True)
class Finding:
    """Hold the finding of a check.

    Attributes:
      verdict: "pass", "fail" or "not applicable".
      value: what was measured; None where the check does not apply.
      tolerance: the largest value that passes.
      explanation: what the value is, and why the tolerance is what it is; or why the check does not apply.
    """

    verdict: Verdict
    value: float | None
    tolerance: float | None
    explanation: str

    def to_json(self, name: str) -> dict[str, Any]:
        """Return {"name", "verdict", "value", "tolerance", "explanation"}."""
        return {"name": name} | asdict(self)


def judge(value: float, tolerance: float, explanation: str) -> Finding:
    """Return a finding that passes if the value is at most the tolerance; one that is no number fails."""
    passed = not math.isnan(value) and value <= tolerance
    return Finding("pass" if passed else "fail", float(value), float(tolerance), explanation)


def not_applicable(reason: str) -> Finding:
    """Return a finding that says why a check does not apply."""
    return Finding("not applicable", None, None, reason)
