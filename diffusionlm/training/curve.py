"""The losses of a run along its steps, and their picture for notebooks."""

import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

TRAINING, HELD_OUT, AUTOREGRESSIVE = "loss", "eval_nelbo_nats_per_token", "eval_autoregressive_nats_per_token"
SERIES: dict[str, dict[str, Any]] = {  # field of metrics.jsonl -> how it is drawn
    TRAINING: {"label": "training loss", "color": "tab:blue", "linewidth": 1},
    HELD_OUT: {"label": "held out", "color": "tab:orange", "marker": "o"},
    AUTOREGRESSIVE: {"label": "held out, next-token prediction", "color": "tab:green", "marker": "s", "markersize": 4},
}


class Curve:
    """The losses that lines of metrics.jsonl report.

    Args:
      title: of the picture.
      steps: of the whole run.
      opens: the step at which attention opens; 0: it is what it is from the start.
    """

    def __init__(self, title: str, steps: int, opens: int = 0):
        self._title, self._steps, self._opens = title, steps, opens
        self.restart(())

    def restart(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Forget everything but these lines."""
        self._points: dict[str, dict[int, float]] = {name: {} for name in SERIES}
        for line in lines:
            self.add(line["step"], line)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the losses of a line."""
        for name, points in self._points.items():
            if values.get(name) is not None:
                points[step] = float(values[name])

    def cut_back(self, step: int) -> None:
        """Forget what follows a step."""
        for points in self._points.values():
            for later in [known for known in points if known > step]:
                del points[later]

    def points(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and the losses of a series, without those that are not finite."""
        steps, losses = np.array(sorted(self._points[name].items()), float).reshape(-1, 2).T
        finite = np.isfinite(losses)
        return steps[finite], losses[finite]

    def png(self) -> bytes:
        """Return the picture.

        Raises:
          ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3), layout="constrained")  # without pyplot, which would keep and show it
        axes = figure.add_subplot(title=self._title, xlabel="step", ylabel="nats per token", xlim=(0, self._steps))
        axes.grid(alpha=0.25)
        for name, style in SERIES.items():
            steps, losses = self.points(name)
            if len(steps):
                axes.plot(steps, losses, **style)
        if self._opens:
            axes.axvline(self._opens, color="grey", linestyle=":", label="attention opens")
        if axes.lines:
            axes.legend(fontsize="small")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=80)
        return file.getvalue()
