"""Formats: copies of one corpus in any of them give the same items and the same dataset, and real rows too."""

import io
import json
import re
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpus_copies import COPIES, arrow, lines, parquet, save_to_disk, table, tar, zst
from support.datasets import expected_rows, prepare, rows, write_jsonl
from support.dialogues import QUESTION, prepare_dialogues, turns
from support.slow_cases import thinned

from diffusionlm.data import formats, identity, tokenizers
from diffusionlm.data.fields import Columns
from diffusionlm.data.items import read_text, record_of
from diffusionlm.data.text_files import Files, expand
from diffusionlm.errors import UserError

ROOT = Path(__file__).parents[2]
TEXT = Columns(("text",))


@pytest.fixture(scope="module")
def records(texts):
    more = ['said "no", twice\nand\tleft', "a\r\nb", ", , ;", "{é} 😀", "  spaces  "]
    return [{"text": text, "id": i, "source": "tests"} for i, text in enumerate([*texts[:60], *more])]


@pytest.fixture(scope="module")
def reference(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    path = write_jsonl(folder / "corpus.jsonl", [record["text"] for record in records])
    return prepare(str(path), folder / "out", validation_fraction=0.2)


def read(path, columns=TEXT):
    return [read_text(item, "text")[0] for item in Files([epath.Path(path)], columns)]


# --- copies


@pytest.mark.parametrize("ending", COPIES)
def test_every_copy_has_the_items(ending, records, tmp_path):
    path = tmp_path / f"corpus{ending}"
    path.write_bytes(COPIES[ending](records))
    assert read(path) == [record["text"] for record in records]
    items = list(Files([path]))
    least = 0.3 if ending.endswith((".arrow", ".parquet")) else 0.8  # these have headers and padding
    assert least * path.stat().st_size <= sum(item.progress for item in items)
    assert sum(item.progress for item in items) <= path.stat().st_size
    assert len({item.location for item in items}) == len(records)
    if ".texts." not in ending:
        found = [record_of(item) for item in items]
        assert [{**record, "id": int(record["id"])} for record in found] == records


@pytest.mark.parametrize("ending", thinned(COPIES, every=2))
def test_every_copy_is_the_same_dataset(ending, records, reference, tmp_path):
    path = tmp_path / f"corpus{ending}"
    path.write_bytes(COPIES[ending](records))
    metadata = prepare(str(path), tmp_path / "out", validation_fraction=0.2)
    assert metadata.sha256 == reference.sha256
    np.testing.assert_array_equal(
        rows(tmp_path / "out")["tokens"][:3],
        expected_rows([r["text"] for r in records if not held_out(r["text"])], tokenizers.load("byte"))[0][:3],
    )
    assert prepare(str(path), tmp_path / "out", validation_fraction=0.2) == metadata


def held_out(text):
    import hashlib

    return int(hashlib.sha256(text.encode()).hexdigest(), 16) < 0.2 * 2**256


def test_a_saved_dataset_is_the_same(records, reference, tmp_path):
    folder = save_to_disk(tmp_path / "saved" / "train", records)
    assert prepare(str(folder), tmp_path / "out", validation_fraction=0.2).sha256 == reference.sha256
    save_to_disk(tmp_path / "saved" / "test", records[:5])
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"is a dataset of several splits \(test, train\); name one"):
        prepare(str(tmp_path / "saved"), tmp_path / "refused")
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match="lacks data-00001-of-00002.arrow, which its state.json names"):
        prepare(str(folder), tmp_path / "refused")
    state = {"_data_files": [{"filename": "../test/data-00000-of-00002.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="it must be a name inside its directory"):
        prepare(str(folder), tmp_path / "refused")
    state = {"_data_files": [{"filename": "data-00000-of-00002.arrow"}], "_indices_data_files": [{"filename": "i"}]}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="flatten_indices"):
        prepare(str(folder), tmp_path / "refused")


def test_the_other_layout_of_arrow_files(records, tmp_path):
    data = pa.Table.from_pylist(records)
    file = io.BytesIO()
    with pa.ipc.new_file(file, data.schema) as writer:
        writer.write_table(data, 5)
    (tmp_path / "a.arrow").write_bytes(file.getvalue())
    assert read(tmp_path / "a.arrow") == [record["text"] for record in records]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet", ".records.tar.zst", ".arrow"])
def test_dialogues_come_in_every_format_with_fields(ending, tmp_path):
    dialogues = [{"messages": turns(QUESTION), "id": i, "note": None} for i in range(9)]
    write = {".arrow": arrow, ".parquet": parquet}.get(ending) or COPIES[ending]
    for name, content in (("a.jsonl", lines(dialogues)), (f"b{ending}", write(dialogues))):
        (tmp_path / name).write_bytes(content)
    plain, other = (prepare_dialogues(tmp_path / name, tmp_path / f"{name}.out") for name in ("a.jsonl", f"b{ending}"))
    assert plain.sha256 == other.sha256 and plain.splits["train"].documents == 9


def test_texts_hold_no_dialogues(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zst(b"text"))
    with pytest.raises(
        UserError, match="format=sft reads files of records, not .*; give files that end in .jsonl, .json, "
    ):
        prepare_dialogues(tmp_path / "a.txt.zst", tmp_path / "out")


def test_real_stories_in_parquet_and_zst(data_dir, tmp_path):
    source = Path(data_dir) / "tinystories" / "valid.jsonl"
    stories = [json.loads(line) for line in source.read_text().splitlines()][:1000]
    (tmp_path / "a.jsonl").write_bytes(lines(stories))
    (tmp_path / "a.parquet").write_bytes(parquet(stories, rows=1000))
    (tmp_path / "a.jsonl.zst").write_bytes(zst(lines(stories), 1 << 20))
    (tmp_path / "a.csv").write_bytes(table(stories, ","))
    plain, *others = (
        prepare(str(tmp_path / name), tmp_path / f"{name}.out", sequence_length=1023)
        for name in ("a.jsonl", "a.parquet", "a.jsonl.zst", "a.csv")
    )
    assert {other.sha256 for other in others} == {plain.sha256}
    assert plain.splits["train"].documents == len(stories)


# --- rows of tables


nested = st.fixed_dictionaries({"title": st.none() | st.text(max_size=5), "stars": st.none() | st.integers(0, 5)})
row = st.fixed_dictionaries({"text": st.none() | st.text(max_size=9), "meta": st.none() | nested})
SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("meta", pa.struct([("title", pa.string()), ("stars", pa.int64())])),
        ("tags", pa.list_(pa.string())),
    ]
)


@settings(max_examples=40, deadline=None)
@given(
    table=st.lists(row, max_size=20),
    group=st.integers(1, 8),
    write=st.sampled_from([(parquet, ".parquet"), (arrow, ".arrow")]),
    dictionary=st.booleans(),
)
def test_rows_are_those_of_pyarrow_for_any_groups(table, group, write, dictionary, tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / f"a{write[1]}"
    options = {"use_dictionary": dictionary} if write[0] is parquet else {}
    path.write_bytes(write[0](table, SCHEMA, rows=group, **options))
    found = [record_of(item) for item in Files([path])]
    assert found == [{**row, "tags": None} for row in table]
    titles = [record_of(item) for item in Files([path], Columns(("meta.title",)))]
    for record, row in zip(titles, table, strict=True):
        assert list(record) == ["meta"] and (record["meta"] or {}).get("title") == (row["meta"] or {}).get("title")


def test_only_the_columns_asked_for_are_read(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    data = [{"text": "a", "meta": {"title": "t", "stars": 1}, "meta.title": "flat", "big": "x" * 1000}] * 3
    path.write_bytes(parquet(data))
    read, asked = pq.ParquetFile.iter_batches, []

    def iter_batches(self, *args, **options):
        asked.append(options["columns"])
        return read(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    (record, *_) = (record_of(item) for item in Files([path], Columns(("text",), ("meta.stars",))))
    assert record == {"text": "a", "meta": {"stars": 1}} and asked == [["text", "meta.stars"]]
    (record, *_) = (record_of(item) for item in Files([path], Columns(("meta.title",))))
    assert record == {"meta.title": "flat"}, "an exact name comes first"


@pytest.mark.parametrize(
    "type_",
    [pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int8(), pa.string()), pa.string_view()],
)
def test_texts_of_other_types(type_, tmp_path):
    data = pa.table({"text": pa.array([b"ab", b"c\xc3\xa9"]).cast(pa.string()).cast(type_)})
    file = io.BytesIO()
    with pa.ipc.new_stream(file, data.schema) as writer:
        writer.write_table(data)
    (tmp_path / "a.arrow").write_bytes(file.getvalue())
    assert read(tmp_path / "a.arrow") == ["ab", "cé"]


def test_values_without_a_json_type_are_written_as_text_or_numbers(tmp_path):
    import datetime
    import decimal

    values = {"text": "a", "day": datetime.date(2024, 1, 2), "price": decimal.Decimal("1.50"), "raw": b"b"}
    (tmp_path / "a.parquet").write_bytes(parquet([values]))
    (item,) = Files([tmp_path / "a.parquet"])
    assert record_of(item) == {"text": "a", "day": "2024-01-02", "price": 1.5, "raw": "b"}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", ["", "\n", "\n\n"])
def test_line_ends_of_tables(end, last, tmp_path):
    content = f'text,id{end}"one{end}two",1{end}{end}three,2{last}'
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + content.encode())
    items = list(Files([tmp_path / "a.csv"]))
    texts = [read_text(item, "text")[0] for item in items]
    assert [text for text in texts if text] == [f"one{end}two", "three"]
    assert [item.location.rpartition(":")[2] for item in items][:3] == ["2", "4", "5"], "the lines of the file"


def test_large_cells_and_the_limit_of_the_process(tmp_path):
    import csv

    before = csv.field_size_limit()
    (tmp_path / "a.tsv").write_text("text\n" + "x" * 200_000 + "\n")
    assert read(tmp_path / "a.tsv") == ["x" * 200_000]
    assert csv.field_size_limit() == before


# --- names


def test_one_table_names_the_formats():
    known = [ending for format in formats.FORMATS for ending in format.endings]
    assert len(known) == len(set(known))
    page = (ROOT / "docs" / "own_text.md").read_text()
    for ending in known:
        assert re.search(rf"`[a-z_]*{re.escape(ending)}`", page), ending
        path = epath.Path(f"a{ending}")
        assert formats.of(path) is formats.of(epath.Path(f"b.x{ending}")) is not None
    assert formats.of(epath.Path("a.parquet.gz")) is None and formats.of(epath.Path("a.zst")) is None


def test_a_directory_is_read_for_its_data(tmp_path):
    def names():
        return [file.name for file in expand(str(tmp_path), dialogues=False)]

    for name, expected in {
        "info.json": ["info.json"],
        "labels.csv": ["labels.csv"],
        "a.txt": ["a.txt"],
        "README.md": ["README.md", "a.txt"],
        "b.parquet": ["b.parquet"],
        "c.arrow": ["b.parquet", "c.arrow"],
    }.items():
        (tmp_path / name).write_text("")
        assert names() == expected
    (tmp_path / "d.jsonl").write_text("")
    with pytest.raises(
        UserError, match=r"holds .parquet and .jsonl files; name those to read by a pattern, such as '.*/\*.parq"
    ):
        names()


def test_a_packed_copy_is_of_the_same_kind():
    def content(name):
        return identity.content_of({"name": name, "bytes": 1, identity.HASH: "x"})

    assert content("a.jsonl.zst") == content("b.jsonl.zst") != content("b.txt.zst")


@pytest.mark.parametrize(
    ("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow"), ("a.arrow", "pyarrow")]
)
def test_a_missing_package_is_asked_for(name, package, tmp_path, monkeypatch):
    import sys

    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    message = rf"a.*' needs the package {package}; in a checkout of diffusionlm, pip install -e '.\[corpora\]'"
    with pytest.raises(UserError, match=message) as error:
        prepare(str(tmp_path), tmp_path / "out")
    assert name in str(error.value) and "\n" not in str(error.value)


# --- stores of objects


@pytest.fixture
def store(monkeypatch):
    """A store in memory behind s3:// and hf://, which tells no times."""

    class Store(MemoryFileSystem):
        protocol = ("s3", "hf")
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + str(path).partition("://")[2].strip("/") if "://" in str(path) else "/" + str(path).strip("/")

        def glob(self, path, **options):
            return [name.lstrip("/") for name in super().glob(path, **options)]

    files = Store()
    backend = epath.backend.fsspec_backend
    monkeypatch.setattr(type(backend), "_get_filesystem", lambda self, name: files)
    monkeypatch.setattr(epath.gpath, "_is_tf_installed", lambda: False)
    monkeypatch.setattr(fsspec, "filesystem", lambda *args, **options: files)
    return files


@pytest.mark.parametrize("scheme", ["s3", "hf"])
def test_objects_of_a_store_are_read(scheme, store, records, reference, tmp_path):
    half = len(records) // 2
    store.pipe("/bucket/corpus/a.jsonl.zst", zst(lines(records[:half])))
    store.pipe("/bucket/corpus/b.parquet", parquet(records[half:]))
    source = [f"{scheme}://bucket/corpus/a.jsonl.zst", f"{scheme}://bucket/corpus/*.parquet"]
    metadata = prepare(source, tmp_path / "out", validation_fraction=0.2)
    assert metadata.sha256 == reference.sha256
    pieces = [piece for path in source[:1] for piece in Files(expand(path, dialogues=False), TEXT).pieces()]
    assert sum(1 for piece in pieces for _ in piece) == half
    # It tells no time, so that only its content says whether it is the same.
    content = zst(lines([{**record, "text": record["text"].swapcase()} for record in records[:half]]))
    store.pipe("/bucket/corpus/a.jsonl.zst", content)
    with pytest.raises(UserError, match="holds another dataset"):
        prepare(source, tmp_path / "out", validation_fraction=0.2)
    with pytest.raises(UserError, match="no such file, directory, pattern or corpus: .*absent"):
        prepare(f"{scheme}://bucket/absent.jsonl", tmp_path / "other")


def test_what_a_client_of_a_store_raises_is_one_line(store, tmp_path, monkeypatch):
    store.pipe("/owner/name/a.jsonl", b"{}")

    def refuse(*args, **options):
        raise RuntimeError("401 Unauthorized\nlog in")

    monkeypatch.setattr(type(store), "open", refuse)
    with pytest.raises(UserError, match="^cannot read 'hf://owner/name/a.jsonl': 401 Unauthorized$"):
        prepare("hf://owner/name/a.jsonl", tmp_path / "out")


def test_members_of_an_archive_that_are_no_documents(tmp_path):
    members = [
        ("._a.txt", b"\xff"),
        ("a.jpg", b"\xff"),
        ("b/c.en.txt", b"one"),
        ("b/c.fr.txt", b"two"),
        ("d.md", b"three"),
    ]
    (tmp_path / "a.tar").write_bytes(tar(members))
    assert read(tmp_path / "a.tar") == ["one", "two", "three"]
    assert [item.location for item in Files([tmp_path / "a.tar"])][0] == f"{tmp_path}/a.tar:b/c.en.txt"
