"""Tell from results of `temporal_shift` what it costs to be trained on another period, book by book.

    for period in early late; do
      diffusionlm evaluate EARLY temporal_shift --data periods/test_$period.jsonl --output trained_early/$period.json
      diffusionlm evaluate LATE temporal_shift --data periods/test_$period.jsonl --output trained_late/$period.json
    done
    python experiments/benchmarks/temporal_difference.py trained_early trained_late

EARLY and LATE are models that were trained on the two periods of books_by_period.py.
"""

import json
from pathlib import Path
from typing import Annotated

import tyro

from diffusionlm.evaluation.results import mean


def nats_per_token(path: Path) -> dict[str, float]:
    """Return the nats per token of each document of a result."""
    lines = path.with_suffix(".items.jsonl").read_text(encoding="utf-8").splitlines()[1:]
    return {line["sha256"]: line["record"]["nats"] / line["record"]["tokens"] for line in map(json.loads, lines)}


def main(early: Annotated[Path, tyro.conf.Positional], late: Annotated[Path, tyro.conf.Positional]) -> None:
    """Print, for the test books of each period, how much more the model of the other period needs."""
    for period, own, other in (("early", early, late), ("late", late, early)):
        mine, others = nats_per_token(own / f"{period}.json"), nats_per_token(other / f"{period}.json")
        more = mean([others[key] - nats for key, nats in mine.items()])
        print(
            f"{period} books: {mean(list(mine.values())).value:.3f} nats per token; trained on the other period "
            f"{more.value:+.3f} +/- {more.stderr:.3f} over {len(mine)} books"
        )


if __name__ == "__main__":
    tyro.cli(main)
