"""Graders on golden cases, and BLEU and diversity against independent computations."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from diffusionlm.evaluation import diversity, graders


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 18", 18),
        ("It costs 1,000 dollars.", 1000),
        ("It costs $1,234,567.89.", Fraction("1234567.89")),
        ("1, 2, 3", 3),
        ("16 - 3 - 4 = 9 eggs", 9),
        ("10-3=7", 7),
        ("10-3", 3),  # a difference, not a negative number
        ("The change is -5.", -5),
        ("It fell by -$5", -5),
        ("It fell by $-5", -5),
        ("\u22125 degrees", -5),
        ("the answer is 0.5", Fraction(1, 2)),
        ("the answer is .5", Fraction(1, 2)),
        ("18.00", 18),
        ("50% of them", 50),
        ("18kg", 18),
        (r"\boxed{18}", 18),
        (r"so $x = 18$.", 18),
        (r"\boxed{\text{\$}1{,}000}", 1000),
        (r"1\,000\ \text{m}", 1000),
        (r"is \frac{3}{4}", Fraction(3, 4)),
        (r"is -\dfrac34", Fraction(-3, 4)),
        ("3/4 of it", Fraction(3, 4)),
        ("first 5, then 6, at last 7", 7),
        ("no number here", None),
        ("", None),
        ("1/0", 1),  # no fraction
        ("#### 18\nQuestion: 3", 3),
    ],
)
def test_the_last_number(text, number):
    assert graders.last_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("a\n#### 18", 18),
        ("a\n#### 1,000", 1000),
        ("a\n####18 dollars", 18),
        ("a\n#### $18.50", Fraction(37, 2)),
        ("a\n#### -3", -3),
        ("#### 5\n\nQuestion: b\n#### 6", 5),  # a model without an end of text goes on
        (r"#### \boxed{18}", 18),
        ("#### 50%", 50),
        ("The answer is 18", None),
        ("#### eighteen", None),
        ("###18", None),
        ("", None),
    ],
)
def test_the_number_behind_the_marks(text, number):
    assert graders.final_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a\n#### 18", "18"),
        ("#### 5\nb\n#### 6", "6"),
        ("#### 18 dollars", "18 dollars"),
        ("####18", ""),  # the released expression wants a space
        ("#### 18\nmore", ""),
        ("18", ""),
    ],
)
def test_the_answer_of_smdm(text, answer):
    assert graders.smdm_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("18", "18", True),
        ("1,000", "1000", True),
        ("18.0", "18", True),
        ("18 dollars", "18", True),
        ("$18", "18", True),
        ("50\\%", "50", True),
        ("9 * 2 = 18", "18", True),
        ("\\boxed{18}", "18", True),
        ("\\frac{1}{2}", "0.5", True),
        ("-18", "18", False),
        ("19", "18", False),
        ("18 and 19", "18", False),
        ("x", "x", True),
        ("x", "y", False),
        ("", "", False),
        ("", "18", False),
    ],
)
def test_the_same_answer(answer, reference, same):
    assert graders.same_answer(answer, reference) == same


def test_every_gold_answer_of_gsm8k_is_right(data_dir):
    from pathlib import Path

    from diffusionlm.evaluation.gsm8k import Problem
    from diffusionlm.evaluation.records import read_records

    problems = read_records(str(Path(data_dir) / "gsm8k" / "test.jsonl"), Problem, None)
    assert len(problems) == 1319
    for problem in problems:
        gold = Fraction(problem.answer.rpartition("#### ")[2].replace(",", ""))
        assert graders.final_number(problem.answer) == graders.last_number(problem.answer) == gold
        assert graders.same_answer(graders.smdm_answer(problem.answer), str(gold))


@pytest.mark.parametrize(
    ("generation", "reference", "held"),
    [
        ("He is Uriah Hawthorne, who", " uriah hawthorne ", True),
        ("Uriah", "Uriah Hawthorne", False),
        ("anything", " ", False),
    ],
)
def test_containment(generation, reference, held):
    assert graders.contains(generation, reference) == held


def slow_bleu(hypothesis, references, order=4):
    """BLEU by its definition: geometric mean of clipped precisions, times the penalty of a text that is too short."""
    logs = []
    for n in range(1, order + 1):
        grams = Counter(tuple(hypothesis[i : i + n]) for i in range(len(hypothesis) - n + 1))
        limits = Counter()
        for reference in references:
            limits |= Counter(tuple(reference[i : i + n]) for i in range(len(reference) - n + 1))
        matches = sum(min(count, limits[gram]) for gram, count in grams.items())
        if not matches:
            return 0.0
        logs.append(math.log(matches / sum(grams.values())))
    closest = min((abs(len(reference) - len(hypothesis)), len(reference)) for reference in references)[1]
    penalty = 1.0 if len(hypothesis) > closest else math.exp(1 - closest / len(hypothesis))
    return penalty * math.exp(sum(logs) / order)


TEXTS = [
    "the acclaimed director of the virtual reality masterpiece, A Journey Through Time.",
    "the renowned director of a virtual reality masterpiece",
    "the director of the virtual reality masterpiece, A Journey Through Time, and of many other works that nobody saw",
    "a b c d e",
]


@pytest.mark.parametrize("i", range(4))
@pytest.mark.parametrize("j", range(4))
def test_bleu_is_that_of_its_definition(i, j):
    one, other = TEXTS[i], TEXTS[j]
    assert graders.bleu_of_characters(one, other) == pytest.approx(slow_bleu(list(one), [list(other)]))
    words = graders.words(one), graders.words(other)
    assert graders.bleu_of_words(one, other) == pytest.approx(slow_bleu(words[0], [words[1]]))


def test_bleu_of_the_example_of_its_paper():
    """Candidate 1 of Papineni et al. (2002): precisions 17/18, 10/17, 7/16 and 4/15, and no penalty."""
    candidate = "It is a guide to action which ensures that the military always obeys the commands of the party"
    references = [
        "It is a guide to action that ensures that the military will forever heed Party commands",
        "It is the guiding principle which guarantees the military forces always being under the command of the Party",
        "It is the practical guide for the army always to heed the directions of the party",
    ]
    expected = (17 / 18 * 10 / 17 * 7 / 16 * 4 / 15) ** (1 / 4)
    assert graders.bleu(candidate.split(), [text.split() for text in references]) == pytest.approx(expected)


def test_bleu_of_short_texts():
    assert graders.bleu_of_words("Uriah Hawthorne", "Uriah Hawthorne") == pytest.approx(1)
    assert graders.bleu_of_words("Hawthorne Uriah", "Uriah Hawthorne") == 0
    assert graders.bleu_of_words("", "Uriah") == graders.bleu_of_words("Uriah", "") == 0


def test_entropy_of_words():
    assert diversity.unigram_entropy(["a"] * 7) == 0
    assert diversity.unigram_entropy(list("abcdefgh")) == pytest.approx(math.log(8))
    assert diversity.unigram_entropy(list("aab")) == pytest.approx(math.log(3) - 2 / 3 * math.log(2))


def jackknife(figure, texts):
    values = np.array([figure(texts[:i] + texts[i + 1 :]) for i in range(len(texts))])
    return math.sqrt((len(texts) - 1) * np.var(values))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_ngrams_and_their_error(n):
    texts = [list("abab"), list("abcd"), list("aaaa"), list("dcbae")]

    def share(some):
        grams = [text[i : i + n] for text in map("".join, some) for i in range(len(text) - n + 1)]
        return len(set(grams)) / len(grams)

    value, stderr = diversity.distinct(texts, n)
    assert value == pytest.approx(share(texts)) and stderr == pytest.approx(jackknife(share, texts))
    assert diversity.distinct([list("abc")], n).stderr is None
    assert diversity.distinct([["a"], ["b"]], 2) == (0, None)


def test_the_error_of_a_ratio():
    pairs = [(3.0, 2.0), (5.0, 4.0), (1.0, 3.0), (8.0, 5.0)]
    tops, bottoms = ([pair[k] for pair in pairs] for k in range(2))
    value, stderr = diversity.ratio(tops, bottoms, math.exp)

    def figure(some):
        return math.exp(sum(top for top, _ in some) / sum(bottom for _, bottom in some))

    assert value == pytest.approx(figure(pairs)) and stderr == pytest.approx(jackknife(figure, pairs))


def test_self_bleu_of_copies_and_strangers():
    same = graders.words(TEXTS[0])
    assert diversity.self_bleu([same, same]) == pytest.approx([1, 1])
    assert diversity.self_bleu([list("abcde"), list("fghij"), list("klmno")]) == [0, 0, 0]
    texts = [graders.words(text) for text in TEXTS]
    expected = [slow_bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    assert diversity.self_bleu(texts) == pytest.approx(expected)
