"""What adaptation is worth at equal FLOPs: TinyStories-656K made a diffusion model in five ways, with three seeds each.

    python experiments/benchmarks/adaptation.py --start models/tinystories-656k --data data/stories \
        --held-out valid.jsonl --work runs/ways --output docs/results/adaptation.json

makes what is missing in the work directory: runs, and what they and the model that they start from score on held-out
stories. Several processes may share the work by `--part 0/2` and `--part 1/2`; one without makes the table and the
picture (`pip install -e ".[plots,eval]"`). `--data` is prepared with the tokenizer of `--start`.
"""

import json
import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from etils import epath

import diffusionlm as dlm
from diffusionlm import config_io, flops
from diffusionlm import storage as files
from diffusionlm.config import Config
from diffusionlm.evaluation import tasks
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.training import metrics

SEEDS = (0, 1, 2)
WAYS: dict[str, dict[str, object]] = {
    "from scratch": {"diffusion.alignment": "same", "diffusion.anneal_steps": 0},
    "adapted, without annealing": {"diffusion.anneal_steps": 0},
    "adapted, with annealing": {},
    "adapted, without shift": {"diffusion.alignment": "same"},
    "adapted, by adapters": {"model.lora_rank": 16},
}
# Compared with `--tune`, on held-out bits per byte of one seed.
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
BEST = dict(zip(WAYS, (3e-3, 1e-2, 3e-3, 1e-2, 3e-3), strict=True))
START = "the autoregressive model"
SCORES = ("bits_per_byte", "rouge1", "rouge2", "rougeL", "exact_match")


@dataclass(frozen=True)
class Arguments:
    """Steps are those of the registered experiment; `limit` is of documents to score, `stories` of those to fill in."""

    start: str
    data: str
    held_out: str
    work: Path
    steps: int = 1000
    part: str = "0/1"
    tune: bool = False
    limit: int = 100
    stories: int = 300
    examples: int = 8
    output: Path | None = None


def runs(args: Arguments) -> dict[tuple[str, int, float], Config]:
    """(way, seed, learning rate) -> a run; all have the FLOPs of `steps` steps of the whole model."""
    base = config_io.with_fields(dlm.experiment("adapt_tinystories"), {"data.path": args.data})
    budget = args.steps * flops.train(base.model, base.data.sequence_length, "model")
    found = {}
    for way, changes in WAYS.items():
        for seed in SEEDS[:1] if args.tune else SEEDS:
            cfg = config_io.with_fields(base, {**changes, "run.seed": seed})
            if way != "from scratch":
                cfg = replace(cfg, run=replace(cfg.run, init_from=args.start))
            steps = round(budget / flops.train(cfg.model, cfg.data.sequence_length, "model"))
            for rate in RATES if args.tune else (BEST[way],):
                rates = {"optim.peak_lr": rate, "optim.final_lr": rate / 10, "run.steps": steps}
                found[way, seed, rate] = config_io.with_fields(cfg, rates)
    return found


def scores(args: Arguments, checkpoint: str, path: Path) -> dict[str, Any]:
    """Return the scores of a model on the held-out stories: those in `path`, or newly measured and written there."""
    asked = {"held_out": args.held_out, "limit": args.limit, "stories": args.stories, "examples": args.examples}
    if path.exists() and (found := json.loads(path.read_text()))["asked"] == asked:
        return found
    model = dlm.load(checkpoint)
    length = dlm.experiment("adapt_tinystories").data.sequence_length
    model = replace(model, config=replace(model.config, max_length=length))  # that of the start is longer
    one = tasks.evaluate(model, "perplexity", data=args.held_out, limit=args.limit)
    likeliest = SamplingConfig(temperature=0.0)
    if not model.config.autoregressive:
        likeliest = replace(likeliest, strategy="low_confidence")
    filled = tasks.evaluate(
        model, "infilling", data=args.held_out, limit=args.stories, examples=args.examples, sampling=likeliest
    )
    both = {name: metric._asdict() for name, metric in {**one.metrics, **filled.metrics}.items()}
    found = {"asked": asked, "metrics": both, "examples": filled.examples}
    files.write_atomically(epath.Path(path), json.dumps(found, indent=1) + "\n")
    return found


def curve(cfg: Config, workdir: Path) -> list[tuple[float, float]]:
    """(training FLOPs, bits per byte of the prepared held-out records) at a run's evaluations."""
    per_sequence = flops.train(cfg.model, cfg.data.sequence_length, "model")
    lines = [line for line in metrics.read(workdir) if "eval_bits_per_byte" in line]
    return [(line["step"] * cfg.data.batch_size * per_sequence, line["eval_bits_per_byte"]) for line in lines]


def main(args: Arguments) -> None:
    this, of = map(int, args.part.split("/"))
    found = []
    for i, ((way, seed, rate), cfg) in enumerate(runs(args).items()):
        workdir = args.work / f"{way} {seed} {rate:g}".replace(", ", "_").replace(" ", "_")
        if i % of != this:
            continue
        if (run := dlm.train(cfg, workdir)).result is None:
            raise SystemExit(f"stopped at step {run.step}; the same command goes on")
        one = {"way": way, "seed": seed, "peak_lr": rate, "steps": cfg.run.steps, "flops": run.result["flops"]}
        one["curve"] = curve(cfg, workdir)
        if not args.tune:
            one |= scores(args, str(workdir), workdir / "scores.json")
        found.append(one)
    if args.tune:
        for one in found:
            print(f"{one['way']:28} lr {one['peak_lr']:<6g} {one['curve'][-1][1]:.4f} bits/byte at the end of training")
        return
    start = {"way": START, **scores(args, args.start, args.work / "start.json")}
    print(table([start, *found]))
    for one in (start, *found):
        del one["asked"]  # where the files are is nobody else's business
    if args.output:
        args.output.write_text(json.dumps([start, *found], indent=1) + "\n")
        plot([start, *found], args.output.with_suffix(".png"))


def by_way(found: list[dict[str, Any]], name: str) -> dict[str, tuple[float, float]]:
    """A score's mean over seeds and its standard error: over the seeds, or the measurement's own of a single one."""
    kept = defaultdict(list)
    for one in found:
        kept[one["way"]].append(one["metrics"][name])
    means = {}
    for way, seeds in kept.items():
        values = [seed["value"] for seed in seeds]
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else seeds[0]["stderr"]
        means[way] = statistics.fmean(values), error
    return means


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a row a way."""
    columns = {name: by_way(found, name) for name in SCORES}
    lines = ["| | " + " | ".join(SCORES) + " |", "|---" * (1 + len(SCORES)) + "|"]
    for way in columns[SCORES[0]]:
        cells = [f"{mean:.4f} ± {error:.4f}" for mean, error in (columns[name][way] for name in SCORES)]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Bits per byte while training, and ROUGE-L of the filled sentences at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for k, way in enumerate(WAYS):
        for n, one in enumerate(one for one in found if one["way"] == way):
            left.plot(*zip(*one["curve"], strict=True), color=f"C{k}", marker="o", lw=1, label=None if n else way)
    left.set(xlabel="training FLOPs (head included)", ylabel="held-out bits per byte (bound)", ylim=(None, None))
    left.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    means = by_way(found, "rougeL")
    colours = ["0.5", *(f"C{k}" for k in range(len(WAYS)))]
    middle, errors = zip(*means.values(), strict=True)
    right.barh(list(means), middle, xerr=errors, color=colours)
    right.invert_yaxis()
    right.set(xlabel="ROUGE-L of the middle sentence")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
