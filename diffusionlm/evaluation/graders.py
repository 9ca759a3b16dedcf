"""Graders: pure functions of an answer and its reference, for numbers, texts and words."""

import re
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from diffusionlm.errors import missing_package

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A sign belongs to a number unless it stands after something that it is subtracted from; currency may come before or
# after it. "a/b" is a fraction.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]}}])-)?(?:[$€£¥](?P<minus>-)?)?(?P<top>{_DIGITS})(?:/(?P<bottom>\d+)(?![\d/.]))?"
)
_FRACTION = re.compile(r"(-?)\s*\\[dt]?frac\s*(?:\{\s*([^{}]*?)\s*\}|(\d))\s*(?:\{\s*([^{}]*?)\s*\}|(\d))")
_WRAPPED = re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[!,;: ]|\{(,)\}|\\(?:left|right)(?![a-zA-Z])")
_FINAL = re.compile(rf"####\s*(?P<number>-?\s*[$€£¥]?\s*-?(?:{_DIGITS})(?:/\d+)?)")


def plain_numbers(text: str) -> str:
    r"""Return a text in which numbers are written without LaTeX: \frac{1}{2} as 1/2, \boxed{1{,}000} as 1,000."""
    text = text.replace("\u2212", "-").replace("\\$", "$").replace("\\%", "%")
    text = _SPACING.sub(lambda match: match[1] or "", text)
    while (opened := _WRAPPED.sub(r" \1 ", text)) != text:
        text = opened
    return _FRACTION.sub(lambda m: f"{m[1]}{m[2] or m[3]}/{m[4] or m[5]}", text)


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text, None if there is none: the flexible rule for answers of GSM8K.

    Signs of currency and percent, units and LaTeX around a number do not matter; a comma belongs to it only between
    thousands.
    """
    matches = list(_NUMBER.finditer(plain_numbers(text)))
    return _value(matches[-1]) if matches else None


def final_number(text: str) -> Fraction | None:
    """Return the number after the first `####`, None if there is none: the strict rule for answers of GSM8K.

    It is the first because a model without an end of text goes on with further questions of its own.
    """
    match = _FINAL.search(plain_numbers(text))
    return last_number(re.sub(r"\s", "", match["number"])) if match else None


def smdm_answer(text: str) -> str:
    """Return what stands after `#### ` in the last line of a text, "" if nothing does: the rule of SMDM's evaluation.

    See arXiv 2410.18514 and its released code.
    """
    match = re.search(r"#### (.*)$", text)
    return match[1] if match else ""


def same_answer(answer: str, reference: str) -> bool:
    """Return True if two final answers are the same number or, where one is no number, the same text.

    This is the comparison of SMDM's evaluation, of normalised expressions, for the numbers of GSM8K: what stands after
    the last "=" counts, without units, signs of currency and percent, thousands separators and LaTeX.
    """
    one, other = _normalised(answer), _normalised(reference)
    numbers = [_whole_number(text) for text in (one, other)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return one == other != ""


def contains(generation: str, reference: str) -> bool:
    """Return True if a text holds another, but for case and white space around it; nothing holds an empty one.

    SMDM's evaluation of the reversal curse (arXiv 2410.18514) counts such an answer as right.
    """
    return reference.strip() != "" and reference.lower().strip() in generation.lower().strip()


def bleu_of_characters(generation: str, reference: str) -> float:
    """Return BLEU-4 of single characters, the figure of SMDM's evaluation of the reversal curse."""
    return bleu(list(generation.strip()), [list(reference.strip())])


def bleu_of_words(generation: str, reference: str) -> float:
    """Return BLEU-4 of words and signs."""
    return bleu(words(generation), [words(reference)])


def words(text: str) -> list[str]:
    """Return the words of a text, and its other signs but white space one by one."""
    return re.findall(r"\w+|[^\w\s]", text)


def bleu(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return BLEU (Papineni et al., 2002) of a text for its references, in [0, 1], without smoothing.

    Up to four tokens count as one n-gram, and no more than the longest reference has: else a name of two words could
    not score. Without a common n-gram of every length it is 0.

    Raises:
      UserError: the package `nltk` is missing.
    """
    order = min(4, max((len(reference) for reference in references), default=0))
    if not order or not hypothesis:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of scores of 0
        score = _sentence_bleu()(references, hypothesis, weights=[1 / order] * order)
    return float(score) if score > 1e-50 else 0.0  # where n-grams are missing, it puts the smallest number for 0


def _sentence_bleu() -> Callable[..., Any]:
    try:
        from nltk.translate.bleu_score import sentence_bleu  # here, because few tasks need it
    except ImportError as error:
        raise missing_package("BLEU", "nltk", "eval") from error
    return sentence_bleu


def _value(match: re.Match[str]) -> Fraction | None:
    top = Fraction(match["top"].replace(",", ""))
    bottom = Fraction(match["bottom"] or 1)
    if not bottom:
        return top
    return (-top if match["sign"] or match["minus"] else top) / bottom


def _normalised(text: str) -> str:
    """Return a final answer without what does not change it."""
    text = plain_numbers(text).rpartition("=")[2]
    text = re.sub(r"[$€£¥%\s]|\\(?:circ|degree)|\^", "", text).rstrip(".").replace("{}", "")
    match = _NUMBER.match(text)  # without what follows it, if that is a unit
    return match[0] if match and re.fullmatch(r"[a-zA-Z]*", text[match.end() :]) else text


def _whole_number(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    return _value(match) if match else None
