"""Split books by the year of their publication, to train on one period and test on another.

    python experiments/benchmarks/books_by_period.py books/train.jsonl --output data/periods

`early.jsonl` and `late.jsonl` are training text of equal length in characters; `test_early.jsonl` and `test_late.jsonl`
have pieces of books of each period that are in neither, for the task `temporal_shift`.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated

import tyro


def main(
    books: Annotated[Path, tyro.conf.Positional],
    output: Path,
    early: int = 1875,
    late: int = 1905,
    held_out: float = 0.35,
    test_characters: int = 20_000,
) -> None:
    """Write early.jsonl, late.jsonl, test_early.jsonl and test_late.jsonl.

    Args:
      books: a file of records with `text`, `title` and `year`.
      output: the directory, which is made.
      early: the year before which a book is early.
      late: the first year of late books.
      held_out: the share of books for the test, chosen by a hash of their titles.
      test_characters: the length of a test document, from the middle of its book.
    """
    parts: dict[str, list[dict]] = {"early": [], "late": [], "test_early": [], "test_late": []}
    for line in books.read_text(encoding="utf-8").splitlines():
        book = json.loads(line)
        if early <= book["year"] < late:
            continue
        period = "early" if book["year"] < early else "late"
        draw = int.from_bytes(hashlib.sha256(book["title"].encode()).digest()[:4]) / 2**32
        middle = max(0, (len(book["text"]) - test_characters) // 2)
        if draw < held_out:
            parts[f"test_{period}"].append(
                {"year": book["year"], "text": book["text"][middle : middle + test_characters], "title": book["title"]}
            )
        else:
            parts[period].append({"text": book["text"]})
    lengths = {name: sum(len(book["text"]) for book in parts[name]) for name in ("early", "late")}
    for name, length in lengths.items():  # the first part of every book of the longer period
        share = min(lengths.values()) / length
        for book in parts[name]:
            book["text"] = book["text"][: round(share * len(book["text"]))]
    output.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        lines = [json.dumps(book) + "\n" for book in part]
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print({name: (len(part), sum(len(book["text"]) for book in part)) for name, part in parts.items()})


if __name__ == "__main__":
    tyro.cli(main)
