"""The table at the end of an evaluation: the model among its baselines, best first."""

import math
from collections.abc import Mapping
from typing import Literal

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

MEANING = {
    "mdm": "The model's figure is a Monte Carlo estimate (+/- one standard error) of an upper bound on what it needs, "
    "while the baselines' figures are exact.",
    "arm": "All figures are exact: the model is autoregressive, so its likelihood needs no bound.",
}


def comparison(
    model: str,
    objective: Literal["mdm", "arm"],
    nats_per_token: float,
    nats_stderr: float,
    bits_per_byte: float,
    baselines: Mapping[str, Mapping[str, float]],
) -> RenderableType:
    """Return a table with bars of what each needs for the same held-out text, for `rich.console.Console.print`.

    Args:
      model: the name of its row.
      objective: mdm: the figures are a bound, with its standard error; arm: they are exact.
      nats_per_token: the model's nats per scored token; if they are not finite, the table says so in its last row.
      nats_stderr: standard error of `nats_per_token`; shown for an mdm.
      bits_per_byte: the model's bits per byte of the same tokens.
      baselines: as `baselines.fit_and_score` returns them.
    """
    rows = {name: (scores["bits_per_byte"], f"{scores['nats_per_token']:.3f}") for name, scores in baselines.items()}
    error = f" +/- {nats_stderr:.3f}" if objective == "mdm" else ""
    if math.isfinite(nats_per_token) and math.isfinite(bits_per_byte):
        rows[model] = (bits_per_byte, f"{nats_per_token:.3f}{error}")
    widest = max((bits for bits, _ in rows.values()), default=0.0)

    table = Table(title="What the held-out text costs (less is better)", title_justify="left", box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    table.add_column("bits/byte", justify="right", overflow="fold")
    table.add_column("", max_width=40)
    table.add_column("nats/token", overflow="fold")
    for name, (bits, nats) in sorted(rows.items(), key=lambda row: row[1][0]):
        style, bar = ("bold green", "green") if name == model else ("", "cyan")
        cost = ProgressBar(widest, bits, complete_style=bar, finished_style=bar)
        table.add_row(name, f"{bits:.3f}", cost, nats, style=style)
    if model not in rows:
        table.add_row(model, "not finite", "", "not finite", style="bold red")
    return Group(table, Text(MEANING[objective]))
