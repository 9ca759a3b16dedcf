"""Show a prepared dataset: decoded records and statistics (`diffusionlm data inspect`)."""

import os
from typing import Any

import numpy as np
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from diffusionlm.console import Console
from diffusionlm.data.dialogues import places
from diffusionlm.data.pipeline import Batch, Dataset, open_dataset
from diffusionlm.scalars import whole

EXAMINED_ROWS = 2048  # from the first on, for the token frequencies and document lengths
FREQUENT = 12  # tokens listed
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
COLOURS = ("", "cyan")  # of documents in turn


def describe(path: str | os.PathLike, count: int = 3, split: str = "train") -> dict[str, Any]:
    """Return what `inspect` shows, in JSON types.

    Args:
      path: a directory that `prepare` made.
      count: records to decode, spread evenly over the split.
      split: the split that these records and the token statistics come from.

    Returns:
      {"path", "sha256", "tokenizer", "sequence_length", "packing", "template": its name, "splits": {name: counts},
      "examined": rows for the next two, "frequent_tokens": [{"id", "text", "share"}], "document_tokens": {quantile:
      tokens}, "records": [{"index", "documents": [text]}]}; with packing "examples" or "packed_examples" documents are
      dialogues there, and the texts of a record are prompts and answers in turn.

    Raises:
      UserError: there is no dataset or no such split, or the count is negative.
    """
    count = whole("count", count, 0, "not be negative")
    dataset = open_dataset(path)
    metadata = dataset.metadata
    size = dataset.size(split)
    indices = np.linspace(0, size - 1, min(count, size)).astype(int)
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
                "records": counts.records,
                "documents": counts.documents,
                "tokens": counts.tokens,
                "raw_bytes": counts.raw_bytes,
                "bytes_per_token": counts.raw_bytes / counts.tokens,
            }
            for name, counts in metadata.splits.items()
        },
        **_statistics(dataset, split),
        "records": [{"index": int(i), "documents": _documents(dataset, split, int(i))} for i in indices],
    }


def _statistics(dataset: Dataset, split: str) -> dict[str, Any]:
    """Return the token frequencies and document lengths of the first rows."""
    tokenizer, vocab_size = dataset.tokenizer, dataset.metadata.vocab_size
    rows = dataset.rows(split, range(min(EXAMINED_ROWS, dataset.size(split))))
    if dataset.metadata.packing != "chunk":
        texts = [row[place] for row, place in _dialogues(rows)]
        tokens, lengths = np.concatenate(texts), np.array([len(text) for text in texts])
    else:
        tokens = rows["tokens"].ravel()
        ends = np.flatnonzero(tokens == tokenizer.eos_id)
        lengths = np.diff(ends, prepend=-1)  # rows follow each other without a gap, so documents are whole here
    counts = np.bincount(tokens, minlength=vocab_size)
    frequent = np.argsort(-counts, kind="stable")[:FREQUENT]
    return {
        "examined": len(rows["tokens"]),
        "frequent_tokens": [
            {
                "id": int(i),
                "text": "EOS" if i == tokenizer.eos_id else tokenizer.decode([int(i)]),
                "share": float(counts[i] / counts.sum()),
            }
            for i in frequent
            if counts[i]
        ],
        "document_tokens": {str(q): float(np.quantile(lengths, q)) for q in QUANTILES} if len(lengths) else {},
    }


def _documents(dataset: Dataset, split: str, index: int) -> list[str]:
    """Return the decoded pieces of documents in one record."""
    rows = dataset.rows(split, [index])
    tokens, segment_ids = rows["tokens"][0], rows["segment_ids"][0]
    if dataset.metadata.packing != "chunk":  # without padding
        real = np.concatenate([np.arange(place.start, place.stop) for _, place in _dialogues(rows)])
        tokens, segment_ids = tokens[real], segment_ids[real]
    starts = np.flatnonzero(np.diff(segment_ids)) + 1
    return [dataset.tokenizer.decode(ids.tolist()) for ids in np.split(tokens, starts)]


def _dialogues(rows: Batch) -> list[tuple[np.ndarray, slice]]:
    """Return the tokens of the row, and the place in it, of every dialogue in some records."""
    return [
        (tokens, place)
        for tokens, parts in zip(rows["tokens"], rows["segment_ids"], strict=True)
        for place, _ in places(parts)
    ]


def inspect(path: str | os.PathLike, count: int = 3, split: str = "train") -> dict[str, Any]:
    """Print what `describe` returns, with documents in alternating colours and their ends marked; return it too.

    Args:
      path: a directory that `prepare` made.
      count: records to decode, spread evenly over the split.
      split: the split that these records and the token statistics come from.

    Raises:
      UserError: there is no dataset or no such split, or the count is negative.
    """
    values = describe(path, count, split)
    dialogues = values["packing"] != "chunk"
    console = Console(highlight=False)
    kind, vocab_size = values["tokenizer"]["kind"], values["tokenizer"]["vocab_size"]
    console.print(
        f"{values['path']}: records of {values['sequence_length']} + 1 tokens, {kind} tokenizer of {vocab_size:,} ids, "
        f"sha256 {values['sha256'][:12]}",
        soft_wrap=True,
    )
    table = Table("split", "records", "answers" if dialogues else "documents", "tokens", "bytes", "bytes/token")
    for name, counts in values["splits"].items():
        integers = (f"{counts[key]:,}" for key in ("records", "documents", "tokens", "raw_bytes"))
        table.add_row(name, *integers, f"{counts['bytes_per_token']:.3f}")
    console.print(table)
    console.print(f"first {values['examined']:,} rows of {split}")
    quantiles = (f"{float(q):.0%} {length:.0f}" for q, length in values["document_tokens"].items())
    unit = "dialogue" if dialogues else "document"
    console.print(f"  tokens a {unit}, quantiles: " + ", ".join(quantiles))
    frequent = (f"{token['text']!r} {token['share']:.1%}" for token in values["frequent_tokens"])
    console.print("  most frequent tokens: " + ", ".join(frequent))
    for record in values["records"]:
        console.print(_panel(record, split, dialogues))
    return values


def _panel(record: dict[str, Any], split: str, dialogues: bool) -> Panel:
    body = Text()
    for i, text in enumerate(record["documents"]):
        if i and not dialogues:
            body.append(" ■ end of document\n", style="bold red")
        body.append(text, style=COLOURS[i % 2])
    return Panel(body, title=Text(f"{split} record {record['index']:,}"), title_align="left")
