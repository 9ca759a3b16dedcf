"""What the finished cells of a sweep measured, as the fits and the report take it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CellResult:
    """One finished run of a sweep."""

    id: str
    objective: str  # mdm, arm
    preset: str  # name of the model size
    seed: int
    budget: float  # FLOPs that the cell was planned for
    flops: float  # FLOPs that it spent, in the convention of the sweep's recipe
    params: int  # the N that the fits use, as the recipe counts it
    params_non_embedding: int
    tokens: int  # that it was trained on
    unique_tokens: int  # of the training split; fewer than `tokens` means that data were repeated
    steps: int
    loss: float  # held-out nats per token: the bound of an MDM, the cross-entropy of an ARM
    loss_stderr: float  # of the Monte Carlo noise of the masks; 0 for an ARM
    loss_per_draw: tuple[float, ...]  # the same by noise draw, which all cells of a sweep have in common
    bits_per_byte: float
    curve: tuple[tuple[float, float], ...]  # (FLOPs spent, training loss) along the run, thinned
