"""Write sums of two numbers as problems in the format of GSM8K, for the task `gsm8k`.

    python experiments/benchmarks/arithmetic_problems.py --output data/sums

The answer is the sum after `####`. No pair of numbers of `test.jsonl` or `valid.jsonl` is in `train.jsonl`, in either
order. `train.jsonl` and `valid.jsonl` have the prompt as the task writes it.
"""

import json
import random
from pathlib import Path

import tyro


def pairs(n: int, digits: int, rng: random.Random) -> list[tuple[int, int]]:
    """Return n different pairs of numbers of up to so many digits; no two are the same pair in another order."""
    numbers = 10**digits
    if n > (possible := numbers * (numbers + 1) // 2):
        raise SystemExit(
            f"{n} problems are more than the {possible} pairs of numbers of {digits} digits; give more --digits"
        )
    drawn: dict[tuple[int, int], tuple[int, int]] = {}
    while len(drawn) < n:
        # Short numbers come more often than long ones, as far as there are pairs of them left.
        a, b = (rng.randrange(10 ** rng.randint(1, digits)) for _ in range(2))
        drawn.setdefault((min(a, b), max(a, b)), (a, b))
    return list(drawn.values())


def main(output: Path, digits: int = 2, train: int = 3_500, test: int = 500, seed: int = 0) -> None:
    """Write train.jsonl, valid.jsonl and test.jsonl.

    Args:
      output: the directory, which is made.
      digits: the most digits of a number.
      train: the number of problems to learn from.
      test: the number of problems of each of the other files.
      seed: of the problems.
    """
    problems = pairs(train + 2 * test, digits, random.Random(seed))
    random.Random(seed + 1).shuffle(problems)
    output.mkdir(parents=True, exist_ok=True)
    parts = {"test": problems[:test], "valid": problems[test : 2 * test], "train": problems[2 * test :]}
    for name, part in parts.items():
        rows = [{"question": f"{a}+{b}", "answer": f" #### {a + b}"} for a, b in part]
        if name != "test":
            rows = [{"prompt": f"Question: {r['question']}\nAnswer:", "completion": r["answer"]} for r in rows]
        (output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    tyro.cli(main)
