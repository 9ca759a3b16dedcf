"""Copies of one corpus in every format, written with the libraries that own the formats."""

import csv
import gzip
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

ROWS = 7  # of a row group, or of a record batch


def zst(data, frame_bytes=1000):
    """Return several frames, one after another, with a skippable one between the first two, as pzstd writes them."""
    parts = [data[start : start + frame_bytes] for start in range(0, len(data), frame_bytes)] or [b""]
    frames = [zstandard.ZstdCompressor().compress(part) for part in parts]
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"skip"
    return frames[0] + skippable + b"".join(frames[1:])


def lines(records, end="\n"):
    return "".join(json.dumps(record, ensure_ascii=False) + end for record in records).encode()


def table(records, delimiter):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def parquet(records, schema=None, rows=ROWS, **options):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records, schema), file, row_group_size=rows, **options)
    return file.getvalue()


def arrow(records, schema=None, rows=ROWS):
    """Return a stream of record batches, which is how `datasets` writes."""
    file = io.BytesIO()
    data = pa.Table.from_pylist(records, schema)
    with pa.ipc.new_stream(file, data.schema) as writer:
        for batch in data.to_batches(rows):
            writer.write_batch(batch)
    return file.getvalue()


def tar(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def tar_of_texts(records):
    return tar([(f"part/{i:04d}.txt", record["text"].encode()) for i, record in enumerate(records)])


def tar_of_pairs(records):
    members = []
    for i, record in enumerate(records):
        rest = {name: value for name, value in record.items() if name != "text"}
        members += [(f"{i:04d}.json", json.dumps(rest).encode()), (f"{i:04d}.txt", record["text"].encode())]
        members += [(f"{i:04d}.jpg", b"\xff\xd8")]
    return tar(members)


def tar_of_records(records):
    return tar([(f"{i:04d}.json", json.dumps(record, indent=1).encode()) for i, record in enumerate(records)])


def save_to_disk(folder, records, schema=None, shards=2):
    """Write what `datasets.Dataset.save_to_disk` writes, as far as it is read."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        part = records[len(records) * i // shards : len(records) * (i + 1) // shards]
        (folder / name).write_bytes(arrow(part, schema))
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


# Ending of the file -> its content.
COPIES = {
    ".jsonl": lines,
    ".jsonl.gz": lambda records: gzip.compress(lines(records)),
    ".jsonl.zst": lambda records: zst(lines(records)),
    ".lines.json": lines,
    ".list.json": lambda records: json.dumps(records, indent=1).encode(),
    ".list.json.zst": lambda records: zst(json.dumps(records).encode()),
    ".csv": lambda records: table(records, ","),
    ".csv.gz": lambda records: gzip.compress(table(records, ",")),
    ".csv.zst": lambda records: zst(table(records, ",")),
    ".tsv": lambda records: table(records, "\t"),
    ".tsv.zst": lambda records: zst(table(records, "\t")),
    ".parquet": parquet,
    ".snappy.parquet": lambda records: parquet(records, rows=10**6, compression="snappy", use_dictionary=False),
    ".arrow": arrow,
    ".texts.tar": tar_of_texts,
    ".pairs.tar": tar_of_pairs,
    ".pairs.tar.gz": lambda records: gzip.compress(tar_of_pairs(records)),
    ".records.tar.zst": lambda records: zst(tar_of_records(records)),
}
