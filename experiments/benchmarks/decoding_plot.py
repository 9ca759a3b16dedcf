"""Draw quality against passes and against tokens/s from the rows of `decoding.py`; redraw a file of them.

python experiments/benchmarks/decoding_plot.py docs/results/frontier.json twin_bits_per_byte
python experiments/benchmarks/decoding_plot.py docs/results/twins.json ngram_bits_per_byte
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

JUDGES = {"twin_bits_per_byte": "the autoregressive twin", "ngram_bits_per_byte": "a 5-gram model"}
MARKERS = "os^DvPX*<>phd"


def plot(rows: Sequence[Mapping[str, Any]], judge: str, path: Path) -> None:
    """Plot all but the first row, which is what people wrote: a colour for each cache, a marker for each rule.

    Points lie too close together for labels beside them, so two legends say what they are.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    caches = list(dict.fromkeys(cache_of(row) for row in rows[1:]))
    rules = list(dict.fromkeys(rule_of(row) for row in rows[1:]))
    figure, axes = plt.subplots(1, 2, figsize=(12, 6.2), sharey=True)
    for panel, label in zip(axes, ("forward passes", "tokens/s"), strict=True):
        for row in rows[1:]:
            x = row["passes"] if panel is axes[0] else float(np.median(row["tokens_per_second"]))
            style = {"color": f"C{caches.index(cache_of(row))}", "marker": MARKERS[rules.index(rule_of(row))]}
            panel.plot([x], [row[judge]], markersize=8, alpha=0.75, markeredgecolor="white", linestyle="", **style)
        panel.axhline(rows[0][judge], color="grey", linestyle=":")
        panel.set(xscale="log", xlabel=label)
        panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3, which="major")
    axes[0].set_ylabel("bits per byte of the text under " + JUDGES[judge])
    colours = [Line2D([], [], color=f"C{i}", marker="o", linestyle="", label=cache) for i, cache in enumerate(caches)]
    colours.append(Line2D([], [], color="grey", linestyle=":", label="what people wrote"))
    shapes = [Line2D([], [], color="0.3", marker=MARKERS[i], linestyle="", label=rule) for i, rule in enumerate(rules)]
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    figure.legend(handles=colours, loc="lower left", bbox_to_anchor=(0.03, 0.0), ncols=1, fontsize=9, frameon=False)
    figure.legend(handles=shapes, loc="lower right", bbox_to_anchor=(0.99, 0.0), ncols=3, fontsize=9, frameon=False)
    figure.savefig(path, dpi=120)


def cache_of(row: Mapping[str, Any]) -> str:
    """Return the kind of cache of a row, with the model where it is autoregressive."""
    settings = row["settings"]
    kind = "autoregressive, " if row["name"].startswith("ARM") else ""
    cache = settings["cache"] or ("causal" if kind else "none")
    refresh = f", refresh {settings['refresh']}" if settings["refresh"] else ""
    return f"{kind}{'no cache' if cache == 'none' else f'{cache} cache'}{refresh}"


def rule_of(row: Mapping[str, Any]) -> str:
    """Return the name of a row without its cache."""
    parts = row["name"].split(", ")
    return ", ".join(part for part in parts if part not in ("no cache", "prefix", "dual") and "refresh" not in part)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(json.loads(source.read_text())["rows"], sys.argv[2], source.with_suffix(".png"))
