"""Cut the token stream of each split into ArrayRecord shards that TFDS can read.

The stream of a split holds all of its documents in order, each followed by EOS (see `words`), in a file for each piece
of the source. Another file says where each dialogue goes. So the records do not depend on who makes them.
"""

import contextlib
import functools
import hashlib
import json
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath

from diffusionlm.data import dialogues
from diffusionlm.data.dialogues import Layout
from diffusionlm.data.jobs import Receipt, Runner
from diffusionlm.data.metadata import SplitMetadata
from diffusionlm.data.tfds_files import DATASET_NAME, record_dtypes, serialize, shard_names
from diffusionlm.data.words import Counts, split_words, word_type
from diffusionlm.errors import StorageError, UserError
from diffusionlm.progress import Bars
from diffusionlm.storage import in_bucket, write_atomically
from diffusionlm.untrusted import printable

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

SHARD_TOKENS = 1 << 26  # of the largest shards, which hold 32k records of 2048 tokens
# A split has this many shards, which as many processes write, though fewer would hold it: of at least 2 M tokens each.
FEW_SHARDS, FEW_TOKENS = 8, 1 << 21
BLOCK_TOKENS = 1 << 20  # read at a time while a shard is written
BLOCK_BYTES = 1 << 22  # read at a time while a stream is hashed


class BuildContext(NamedTuple):
    """The directory in which a dataset is built, and the means."""

    directory: epath.Path  # of jobs, which all workers see
    run: Runner  # does jobs
    bars: Bars
    total: int  # bytes of all sources

    @contextlib.contextmanager
    def bar(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Show a bar while the context lasts; yield a function that moves it by some bytes."""
        task = self.bars.add_task(title, total=self.total if total is None else total)
        yield functools.partial(self.bars.advance, task)


class TokenStream:
    """The token stream of one split while it grows: the words that each piece gave, in files, and their counts."""

    def __init__(self, word: np.dtype):
        self.sha256, self._word = hashlib.sha256(), word
        self._lengths: list[np.ndarray] = []
        self._files: list[tuple[str, int]] = []
        self.words, self.counts = 0, Counts()

    def append(self, file: str, words: int, counts: Counts) -> None:
        """Append the documents of a piece.

        Args:
          file: the file of its words.
          words: their number.
          counts: of its documents.

        Raises:
          StorageError: the file has another number of words.
        """
        size = 0
        with epath.Path(file).open("rb") as opened:
            while block := opened.read(BLOCK_BYTES):
                self.sha256.update(block)
                size += len(block)
        _require_size(file, size, words * self._word.itemsize)
        self._files.append((file, words))
        self.words += words
        self.counts = Counts.sum([self.counts, counts])

    def append_lengths(self, file: str, dialogues: int) -> None:
        """Append the words of each dialogue of a piece, which a file has.

        Raises:
          StorageError: the file has another number of them.
        """
        data = epath.Path(file).read_bytes()
        _require_size(file, len(data), dialogues * 8)
        self._lengths.append(np.frombuffer(data, "<i8"))

    def content_sha256(self) -> str:
        """Return the hash of all words and then of all lengths, however they were appended."""
        content = self.sha256.copy()
        content.update(self.lengths().data)
        return content.hexdigest()

    def lengths(self) -> np.ndarray:
        """Return the words of each dialogue, int64 (dialogues,); of texts, nothing."""
        return np.concatenate([np.empty(0, np.int64), *self._lengths]).astype("<i8")

    def write_index(self, path: epath.Path) -> None:
        """Write the files of the stream and the numbers of their words, for `read_words`."""
        write_atomically(path, json.dumps(self._files))


def _require_size(file: str, size: int, expected: int) -> None:
    if size != expected:
        raise StorageError(
            f"{printable(file)} has {size} bytes, not {expected}: unfinished work was damaged; remove the directory "
            "above it, and give the same command again"
        )


def read_words(index_file: str, start: int, stop: int, word: np.dtype) -> np.ndarray:
    """Return the words `start` to `stop` of a stream, of which `TokenStream.write_index` wrote the files.

    Raises:
      StorageError: a file has fewer words than it had.
    """
    files, ends = read_index(index_file)
    words = np.empty(stop - start, word)
    position = start
    for number in range(int(np.searchsorted(ends, start, side="right")), len(files)):
        if position >= stop:
            break
        first, last = position - (int(ends[number - 1]) if number else 0), min(stop, int(ends[number]))
        with epath.Path(files[number]).open("rb") as file:
            file.seek(first * word.itemsize)
            block = file.read((last - position) * word.itemsize)
        _require_size(files[number], len(block), (last - position) * word.itemsize)
        words[position - start : last - start] = np.frombuffer(block, word)
        position = last
    return words


@functools.lru_cache(maxsize=4)
def read_index(index_file: str) -> tuple[list[str], np.ndarray]:
    """Return the files of a stream, and the number of words up to the end of each."""
    files = json.loads(epath.Path(index_file).read_text())
    return [file for file, _ in files], np.cumsum([words for _, words in files], dtype=np.int64)


class RecordFormat(NamedTuple):
    """The shape of records."""

    sequence_length: int  # tokens that a model sees; a record holds one more
    vocab_size: int
    eos_id: int

    @property
    def length(self) -> int:
        """Tokens of a record."""
        return self.sequence_length + 1

    @property
    def word(self) -> np.dtype:
        """The dtype of the stream's words."""
        return word_type(self.vocab_size)

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """The dtypes of the arrays of a record."""
        return record_dtypes(self.vocab_size, self.length)

    def features(self) -> "tfds.features.FeaturesDict":
        """Return the TFDS features: `tokens`, and `segment_ids` that number a record's documents from 1."""
        import tensorflow_datasets as tfds  # here, because workers that only encode do without

        tensor = functools.partial(tfds.features.Tensor, shape=(self.length,), encoding="bytes")
        return tfds.features.FeaturesDict({name: tensor(dtype=dtype) for name, dtype in self.dtypes.items()})


@dataclass(frozen=True)
class ShardJob:
    """Records `first` to `stop` of a stream, which become one shard of a split."""

    directory: str
    format: RecordFormat
    split: str
    first: int
    stop: int
    index: int
    shards: int
    is_text: bool  # to be cut; else dialogues, to be laid out

    @property
    def stream(self) -> str:
        """The index of the stream (see `read_words`)."""
        return f"{self.directory}/parts/{self.split}.stream.json"

    @property
    def layout(self) -> str:
        """The three arrays of `Layout`, int64, of dialogues."""
        return f"{self.directory}/parts/{self.split}.layout"

    @property
    def name(self) -> str:
        """The name of the shard, as TFDS expects."""
        return shard_names(self.split, self.shards)[self.index]

    @property
    def receipt(self) -> str:
        """The file with its size."""
        return f"{self.directory}/parts/{self.name}.json"

    @property
    def records(self) -> int:
        """Number of records in the shard."""
        return self.stop - self.first

    def work(self) -> Receipt:
        """Write the shard; return its size and the serialized bytes of its records, before compression."""
        path = epath.Path(self.directory) / self.name
        if in_bucket(path):  # ArrayRecord writes on disks
            with tempfile.TemporaryDirectory() as folder:
                serialized_bytes = write_shard(self, local := f"{folder}/{self.name}")
                epath.Path(local).copy(path, overwrite=True)
        else:
            partial = path.with_name("parts") / f"{self.name}.{uuid.uuid4().hex[:8]}.partial"
            serialized_bytes = write_shard(self, str(partial))
            partial.replace(path)
        return {"serialized_bytes": serialized_bytes, "bytes": path.stat().length}


def write_records(
    context: BuildContext, format: RecordFormat, streams: Mapping[str, TokenStream], *, packing: str
) -> dict[str, SplitMetadata]:
    """Turn streams into shards of records, with the metadata of TFDS.

    Args:
      context: the directory, and how jobs are run.
      format: of the records.
      streams: by split; each has enough words for one record (see `count_records`).
      packing: "chunk"; or for dialogues "examples", or "packed_examples", which packs those of the training split.
        Held-out dialogues stay alone, so that an evaluation does not depend on the packing.

    Returns:
      The metadata of each split.
    """
    jobs = {split: _plan_shards(context.directory, split, stream, format, packing) for split, stream in streams.items()}
    all_jobs = [job for split in jobs.values() for job in split]
    record_bytes = format.length * format.word.itemsize
    receipts = []
    with context.bar("writing", sum(job.records for job in all_jobs) * record_bytes) as advance:
        for job, receipt in zip(all_jobs, context.run(all_jobs), strict=True):
            receipts.append(receipt)
            advance(job.records * record_bytes)
    write_tfds_metadata(context.directory, all_jobs, [receipt["serialized_bytes"] for receipt in receipts])
    sizes = {job.name: receipt["bytes"] for job, receipt in zip(all_jobs, receipts, strict=True)}
    return {
        split: SplitMetadata(
            records=jobs[split][-1].stop,
            documents=stream.counts.documents,
            tokens=stream.counts.tokens,
            raw_bytes=stream.counts.raw_bytes,
            token_bytes=stream.counts.token_bytes,
            sha256=stream.content_sha256(),
            shards={job.name: sizes[job.name] for job in jobs[split]},
        )
        for split, stream in streams.items()
    }


def _plan_shards(
    directory: epath.Path, split: str, stream: TokenStream, format: RecordFormat, packing: str
) -> list[ShardJob]:
    if packing != "chunk":
        packed = packing == "packed_examples" and split == "train"
        layout = Layout.of(stream.lengths(), format.sequence_length, packed=packed)
        write_atomically(directory / "parts" / f"{split}.layout", np.stack(layout).astype("<i8").tobytes())
        count = int(layout.records_D[-1]) + 1
    elif not (count := stream.words // format.length):
        raise UserError(
            f"split {split!r} has {stream.words} tokens, too few for one record of {format.length}; give more text, "
            "a shorter sequence_length or, for validation, a source or another validation_fraction"
        )
    stream.write_index(directory / "parts" / f"{split}.stream.json")
    shards = min(count, count_shards(count * format.length))
    bounds = [count * i // shards for i in range(shards + 1)]
    return [
        ShardJob(str(directory), format, split, bounds[i], bounds[i + 1], i, shards, packing == "chunk")
        for i in range(shards)
    ]


def count_shards(tokens: int) -> int:
    """Return the number of shards of a split, which is a function of its tokens alone."""
    return max(-(-tokens // SHARD_TOKENS), min(FEW_SHARDS, tokens // FEW_TOKENS))


def write_shard(job: ShardJob, path: str) -> int:
    """Write the records of one shard to a disk; return their serialized bytes, before compression.

    Raises:
      OSError: the disk is full, for instance.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    dtypes = job.format.dtypes
    serialized_bytes, step = 0, max(1, BLOCK_TOKENS // job.format.length)
    rows = _cut_texts(job) if job.is_text else _read_dialogues(job)
    writer = ArrayRecordWriter(path, "group_size:1")  # a record a group: random access reads no more
    try:
        for start in range(job.first, job.stop, step):
            tokens_NxT, segment_ids_NxT = rows(start, min(start + step, job.stop))
            tokens_NxT = tokens_NxT.astype(dtypes["tokens"])
            segment_ids_NxT = segment_ids_NxT.astype(dtypes["segment_ids"])
            for tokens, segment_ids in zip(tokens_NxT, segment_ids_NxT, strict=True):
                record = serialize({"tokens": tokens, "segment_ids": segment_ids})
                serialized_bytes += len(record)
                writer.write(record)
        writer.close()
    except RuntimeError as error:  # how ArrayRecord reports a full disk
        raise OSError(str(error)) from error
    return serialized_bytes


Rows = Callable[[int, int], tuple[np.ndarray, np.ndarray]]  # records of a range: tokens, segment ids


def _cut_texts(job: ShardJob) -> Rows:
    length, word = job.format.length, job.format.word

    def rows(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        words = read_words(job.stream, start * length, stop * length, word)
        tokens_NxT, starts_NxT = split_words(words.reshape(-1, length))
        starts_NxT = starts_NxT.astype(np.uint32)
        starts_NxT[:, 0] = 1  # the rest of a document that began in the record before
        return tokens_NxT, np.cumsum(starts_NxT, axis=1, dtype=np.uint32)

    return rows


def _read_dialogues(job: ShardJob) -> Rows:
    layout = Layout(*np.frombuffer(epath.Path(job.layout).read_bytes(), "<i8").reshape(3, -1))
    ends = np.concatenate([[0], np.cumsum(layout.lengths_D)])

    def rows(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        first, last = np.searchsorted(layout.records_D, [start, stop])
        words = read_words(job.stream, int(ends[first]), int(ends[last]), job.format.word)
        return dialogues.lay_out(words, layout.part(start, stop), job.format.length, job.format.eos_id)

    return rows


def write_tfds_metadata(directory: epath.Path, jobs: Sequence[ShardJob], sizes: Sequence[int]) -> None:
    """Make `directory`, with the shards of these jobs, readable by `tfds.builder_from_directory`.

    Args:
      directory: where the shards are.
      jobs: that wrote them.
      sizes: serialized bytes of each, which `write_shard` returned.
    """
    import tensorflow_datasets as tfds

    infos = []
    for split in dict.fromkeys(job.split for job in jobs):
        shards = [(job, size) for job, size in zip(jobs, sizes, strict=True) if job.split == split]
        template = tfds.core.ShardedFileTemplate(
            data_dir=epath.Path(directory), dataset_name=DATASET_NAME, split=split, filetype_suffix="array_record"
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[job.records for job, _ in shards],
                num_bytes=sum(size for _, size in shards),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=str(directory),
        features=jobs[0].format.features(),
        split_infos=infos,
        description="Token records of diffusionlm; meta.json has the tokenizer and the counts.",
        check_data=False,  # the check needs TensorFlow
    )
