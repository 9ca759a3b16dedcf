"""The page of the observatory: its prose with its tables, from nothing but observatory.json."""

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sources
from jinja2 import Environment, FileSystemLoader, StrictUndefined

DASH = "-"
NAMES = {  # for tables
    "mdm_prime_v2 c4": "MDM-Prime-v2's plain models",
    "protein_lm unimeta200b": "proteins",
    "llama3 llama3_mix": "Llama 3",
    "epochai_chinchilla__massivetext__chinchilla massivetext": "Chinchilla, points of Epoch",
    "ml_scalefit__massivetext__chinchilla massivetext": "Chinchilla, points of ml-scalefit",
    "llama_3__raw_loss llama_3": "Llama 3, points of Open Athena",
    "marin_202603__comma__llama_2 comma": "Marin, Comma",
    "marin_202603__dclm__llama_2 dclm": "Marin, DCLM",
    "marin_202603__nemotron__llama_2 nemotron": "Marin, Nemotron",
    "misfitting__fineweb_c4__transformer fineweb_c4": "Misfitting, FineWeb on C4",
    "epoch_chinchilla massivetext": "Chinchilla, points of Epoch, all",
    "kyo_chinchilla massivetext": "Chinchilla, points of kyo-takano",
    "openeurollm english": "OpenEuroLLM",
    "isoflop_cpu": "isoflop_cpu (this repository)",
    "smdm": "SMDM's optima",
}


def name(full: str) -> str:
    """Return the name of an experiment for tables."""
    if full in NAMES:
        return NAMES[full]
    source, *corpus = full.split()
    if source == "kempner_loss_to_loss":
        return f"Kempner, {corpus[0]}"
    if source.startswith("porian"):
        # The rest is corpus, hyperparameters, warm-up, decay, count of N and kind of loss.
        return "Porian, " + " ".join(source.split("_")[1:])
    return full


def value(x: float | None, form: str = ".3f") -> str:
    """Return a number."""
    return DASH if x is None else format(x, form)


def est(e: Mapping[str, Any] | None, form: str = ".3f") -> str:
    """Return an estimate with its interval in brackets, where it has one."""
    if e is None or e["value"] is None:
        return DASH
    low, high = e.get("low"), e.get("high")
    if low is None or high is None:
        return value(e["value"], form)
    return f"{value(e['value'], form)} [{value(low, form)}, {value(high, form)}]"


def size(x: float | None) -> str:
    """Return a number of parameters or tokens."""
    if x is None:
        return DASH
    for unit, of in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= of:
            return f"{x / of:.3g}{unit}"
    return f"{x:.3g}"


def counted(of: Mapping[str, Any] | None) -> str:
    """Return an exponent, and in parentheses of how many optima."""
    return DASH if of is None or of["value"] is None else f"{est(of)} ({of['optima']})"


def mark(row: Mapping[str, Any]) -> str:
    """Return the mark of a row with a law that hangs on suspected cells."""
    return " ‡" if row["hanging"] else ""


def flops(x: float | None) -> str:
    """Return a number of FLOPs, as 3e+18 without the sign."""
    return DASH if x is None else f"{x:.3g}".replace("e+", "e")


def stated(published: Mapping[str, Any] | None) -> str:
    """Return a published exponent; an asterisk marks one that was not read in its source, a dagger 1 - b."""
    if published is None:
        return DASH
    text = est({"value": published["value"], "low": published["low"], "high": published["high"]})
    if published.get("from_b"):
        text = value(published["value"]) + " †"
    return text + (" \\*" if published.get("from_memory") else "")


def verdict(holds: bool | None) -> str:
    """Return whether an interval holds what was measured."""
    return {True: "yes", False: "**no**", None: "no interval"}[holds]


def measured(row: Mapping[str, Any]) -> str:
    """Return a prediction beside what was measured."""
    if row["quantity"] == "params":
        low, high = row["predicted"]["low"], row["predicted"]["high"]
        ends = "" if low is None or high is None else f" [{size(low)}, {size(high)}]"
        return f"{size(row['predicted']['value'])}{ends} | {size(row['measured'])}"
    return f"{est(row['predicted'])} | {row['measured']:.3f}"


def render(numbers: Mapping[str, Any]) -> str:
    """Return the page."""
    folder = FileSystemLoader(Path(__file__).parent)
    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=folder, keep_trailing_newline=True, autoescape=False, **options)
    helpers = (name, value, est, counted, mark, size, flops, stated, verdict, measured)
    environment.filters |= {helper.__name__: helper for helper in helpers}
    rows = {(row["name"], row["objective"]): row for row in numbers["exponents"]}
    laws = {(row["name"], row["kind"]): row for row in numbers["diffusion"]["laws"]}
    gaps = {row["name"]: row for row in numbers["twins"]}
    held = {(row["method"], row["quantity"]): row for row in numbers["summary"]["held_out"]}
    larger = {row["method"]: row for row in numbers["summary"]["larger_runs"]}
    cost = {(row["name"], row["kind"], row["budget"]): row for row in numbers["diffusion"]["cost"]}
    tables = {"rows": rows, "laws": laws, "gaps": gaps, "held": held, "larger": larger, "cost": cost}
    return filled(environment.get_template("page.md.jinja").render(n=numbers, origins=sources.ORIGINS, **tables))


def filled(text: str) -> str:
    """Break the lines of paragraphs and lists anew, since the numbers in them change their length."""
    blocks, code = [], False
    for block in text.split("\n\n"):
        fences = block.count("```")
        if not code and not fences and block.strip() and block.lstrip()[0] not in "|#!:":
            items = re.split(r"\n(?=- )", block.strip("\n"))
            block = "\n".join(_fill(item, "  " if item.startswith("- ") else "") for item in items)
        code ^= fences % 2 == 1
        blocks.append(block.strip("\n"))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _fill(text: str, indent: str) -> str:
    return textwrap.fill(
        " ".join(text.split()), 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
