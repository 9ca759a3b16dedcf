"""What is counted: bytes and tokens of texts, and tokenizers that change them."""

import unicodedata
from types import SimpleNamespace

import pytest

from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.evaluation.certificate.method import Count
from diffusionlm.evaluation.certificate.text_checks import bytes_counted, round_trip, tokens_counted


class Composes(ByteTokenizer):
    """A tokenizer that composes accents, as Qwen2's does."""

    def encode(self, text, *, inside=False, special=False):
        return super().encode(unicodedata.normalize("NFC", text))


class OneSpace(ByteTokenizer):
    """A tokenizer that makes one space of two."""

    def encode(self, text, *, inside=False, special=False):
        return super().encode(text.replace("  ", " "))


def subject_of(texts, tokenizer, counts=(), start=()):
    model = SimpleNamespace(
        require_tokenizer=lambda: tokenizer,
        encode=lambda text: [*start, *tokenizer.encode(text)],
        config=SimpleNamespace(eos_ids=(tokenizer.eos_id,)),
    )
    return SimpleNamespace(model=model, texts=texts, method=SimpleNamespace(count=lambda texts: list(counts)))


LONG = "It was a warm day, and the cat slept in the sun. " * 100  # 4,900 bytes


@pytest.mark.parametrize(
    ("tokenizer", "odd"), [(Composes(), "a cafe\u0301 "), (OneSpace(), "a  dog ")], ids=["accents", "spaces"]
)
def test_an_odd_text_is_noted_and_not_refused(tokenizer, odd):
    """Three of 4,909 bytes (e and its accent) or one of 4,907 are changed, which is less than one of 1,000."""
    text = LONG[:2450] + odd + LONG[2450:]
    n = 3 if "\u0301" in odd else 1
    finding = round_trip(subject_of([LONG, text], tokenizer))
    assert finding.verdict == "pass" and finding.value == pytest.approx(n / (2 * len(LONG) + len(odd.encode())))
    assert "1 of them do not come back" in finding.explanation and "text 1 first" in finding.explanation
    often = round_trip(subject_of([LONG, odd * 20], tokenizer))
    assert often.verdict == "fail" and often.value == pytest.approx(20 * n / (len(LONG) + len((odd * 20).encode())))
    assert round_trip(subject_of([LONG], tokenizer)).value == 0


@pytest.mark.parametrize("text", ["\u00e9t\u00e9", "\u4e16\u754c", "\U0001f388 up", "plain"])
def test_bytes_behind_a_first_token_that_ends_inside_a_character(text):
    """The byte tokenizer without a start token gives one byte; decoded alone it would have three."""
    right = len(text.encode()) - 1
    decoded = len(text.encode()) - len(ByteTokenizer().decode(ByteTokenizer().encode(text)[:1]).encode())
    assert bytes_counted(subject_of([text], ByteTokenizer(), [Count(right, right)])).verdict == "pass"
    if decoded != right:
        finding = bytes_counted(subject_of([text], ByteTokenizer(), [Count(right, decoded)]))
        assert finding.verdict == "fail" and finding.value == 2
    assert bytes_counted(subject_of([text], ByteTokenizer(), [Count(right + 1, right)], [256])).value == 1


def test_bytes_of_a_changed_text_are_those_of_the_original():
    text = "cafe\u0301"
    n = len(text.encode())
    counts = [Count(n, n)]
    assert bytes_counted(subject_of([text], Composes(), counts, [256])).verdict == "pass"
    shorter = [Count(n - 1, n - 1)]
    assert bytes_counted(subject_of([text], Composes(), shorter, [256])).verdict == "fail"
    assert bytes_counted(subject_of([text], Composes(), shorter)).verdict == "not applicable"


def test_a_token_that_is_no_text_is_not_counted():
    """A tokenizer that begins or ends texts itself makes the library score a token more than the text has."""

    class Ends(ByteTokenizer):
        def encode(self, text, *, inside=False, special=False):
            return [*super().encode(text), 256]

    for tokenizer, tokens, verdict in [(ByteTokenizer(), 3, "pass"), (Ends(), 4, "fail"), (Ends(), 3, "pass")]:
        subject = subject_of(["abc"], tokenizer, [Count(tokens, 3)], [256])
        assert tokens_counted(subject).verdict == verdict
