"""Whose points the observatory refits: where they are from, and which of the published numbers stand beside them."""

import csv
from dataclasses import dataclass
from pathlib import Path

from diffusionlm import scaling
from diffusionlm.scaling.laws.noise import NoiseOption
from diffusionlm.scaling.sweep.points import Points

RESIDUALS = "residuals"
FROM_MEMORY = "from memory"  # how published.csv marks a number that was not read in its source


@dataclass(frozen=True)
class Origin:
    """A file of `laws/`, which may hold several experiments."""

    file: str
    title: str
    repository: str  # on GitHub, at the commit that the points are from
    licence: str
    paper: str  # arXiv or other identifier
    parameters: str  # what N counts
    noise: NoiseOption = RESIDUALS


ORIGINS = (
    Origin(
        "mdm_prime_v2",
        "MDM-Prime-v2's plain models",
        "chen-hao-chao/mdm-prime-v2 @ 3237f23373",
        "Apache-2.0",
        "arXiv 2603.16077",
        "12 layers x width^2; the models have 4/3 as many without embeddings",
    ),
    Origin(
        "protein_lm",
        "protein language models",
        "cxysteven/ScalingProteinLM @ 12acfa0b13",
        "none stated",
        "bioRxiv 2024.06.06.597716",
        "non-embedding",
    ),
    Origin(
        "porian",
        "Porian et al.",
        "formll/resolving-scaling-law-discrepancies @ 0dc60d91b8",
        "MIT",
        "arXiv 2406.19146",
        "kaplan: non-embedding; standard: with the output head",
        0.005,
    ),
    Origin(
        "llama3",
        "Llama 3, read off its figure",
        "eric-czech/llama3_isoflop_extraction @ 1bc1755b76",
        "none stated",
        "arXiv 2407.21783",
        "C / (6 D)",
    ),
    Origin(
        "open_athena",
        "collection of the critique of Approach 2",
        "Open-Athena/scaling-law-analysis @ 3e0656ee3d",
        "none stated",
        "arXiv 2603.22339",
        "as each source counts",
    ),
    Origin(
        "kempner_loss_to_loss",
        "Kempner, six corpora",
        "KempnerInstitute/loss-to-loss-notebooks @ 457ce81a01",
        "none stated",
        "arXiv 2411.12925",
        "all, embeddings included",
    ),
    Origin(
        "epoch_chinchilla",
        "Chinchilla, read off its figure by Epoch",
        "epoch-research/analyzing-chinchilla @ 9225883742",
        "none stated",
        "arXiv 2404.10102",
        "all",
    ),
    Origin(
        "kyo_chinchilla",
        "a subset of Chinchilla's runs",
        "kyo-takano/chinchilla @ 75e5858f6e",
        "Apache-2.0",
        "arXiv 2203.15556",
        "not stated",
    ),
    Origin(
        "openeurollm_smoothed",
        "OpenEuroLLM, at the best learning rate and batch",
        "OpenEuroLLM/dense_english_scaling_laws @ 781af4364e",
        "none stated",
        "no paper",
        "not stated",
    ),
    Origin(
        "cs336_synthetic",
        "CS336, an exact surface",
        "stanford-cs336/assignment3-scaling @ 24a558ee8f",
        "MIT",
        "no paper",
        "synthetic",
    ),
    Origin("exact_surfaces", "exact surfaces", "written for these tests", "-", "arXiv 2603.22339", "synthetic"),
    Origin(
        "smdm_optima",
        "SMDM's optima, read off its figure",
        "ML-GSAI/SMDM",
        "Apache-2.0 (code)",
        "arXiv 2410.18514",
        "non-embedding",
    ),
    Origin(
        "evo_optima",
        "Evo's optima, read off its figure",
        "eric-czech/evo-scaling-law-extraction @ 96df4ece4f",
        "none stated",
        "bioRxiv 2024.02.27.582234",
        "not stated; 6 N D is not C",
    ),
)
SYNTHETIC = ("cs336_synthetic", "exact_surfaces")
OPTIMA = ("smdm_optima", "evo_optima")

# Of each experiment that published its exponent: the source and the method in published.csv.
PUBLISHED = {
    "protein_lm": ("protein_lm", "approach2"),
    "porian": (None, "best of an Akima interpolation, weighted line"),
    "llama3": ("llama3", "approach2"),
    "epochai_chinchilla__massivetext__chinchilla": ("chinchilla", "approach2"),
    "ml_scalefit__massivetext__chinchilla": ("chinchilla", "approach2"),
    "llama_3__raw_loss": ("llama_3__raw_loss", "approach2, all rows"),
    "kempner_loss_to_loss": (None, "approach3, loss"),
    "epoch_chinchilla": ("epoch_chinchilla", "approach3, 4000 bootstraps"),
    "kyo_chinchilla": ("kyo_chinchilla", "approach3, grid of starts, their own loss"),
    "smdm": ("smdm", "approach2"),
}
# A transformation of the losses of another experiment, and no experiment of its own.
LEFT_OUT = ("llama_3__exp_loss",)


def groups(data: Path, file: str) -> list[Points]:
    """Return the experiments of a file that have points to fit."""
    read = scaling.read_points(data / f"{file}.csv")
    return [group for group in read if group.results and group.name.split()[0] not in LEFT_OUT]


def rows(data: Path, file: str) -> list[dict[str, str]]:
    """Return the rows of a file as they are."""
    with open(data / f"{file}.csv", encoding="utf-8") as lines:
        return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def published(data: Path, source: str, method: str, objective: str) -> dict[str, dict[str, float | str | None]]:
    """Return the published numbers of a source by quantity: value, low, high, the interval's kind, and whence."""
    numbers = {}
    for row in rows(data, "published"):
        if (row["source"], row["method"], row["objective"]) == (source, method, objective):
            ends = {key: float(row[key]) if row[key] else None for key in ("value", "low", "high")}
            memory = FROM_MEMORY in row["where"]
            numbers[row["quantity"]] = ends | {"interval": row["interval"] or None, "from_memory": memory}
    return numbers


def exponent(data: Path, name: str, objective: str) -> dict[str, float | str | None | bool] | None:
    """Return the published a of N* ~ C^a of an experiment, 1 - b where only b is published, or None."""
    source, corpus = name.split()[0], name.split()[-1]
    for prefix, (of, method) in PUBLISHED.items():
        if not source.startswith(prefix):
            continue
        named = of or (f"{source}:{corpus}" if prefix == "kempner_loss_to_loss" else source)
        numbers = published(data, named, method, objective)
        if "a" in numbers:
            return {"method": method, "from_b": False, **numbers["a"]}
        if "b" in numbers and numbers["b"]["value"] is not None:
            b = float(numbers["b"]["value"])
            return {"method": method, "from_b": True, **numbers["b"], "value": round(1 - b, 6)}
    return None
