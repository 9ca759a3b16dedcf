"""Cut the token stream of each split into ArrayRecord shards that TFDS can read.

The stream of a split holds all of its documents in order, each followed by EOS (see `words`). A file beside the stream
of dialogues says where each goes. So the records do not depend on the number of workers.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath

from diffusionlm.data import dialogues
from diffusionlm.data.dialogues import Layout
from diffusionlm.data.metadata import SplitMetadata
from diffusionlm.data.ordered_map import Map
from diffusionlm.data.tfds_files import DATASET_NAME, record_dtypes, shard_names
from diffusionlm.data.words import Counts, split_words, word_type
from diffusionlm.errors import UserError
from diffusionlm.progress import Bars

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

SHARD_TOKENS = 1 << 26  # a shard holds 32k records of 2048 tokens
BLOCK_TOKENS = 1 << 20  # read at a time while a shard is written


class BuildContext(NamedTuple):
    """The directory in which a dataset is built, and the means."""

    directory: Path
    map: Map  # runs jobs, in this process or in several
    bars: Bars


class TokenStream:
    """The token stream of one split while it grows, and its counts."""

    def __init__(self, path: Path):
        self.path, self.file, self.sha256 = path, path.open("wb"), hashlib.sha256()
        self._lengths: list[np.ndarray] = []
        self.words, self.counts = 0, Counts()

    def append(self, words: np.ndarray, lengths: np.ndarray, counts: Counts) -> None:
        """Append documents; `lengths` are the words of each dialogue, and empty for texts."""
        self.file.write(words.data)
        self.sha256.update(words.data)
        self._lengths.append(lengths)
        self.words += len(words)
        self.counts = Counts.sum([self.counts, counts])

    def content_sha256(self) -> str:
        """Return the hash of all words and then of all lengths, however they were appended."""
        content = self.sha256.copy()
        content.update(self.lengths().data)
        return content.hexdigest()

    def lengths(self) -> np.ndarray:
        """Return the words of each dialogue, int64 (dialogues,); of texts, nothing."""
        return np.concatenate([np.empty(0, np.int64), *self._lengths]).astype("<i8")


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

    stream: Path
    format: RecordFormat
    split: str
    first: int
    stop: int
    index: int
    shards: int
    layout: Path | None = None  # of dialogues: the three arrays of `Layout`, int64; None: texts, to be cut

    @property
    def file(self) -> Path:
        """The shard, named as TFDS expects, beside the stream."""
        return self.stream.with_name(shard_names(self.split, self.shards)[self.index])

    @property
    def records(self) -> int:
        """Number of records in the shard."""
        return self.stop - self.first


def write_records(
    context: BuildContext, format: RecordFormat, streams: Mapping[str, TokenStream], *, packing: str
) -> dict[str, SplitMetadata]:
    """Turn streams into shards of records, with the metadata of TFDS, and remove the streams.

    Args:
      context: the directory, and how jobs are run.
      format: of the records.
      streams: by split; each has enough words for one record (see `count_records`).
      packing: "chunk"; or for dialogues "examples", or "packed_examples", which packs those of the training split.
        Held-out dialogues stay alone, so that an evaluation does not depend on the packing.

    Returns:
      The metadata of each split.
    """
    jobs = {split: _plan_shards(split, stream, format, packing) for split, stream in streams.items()}
    all_jobs = [job for split in jobs.values() for job in split]
    record_bytes = format.length * format.word.itemsize
    bar = context.bars.add_task("writing", total=sum(job.records for job in all_jobs) * record_bytes)
    sizes = []
    for job, size in zip(all_jobs, context.map(write_shard, all_jobs), strict=True):
        sizes.append(size)
        context.bars.advance(bar, job.records * record_bytes)
    write_tfds_metadata(context.directory, all_jobs, sizes)
    splits = {}
    for split, stream in streams.items():
        stream.path.unlink()
        stream.path.with_suffix(".layout").unlink(missing_ok=True)
        splits[split] = SplitMetadata(
            records=jobs[split][-1].stop,
            documents=stream.counts.documents,
            tokens=stream.counts.tokens,
            raw_bytes=stream.counts.raw_bytes,
            token_bytes=stream.counts.token_bytes,
            sha256=stream.content_sha256(),
            shards={job.file.name: job.file.stat().st_size for job in jobs[split]},
        )
    return splits


def _plan_shards(split: str, stream: TokenStream, format: RecordFormat, packing: str) -> list[ShardJob]:
    file = None
    if packing != "chunk":
        packed = packing == "packed_examples" and split == "train"
        layout = Layout.of(stream.lengths(), format.sequence_length, packed=packed)
        file = stream.path.with_suffix(".layout")
        np.stack(layout).astype("<i8").tofile(file)
        count = int(layout.records_D[-1]) + 1
    elif not (count := stream.words // format.length):
        raise UserError(
            f"split {split!r} has {stream.words} tokens, too few for one record of {format.length}; give more text, "
            "a shorter sequence_length or, for validation, a source or another validation_fraction"
        )
    shards = -(-count * format.length // SHARD_TOKENS)
    bounds = [count * i // shards for i in range(shards + 1)]
    return [ShardJob(stream.path, format, split, bounds[i], bounds[i + 1], i, shards, file) for i in range(shards)]


def write_shard(job: ShardJob) -> int:
    """Write the records of one shard; return their serialized bytes, before compression.

    Raises:
      OSError: the disk is full, for instance.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    serializer, dtypes = job.format.features(), job.format.dtypes
    serialized_bytes, step = 0, max(1, BLOCK_TOKENS // job.format.length)
    rows = _read_dialogues(job, job.layout) if job.layout else _cut_texts(job)
    writer = ArrayRecordWriter(str(job.file), "group_size:1")  # a record a group: random access reads no more
    try:
        for start in range(job.first, job.stop, step):
            tokens_NxT, segment_ids_NxT = rows(start, min(start + step, job.stop))
            tokens_NxT = tokens_NxT.astype(dtypes["tokens"])
            segment_ids_NxT = segment_ids_NxT.astype(dtypes["segment_ids"])
            for tokens, segment_ids in zip(tokens_NxT, segment_ids_NxT, strict=True):
                record = serializer.serialize_example({"tokens": tokens, "segment_ids": segment_ids})
                serialized_bytes += len(record)
                writer.write(record)
        writer.close()
    except RuntimeError as error:  # how ArrayRecord reports a full disk
        raise OSError(str(error)) from error
    return serialized_bytes


Rows = Callable[[int, int], tuple[np.ndarray, np.ndarray]]  # records of a range: tokens, segment ids


def _cut_texts(job: ShardJob) -> Rows:
    stream, length = np.memmap(job.stream, job.format.word, mode="r"), job.format.length

    def rows(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        tokens_NxT, starts_NxT = split_words(stream[start * length : stop * length].reshape(-1, length))
        starts_NxT = starts_NxT.astype(np.uint32)
        starts_NxT[:, 0] = 1  # the rest of a document that began in the record before
        return tokens_NxT, np.cumsum(starts_NxT, axis=1, dtype=np.uint32)

    return rows


def _read_dialogues(job: ShardJob, layout_file: Path) -> Rows:
    stream = np.memmap(job.stream, job.format.word, mode="r")
    layout = Layout(*np.fromfile(layout_file, "<i8").reshape(3, -1))
    ends = np.concatenate([[0], np.cumsum(layout.lengths_D)])

    def rows(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        first, last = np.searchsorted(layout.records_D, [start, stop])
        words = stream[ends[first] : ends[last]]
        return dialogues.lay_out(words, layout.part(start, stop), job.format.length, job.format.eos_id)

    return rows


def write_tfds_metadata(directory: Path, jobs: Sequence[ShardJob], sizes: Sequence[int]) -> None:
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
