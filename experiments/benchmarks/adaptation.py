"""What adaptation is worth at equal FLOPs: TinyStories-656K made a diffusion model in five ways, with three seeds each.

    python experiments/benchmarks/adaptation.py --start models/tinystories-656k --data data/stories --work runs/ways

makes what is missing in the work directory and writes what is there to results.json; several processes may share the
work by `--part 0/2` and `--part 1/2`. `--data` is prepared with the tokenizer of `--start`.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

import diffusionlm as dlm
from diffusionlm import config, flops
from diffusionlm.config import Config

SEEDS = (0, 1, 2)
# The learning rates have not been compared yet: `--tune` does that.
WAYS: dict[str, dict[str, object]] = {
    "from scratch": {"diffusion.alignment": "same", "diffusion.anneal_steps": 0, "optim.peak_lr": 3e-3},
    "adapted, without annealing": {"diffusion.anneal_steps": 0},
    "adapted, with annealing": {},
    "adapted, without shift": {"diffusion.alignment": "same"},
    "adapted, by adapters": {"model.lora_rank": 16},
}
TUNED = (1e-3, 3e-3, 1e-2)


@dataclass(frozen=True)
class Arguments:
    start: str
    data: str
    work: Path
    steps: int = 1000
    part: str = "0/1"
    tune: bool = False


def runs(args: Arguments) -> dict[tuple[str, int, float], Config]:
    """(way, seed, learning rate) -> a run; all have the FLOPs of `steps` steps of the whole model."""
    base = config.with_fields(dlm.experiment("adapt_tinystories"), {"data.path": args.data, "run.steps": args.steps})
    budget = args.steps * flops.train(base.model, base.data.sequence_length, "model")
    found = {}
    for way, changes in WAYS.items():
        for seed in SEEDS[:1] if args.tune else SEEDS:
            cfg = config.with_fields(base, {**changes, "run.seed": seed})
            if way != "from scratch":
                cfg = replace(cfg, run=replace(cfg.run, init_from=args.start))
            steps = round(budget / flops.train(cfg.model, cfg.data.sequence_length, "model"))
            for rate in TUNED if args.tune else (cfg.optim.peak_lr,):
                rates = {"optim.peak_lr": rate, "optim.final_lr": rate / 10, "run.steps": steps}
                found[way, seed, rate] = config.with_fields(cfg, rates)
    return found


def main(args: Arguments) -> None:
    this, of = map(int, args.part.split("/"))
    found = []
    for i, ((way, seed, rate), cfg) in enumerate(runs(args).items()):
        workdir = args.work / f"{way} {seed} {rate:g}".replace(", ", "_").replace(" ", "_")
        if i % of == this:
            dlm.train(cfg, workdir)
        if (workdir / "DONE.json").exists():
            done = json.loads((workdir / "DONE.json").read_text())
            kept = {name: done["eval"][name] for name in ("nelbo_nats_per_token", "nelbo_stderr", "bits_per_byte")}
            found.append(
                {"way": way, "seed": seed, "peak_lr": rate, "flops": done["flops"], **kept, "run": workdir.name}
            )
    (args.work / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    for one in found:
        print(f"{one['way']:28} seed {one['seed']}  lr {one['peak_lr']:g}  {one['bits_per_byte']:.4f} bits/byte")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
