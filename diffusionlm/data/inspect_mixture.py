"""Show a mixture of prepared datasets: their shares, and how often a run goes through each (`data inspect`)."""

from typing import Any

from rich.table import Table

from diffusionlm import config_mixture
from diffusionlm.console import Console
from diffusionlm.data.mixtures import open_mixture
from diffusionlm.scalars import whole


def describe(text: str, steps: int, batch_size: int) -> dict[str, Any]:
    """Return what `inspect` shows, in JSON types.

    Args:
      text: a mixture, as `data.mixture` has it.
      steps: of a run on it.
      batch_size: rows of a step.

    Returns:
      {"mixture": without the places of its datasets, "sha256", "steps", "batch_size", "phases": [{"start": its first
      batch, "weights": {name: share}}], "sources": {name: {"path", "sha256", "records", "tokens", "bytes_per_token",
      "rows", "share" and "epochs" of the run}}}

    Raises:
      UserError: it is no mixture, its datasets do not go together, or a count is not positive.
    """
    steps, batch_size = whole("steps", steps, 1), whole("batch_size", batch_size, 1)
    spec = config_mixture.parse(text)
    mixture = open_mixture(spec)
    seen = mixture.seen(batch_size, steps)
    sources = {}
    for label, dataset in zip(mixture.labels, mixture.datasets, strict=True):
        train = dataset.metadata.splits["train"]
        sources[label] = {
            "path": str(dataset.path),
            "sha256": dataset.sha256,
            "records": train.records,
            "tokens": train.tokens,
            "bytes_per_token": train.raw_bytes / train.tokens,
            **seen[label],
        }
    return {
        "mixture": spec.canonical,
        "sha256": mixture.sha256,
        "steps": steps,
        "batch_size": batch_size,
        "phases": [
            {"start": phase.start, "weights": dict(zip(mixture.labels, phase.weights, strict=True))}
            for phase in spec.phases
        ],
        "sources": sources,
    }


def inspect(text: str, steps: int, batch_size: int) -> dict[str, Any]:
    """Print what `describe` returns as a table, and return it.

    Args:
      text: a mixture, as `data.mixture` has it.
      steps: of a run on it.
      batch_size: rows of a step.

    Raises:
      UserError: it is no mixture, its datasets do not go together, or a count is not positive.
    """
    values = describe(text, steps, batch_size)
    console = Console(highlight=False)
    console.print(
        f"a mixture, sha256 {values['sha256'][:12]}; {steps:,} steps of {batch_size:,} rows take", soft_wrap=True
    )
    starts = [f"from {phase['start']:,}" if phase["start"] else "weight" for phase in values["phases"]]
    table = Table("source", *starts, "tokens", "rows", "share", "epochs")
    for name, source in values["sources"].items():
        weights = (f"{phase['weights'][name]:.6g}" for phase in values["phases"])
        taken = f"{source['rows']:,}", f"{source['share']:.2%}", f"{source['epochs']:.3f}"
        table.add_row(name, *weights, f"{source['tokens']:,}", *taken)
    console.print(table)
    return values
