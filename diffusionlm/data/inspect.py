"""A prepared dataset for human eyes: decoded records and statistics (`diffusionlm data inspect`)."""

import os

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from diffusionlm.data.pipeline import Dataset, open_dataset
from diffusionlm.errors import UserError

EXAMINED = 2048  # rows, from the first on, behind the token frequencies and document lengths
FREQUENT = 12  # tokens listed
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
COLOURS = ("", "cyan")  # of documents in turn


def describe(path: str | os.PathLike, count: int = 3, split: str = "train") -> dict:
    """What `inspect` shows, in JSON types.

    Args:
      path: a directory that `prepare` made.
      count: records to decode, spread evenly over the split.
      split: where they and the token statistics come from.

    Returns:
      {"path", "sha256", "tokenizer", "sequence_length", "packing", "template": its name, "splits": {name: counts},
      "examined": rows behind the next two, "frequent_tokens": [{"id", "text", "share"}], "document_tokens": {quantile:
      tokens}, "records": [{"index", "documents": [text]}]}; with packing "examples" documents are dialogues there, and
      the texts of a record are prompts and answers in turn

    Raises:
      UserError: no dataset, no such split, or a negative count.
    """
    if count < 0:
        raise UserError(f"count={count} must not be negative")
    dataset = open_dataset(path)
    metadata, tokenizer = dataset.metadata, dataset.tokenizer
    rows = dataset.rows(split, range(min(EXAMINED, dataset.size(split))))
    examined = rows["tokens"]
    counts = np.bincount(examined.ravel(), minlength=metadata.vocab_size)
    frequent = np.argsort(-counts, kind="stable")[:FREQUENT]
    if metadata.packing == "examples":
        real = rows["segment_ids"] != 0
        counts, lengths = np.bincount(examined[real], minlength=metadata.vocab_size), real.sum(1)
    else:
        ends = np.flatnonzero(examined.ravel() == tokenizer.eos_id)
        lengths = np.diff(ends, prepend=-1)  # rows follow each other without a gap, so documents are whole here
    indices = np.linspace(0, dataset.size(split) - 1, min(count, dataset.size(split))).astype(int)
    return {
        "path": str(dataset.path),
        "sha256": metadata.sha256,
        "tokenizer": {name: metadata.tokenizer[name] for name in ("kind", "sha256")}
        | {"vocab_size": metadata.vocab_size},
        "sequence_length": metadata.sequence_length,
        "packing": metadata.packing,
        "template": metadata.template and metadata.template["name"],
        "splits": {
            name: {
                "records": one.records,
                "documents": one.documents,
                "tokens": one.tokens,
                "raw_bytes": one.raw_bytes,
                "bytes_per_token": one.raw_bytes / one.tokens,
            }
            for name, one in metadata.splits.items()
        },
        "examined": len(examined),
        "frequent_tokens": [
            {"id": int(i), "text": _name(dataset, int(i)), "share": float(counts[i] / counts.sum())}
            for i in frequent
            if counts[i]
        ],
        "document_tokens": {str(q): float(np.quantile(lengths, q)) for q in QUANTILES} if len(lengths) else {},
        "records": [{"index": int(i), "documents": _documents(dataset, split, int(i))} for i in indices],
    }


def inspect(path: str | os.PathLike, count: int = 3, split: str = "train") -> dict:
    """Prints what `describe` gives, with documents in alternating colours and their ends marked; returns it too."""
    found = describe(path, count, split)
    console = Console(highlight=False)
    kind, vocab_size = found["tokenizer"]["kind"], found["tokenizer"]["vocab_size"]
    console.print(
        f"{found['path']}: records of {found['sequence_length']} + 1 tokens, {kind} tokenizer of {vocab_size:,} ids, "
        f"sha256 {found['sha256'][:12]}",
        soft_wrap=True,
        markup=False,
    )
    what = "documents" if found["packing"] == "chunk" else "answers"
    table = Table("split", "records", what, "tokens", "bytes", "bytes/token")
    for name, one in found["splits"].items():
        whole = (f"{one[key]:,}" for key in ("records", "documents", "tokens", "raw_bytes"))
        table.add_row(name, *whole, f"{one['bytes_per_token']:.3f}")
    console.print(table)
    console.print(f"first {found['examined']:,} rows of {split}", markup=False)
    quantiles = (f"{float(q):.0%} {length:.0f}" for q, length in found["document_tokens"].items())
    console.print(
        f"  tokens a {'document' if found['packing'] == 'chunk' else 'dialogue'}, quantiles: " + ", ".join(quantiles),
        markup=False,
    )
    frequent = (f"{token['text']!r} {token['share']:.1%}" for token in found["frequent_tokens"])
    console.print("  most frequent tokens: " + ", ".join(frequent), markup=False)
    for record in found["records"]:
        body = Text()
        for i, text in enumerate(record["documents"]):
            if i and found["packing"] == "chunk":
                body.append(" ■ end of document\n", style="bold red")
            body.append(text, style=COLOURS[i % 2])
        console.print(Panel(body, title=f"{split} record {record['index']:,}", title_align="left"))
    return found


def _name(dataset: Dataset, i: int) -> str:
    return "EOS" if i == dataset.tokenizer.eos_id else dataset.tokenizer.decode([i])


def _documents(dataset: Dataset, split: str, index: int) -> list[str]:
    """The decoded pieces of documents in one record."""
    row = {name: values[0] for name, values in dataset.rows(split, [index]).items()}
    if dataset.metadata.packing == "examples":
        row = {name: values[row["segment_ids"] != 0] for name, values in row.items()}
    starts = np.flatnonzero(np.diff(row["segment_ids"])) + 1
    return [dataset.tokenizer.decode(ids.tolist()) for ids in np.split(row["tokens"], starts)]
