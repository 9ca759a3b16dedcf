"""Training curves of several runs in one picture: held-out bits per byte against training FLOPs.

pip install -e ".[plots]"
python docs/results/plot_curves.py --output docs/results/tinystories.png docs/results/tinystories.json runs/tinystories

A JSON file, written by an earlier call, stands for the runs of that call.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from diffusionlm import config_io, flops
from diffusionlm.training import metrics


def curve(workdir: Path) -> tuple[str, list[float], list[float]]:
    """A run's name, FLOPs (model convention) and held-out bits per byte at each of its evaluations."""
    cfg = config_io.from_json((workdir / "config.json").read_text())
    per_token = flops.train(cfg.model, cfg.data.sequence_length, "model") / cfg.data.sequence_length
    lines = [line for line in metrics.read(workdir) if "eval_bits_per_byte" in line]
    return cfg.name, [line["tokens"] * per_token for line in lines], [line["eval_bits_per_byte"] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, and JSON files of earlier calls")
    parser.add_argument("--output", required=True, type=Path, help="the PNG; the numbers go beside it as JSON")
    args = parser.parse_args()
    curves = {}
    for run in args.runs:
        if run.suffix == ".json":
            curves |= json.loads(run.read_text())
        else:
            name, x, y = curve(run)
            curves[name] = {"flops": x, "bits_per_byte": y}
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, points in curves.items():
        axes.plot(points["flops"], points["bits_per_byte"], marker="o", label=name)
    axes.set(xscale="log", xlabel="training FLOPs (head included)", ylabel="held-out bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.output, dpi=120)
    args.output.with_suffix(".json").write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    main()
