"""Print a compile report as a terminal table or as JSON."""

import dataclasses
from typing import Any

from rich.table import Table

from diffusionlm.compile_check.report import CompileReport
from diffusionlm.compile_check.roofline import Traffic
from diffusionlm.console import Console
from diffusionlm.hardware import GIB

TERMS = {
    "compute": "matmuls at the peak of the chips",
    "memory": "kernels waiting for HBM beyond that",
    "ici": "collectives within a slice that nothing hides",
    "dcn": "collectives between slices that nothing hides",
}


def to_json(report: CompileReport) -> dict[str, Any]:
    """Return the report as plain JSON types, under the names of its attributes."""
    values = dataclasses.asdict(report)
    values["hbm_per_chip_bytes"]["headroom"] = report.hbm_per_chip_bytes.headroom
    return values


def verdict(report: CompileReport) -> str:
    """Return one line: whether the run fits and, if not, what to change."""
    hbm, place = report.hbm_per_chip_bytes, _place(report)
    if report.fits:
        return (
            f"{report.experiment} ({report.program}) fits {place}: {hbm.peak / GIB:.2f} of {hbm.limit / GIB:.2f} GiB "
            "of HBM per chip"
        )
    fixes = "; ".join(f"{fix.change} (about {fix.bytes / GIB:.1f} GiB)" for fix in report.fixes)
    other = "fewer or shorter texts, or more of mesh.tensor" if report.program == "sample" else "more chips"
    return (
        f"{report.experiment} ({report.program}) does not fit {place}: {hbm.peak / GIB:.2f} GiB per chip, "
        f"{-hbm.headroom / GIB:.2f} GiB above the {hbm.limit / GIB:.2f} that programs may use; try "
        + (f"one of: {fixes}" if fixes else other)
    )


def show(report: CompileReport, console: Console | None = None) -> None:
    """Print the report as tables, with its warnings and the verdict."""
    console = console or Console()
    console.print(_summary(report))
    if report.collectives:
        console.print(_collectives(report.collectives))
    for warning in report.warnings:
        console.print(f"note: {warning}", soft_wrap=True, highlight=False)
    console.print(verdict(report), soft_wrap=True, highlight=False)


def _summary(report: CompileReport) -> Table:
    hbm = report.hbm_per_chip_bytes
    split = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    title = f"{report.experiment} ({report.program}) on {_place(report)}, {report.chips} chips: {split}"
    table = Table("", "", "", title=title, show_header=False)
    table.add_row(
        "HBM per chip", f"{hbm.peak / GIB:.2f} GiB", f"of {hbm.limit / GIB:.2f}: {hbm.headroom / GIB:+.2f} left"
    )
    for name in ("params", "optimizer", "temporary"):
        table.add_row(f"  {name}", f"{getattr(hbm, name) / GIB:.2f} GiB")
    table.add_section()
    table.add_row("model FLOPs a step", f"{report.model_flops:.3e}")
    if report.executed_flops:
        extra = report.executed_flops / report.model_flops - 1
        note = f"{extra:+.0%}, computed again to save memory" if extra else ""
        table.add_row("executed FLOPs", f"{report.executed_flops:.3e}", note)
    table.add_row("compile time", f"{report.compile_seconds:.0f} s")
    if report.roofline_seconds:
        terms = report.roofline_seconds
        table.add_section()
        table.add_row("a step, at least", _seconds(terms.total))
        for name, meaning in TERMS.items():
            seconds = getattr(terms, name)
            if seconds:
                table.add_row(f"  {name}", _seconds(seconds), f"{seconds / terms.total:.0%}, {meaning}")
        table.add_row("MFU, at most", f"{report.estimated_mfu:.1%}")
    return table


def _collectives(collectives: tuple[Traffic, ...]) -> Table:
    table = Table("collective", "over", "group", "overlapped", "runs", "sent per chip", "time", title="Traffic")
    for traffic in collectives:
        overlapped = "yes" if traffic.asynchronous else "no"
        size, seconds = f"{traffic.bytes / GIB:.3f} GiB", _seconds(traffic.seconds)
        table.add_row(
            traffic.kind, traffic.network, str(traffic.group_size), overlapped, str(traffic.runs), size, seconds
        )
    return table


def _place(report: CompileReport) -> str:
    return report.topology if report.slices == 1 else f"{report.slices} x {report.topology}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms" if seconds >= 1e-5 else "< 0.01 ms"
