"""What a prepared dataset says about itself: `meta.json`, beside the files that TFDS reads.

It is written last, so a directory without it is not a dataset.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from diffusionlm.errors import UserError

FILE = "meta.json"
FORMAT, EXAMPLES_FORMAT = 1, 2  # of texts, which earlier versions read as well, and of dialogues


@dataclass(frozen=True)
class SplitMetadata:
    """Counts of one split, over all its documents; what follows the last whole record is counted but not stored.

    With packing "examples" a record is a dialogue, and the counts are of its answers.
    """

    records: int  # rows of sequence_length + 1 tokens
    documents: int
    tokens: int  # with one EOS a document
    raw_bytes: int  # UTF-8 bytes of the documents
    token_bytes: int  # bytes that the tokens stand for: equal to raw_bytes where the tokenizer is lossless
    sha256: str  # of the token stream: a little-endian word a token, top bit set on each document's first token
    shards: dict[str, int]  # file name -> its size in bytes


@dataclass(frozen=True)
class Metadata:
    """Everything about a prepared dataset that is not a record."""

    tokenizer: dict  # whole: `tokenizers.from_dict` rebuilds it
    vocab_size: int
    sequence_length: int  # tokens that a model sees; a record holds one more
    splits: dict[str, SplitMetadata]
    request: dict  # what `prepare` was asked for, to recognise the same request
    malformed: int  # input lines or files skipped on request
    empty: int  # documents without text, skipped always
    # chunk: documents, each with its EOS, concatenated in order and cut; examples: a dialogue a record (see `sft`)
    packing: str = "chunk"
    format: int = FORMAT
    template: dict | None = None  # of dialogues: `templates.Template.from_dict` rebuilds it
    too_long: int = 0  # answers that are left out because they end behind sequence_length, with all that follows them
    bos: bool = False  # of texts: BOS stands before each document

    @property
    def sha256(self) -> str:
        """Identity of the content: equal for equal records, whatever made them and however they are sharded."""
        splits = {name: (split.records, split.sha256) for name, split in self.splits.items()}
        content = (self.format, self.packing, self.tokenizer["sha256"], self.sequence_length, splits)
        content += (self.template,) if self.template else ()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def write(self, directory: Path) -> None:
        values = dataclasses.asdict(self) | {"sha256": self.sha256}
        if self.packing != "examples":  # earlier versions do not know these
            del values["template"], values["too_long"]
        if not self.bos:
            del values["bos"]
        (directory / FILE).write_text(json.dumps(values, indent=2) + "\n")


def read(directory: epath.Path) -> Metadata:
    """The metadata of the dataset in `directory`.

    Raises:
      UserError: the directory holds no dataset, an incomplete one, or one of another format.
    """
    file = directory / FILE
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError as error:
        what = "has no meta.json, so it is not a (whole) prepared dataset" if directory.is_dir() else "does not exist"
        raise UserError(f"dataset {str(directory)!r} {what}; make one with `diffusionlm data prepare`") from error
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {str(file)!r}: {error}") from error
    wanted = FORMAT
    if isinstance(values, dict) and values.get("packing") == "examples":
        wanted = EXAMPLES_FORMAT
    if not isinstance(values, dict) or values.get("format") != wanted:
        found = values.get("format") if isinstance(values, dict) else None
        raise UserError(
            f"dataset {str(directory)!r} has format {found!r}, not {wanted}; prepare it again with this version"
        )
    try:
        sha256 = values.pop("sha256")
        splits = {name: SplitMetadata(**split) for name, split in values.pop("splits").items()}
        metadata = Metadata(splits=splits, **values)
        unchanged = metadata.sha256 == sha256
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{str(file)!r} is not the metadata of a prepared dataset ({error!r}); prepare it again"
        ) from error
    if not unchanged:
        raise UserError(f"{str(file)!r} was changed after it was written (sha256 differs); prepare the dataset again")
    for split in metadata.splits.values():
        for shard, size in split.shards.items():
            found = (directory / shard).stat().length if (directory / shard).exists() else 0
            if found != size:
                what = f"{shard} has {found} bytes, not {size}"
                raise UserError(f"dataset {str(directory)!r} is damaged: {what}; copy or prepare it again")
    return metadata
