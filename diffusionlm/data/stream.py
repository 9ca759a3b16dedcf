"""The work of preparing that is done in parallel: a batch of documents to tokens, and a range of tokens to one shard.

Between the two lies one file a split, the token stream: all documents in order, each followed by EOS, a little-endian
word a token, the top bit set on each document's first token. So the records do not depend on the number of workers.
Instruction data go the same way (see `sft`): a document is a dialogue, the top bit marks its parts, and a file beside
the stream has the length of each.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from etils import epath

from diffusionlm.data import dialogues as sft
from diffusionlm.data.chat_templates import Template
from diffusionlm.data.sources import Item, text_of
from diffusionlm.data.tokenizers import kinds as tokenizers

NAME = "diffusionlm"  # of the dataset, as TFDS sees it
BLOCK_TOKENS = 1 << 20  # read at a time while a shard is written


@dataclass(frozen=True)
class TokenizeJob:
    """Items of one source, in order."""

    items: Sequence[Item]
    split: str  # "train": documents are held out for validation by their hash
    held_out: float  # fraction of the documents
    text_field: str
    tokenizer_file: Path  # JSON of `Tokenizer.to_dict`
    sequence_length: int
    template: Template | None = None  # of dialogues; None: the items are texts
    bos: bool = False  # of texts: BOS stands before each


@dataclass
class Part:
    """What a job adds to one split's stream."""

    words: np.ndarray
    lengths: np.ndarray  # of dialogues, in words; of texts, nothing
    documents: int
    tokens: int
    raw_bytes: int
    token_bytes: int
    too_long: int  # answers that are left out


@dataclass(frozen=True)
class Tokenized:
    """The outcome of a job."""

    parts: dict[str, Part]
    malformed: list[str]  # "location: reason"
    empty: int
    progress: int


def word_type(vocab_size: int) -> np.dtype:
    """The dtype of the token stream: a bit wider than the ids need."""
    return np.dtype("<u2" if vocab_size <= 1 << 15 else "<u4")


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to validation: by its text alone, so that equal documents fall into one split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < fraction * 2**64


def tokenize(job: TokenizeJob) -> Tokenized:
    """Encodes every document, ends it with EOS and sorts it into its split."""
    tokenizer, token_bytes = _tokenizer(job.tokenizer_file)
    word = word_type(tokenizer.vocab_size)
    found: dict[str, list[sft.Encoded]] = {}
    malformed, empty = [], 0
    for item in job.items:
        try:
            if job.template:
                one = sft.encode(item, job.template, tokenizer, token_bytes, word, job.sequence_length)
            else:
                one = _encode_text(item, job, tokenizer, token_bytes, word)
        except ValueError as error:
            malformed.append(f"{item.location}: {error}")
            continue
        if one is None:
            empty += 1
            continue
        split = "validation" if is_held_out(one.key, job.held_out) else job.split
        found.setdefault(split, []).append(one)
    parts = {}
    for split, documents in found.items():
        parts[split] = Part(
            np.concatenate([one.words for one in documents]),
            np.array([len(one.words) for one in documents if len(one.words) and job.template], np.int64),
            sum(one.documents for one in documents),
            sum(one.tokens for one in documents),
            sum(one.raw_bytes for one in documents),
            sum(one.token_bytes for one in documents),
            sum(one.too_long for one in documents),
        )
    return Tokenized(parts, malformed, empty, sum(item.progress for item in job.items))


def _encode_text(
    item: Item, job: TokenizeJob, tokenizer: tokenizers.Tokenizer, token_bytes: np.ndarray, word: np.dtype
) -> sft.Encoded | None:
    """A text with its EOS, and BOS where asked for; None where there is none."""
    text = text_of(item, job.text_field)
    if not text:
        return None
    words = np.array([*([tokenizer.bos_id] if job.bos else []), *tokenizer.encode(text), tokenizer.eos_id], word)
    stands_for = int(token_bytes[words].sum())
    words[0] |= word.type(1 << (8 * word.itemsize - 1))
    return sft.Encoded(text, words, 1, len(words), len(text.encode()), stands_for, 0)


@functools.lru_cache(maxsize=1)
def _tokenizer(file: Path) -> tuple[tokenizers.Tokenizer, np.ndarray]:
    tokenizer = tokenizers.from_dict(json.loads(file.read_text()))
    return tokenizer, tokenizer.token_bytes()


@dataclass(frozen=True)
class ShardJob:
    """Records `first` to `stop` of a stream, which become one shard of a split."""

    stream: Path
    first: int
    stop: int
    sequence_length: int
    vocab_size: int
    split: str
    index: int
    shards: int
    eos_id: int
    lengths: Path | None = None  # of dialogues: int64, the words of each in the stream; None: texts, to be cut

    @property
    def file(self) -> Path:
        """The shard, named as TFDS expects, beside the stream."""
        return self.stream.with_name(f"{NAME}-{self.split}.array_record-{self.index:05d}-of-{self.shards:05d}")


def features(sequence_length: int, vocab_size: int):
    """The TFDS features of a record: `tokens`, and `segment_ids` that number its documents from 1."""
    import tensorflow_datasets as tfds  # here, because workers that only encode do without

    length = sequence_length + 1
    tokens, segment_ids = (np.uint16 if ids < 1 << 16 else np.uint32 for ids in (vocab_size, length))
    return tfds.features.FeaturesDict(
        {
            "tokens": tfds.features.Tensor(shape=(length,), dtype=tokens, encoding="bytes"),
            "segment_ids": tfds.features.Tensor(shape=(length,), dtype=segment_ids, encoding="bytes"),
        }
    )


def write_shard(job: ShardJob) -> int:
    """Writes the records of one shard; returns their serialized bytes, before compression."""
    from array_record.python.array_record_module import ArrayRecordWriter

    serializer = features(job.sequence_length, job.vocab_size)
    serialized_bytes, step = 0, max(1, BLOCK_TOKENS // (job.sequence_length + 1))
    rows = _dialogues(job) if job.lengths else _cut_texts(job)
    writer = ArrayRecordWriter(str(job.file), "group_size:1")  # a record a group: random access reads no more
    try:
        for start in range(job.first, job.stop, step):
            stop = min(start + step, job.stop)
            tokens_NxT, segment_ids_NxT = (
                values.astype(serializer[name].np_dtype)
                for name, values in zip(("tokens", "segment_ids"), rows(start, stop), strict=True)
            )
            for tokens, segment_ids in zip(tokens_NxT, segment_ids_NxT, strict=True):
                record = serializer.serialize_example({"tokens": tokens, "segment_ids": segment_ids})
                serialized_bytes += len(record)
                writer.write(record)
        writer.close()
    except RuntimeError as error:  # how ArrayRecord tells of a full disk
        raise OSError(str(error)) from error
    return serialized_bytes


Rows = Callable[[int, int], tuple[np.ndarray, np.ndarray]]  # records of a range: tokens, segment ids


def _cut_texts(job: ShardJob) -> Rows:
    word, length = word_type(job.vocab_size), job.sequence_length + 1
    top_bit = 8 * word.itemsize - 1
    stream = np.memmap(job.stream, word, mode="r")

    def rows(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        words_NxT = stream[start * length : stop * length].reshape(-1, length)
        begins_NxT = (words_NxT >> top_bit).astype(np.uint32)
        begins_NxT[:, 0] = 1  # the rest of a document that began in the record before
        return words_NxT & ((1 << top_bit) - 1), np.cumsum(begins_NxT, axis=1, dtype=np.uint32)

    return rows


def _dialogues(job: ShardJob) -> Rows:
    stream = np.memmap(job.stream, word_type(job.vocab_size), mode="r")
    lengths = np.fromfile(job.lengths, np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])

    def rows(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        words = stream[ends[start] : ends[stop]]
        return sft.padded(words, lengths[start:stop], job.sequence_length + 1, job.eos_id)

    return rows


def write_tfds_metadata(directory: Path, jobs: Sequence[ShardJob], sizes: Sequence[int]) -> None:
    """Makes `directory`, with the shards of these jobs, readable by `tfds.builder_from_directory`."""
    import tensorflow_datasets as tfds

    infos = []
    for split in dict.fromkeys(job.split for job in jobs):
        own = [(job, size) for job, size in zip(jobs, sizes, strict=True) if job.split == split]
        template = tfds.core.ShardedFileTemplate(
            data_dir=epath.Path(directory), dataset_name=NAME, split=split, filetype_suffix="array_record"
        )
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[job.stop - job.first for job, _ in own],
                num_bytes=sum(size for _, size in own),
                filename_template=template,
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=str(directory),
        features=features(jobs[0].sequence_length, jobs[0].vocab_size),
        split_infos=infos,
        description="Token records of diffusionlm; meta.json has the tokenizer and the counts.",
        check_data=False,  # the check needs TensorFlow
    )
