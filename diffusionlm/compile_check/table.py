"""A compile report for readers: a table in the terminal, JSON for programs."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from diffusionlm.compile_check.compile import CompileReport
from diffusionlm.hardware import GIB

TERMS = {
    "compute": "matmuls at the peak of the chips",
    "memory": "kernels waiting for HBM beyond that",
    "ici": "collectives within a slice that nothing hides",
    "dcn": "collectives between slices that nothing hides",
}


def to_json(report: CompileReport) -> dict[str, Any]:
    """The report as plain JSON types, under the names of its attributes."""
    found = dataclasses.asdict(report)
    found["hbm_per_chip_bytes"]["headroom"] = report.hbm_per_chip_bytes.headroom
    return found


def verdict(report: CompileReport) -> str:
    """One line: whether it fits, and what to do if not."""
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
    """Prints the report."""
    console = console or Console()
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
        again = report.executed_flops / report.model_flops - 1
        why = f"{again:+.0%}, computed again to save memory" if again else ""
        table.add_row("executed FLOPs", f"{report.executed_flops:.3e}", why)
    table.add_row("compile time", f"{report.compile_seconds:.0f} s")
    if report.roofline_seconds:
        table.add_section()
        table.add_row("a step, at least", _seconds(report.estimated_step_seconds))
        for name, meaning in TERMS.items():
            seconds = getattr(report.roofline_seconds, name)
            share = f"{seconds / report.estimated_step_seconds:.0%}, "
            if seconds:
                table.add_row(f"  {name}", _seconds(seconds), share + meaning)
        table.add_row("MFU, at most", f"{report.estimated_mfu:.1%}")
    console.print(table)
    if report.collectives:
        traffic = Table("collective", "over", "group", "overlapped", "runs", "sent per chip", "time", title="Traffic")
        for one in report.collectives:
            overlapped = "yes" if one.asynchronous else "no"
            size, seconds = f"{one.bytes / GIB:.3f} GiB", _seconds(one.seconds)
            traffic.add_row(one.kind, one.network, str(one.group_size), overlapped, str(one.runs), size, seconds)
        console.print(traffic)
    for warning in report.warnings:
        console.print(f"note: {warning}", soft_wrap=True, highlight=False, markup=False)
    console.print(verdict(report), soft_wrap=True, highlight=False, markup=False)


def _place(report: CompileReport) -> str:
    return report.topology if report.slices == 1 else f"{report.slices} x {report.topology}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms" if seconds >= 1e-5 else "< 0.01 ms"
