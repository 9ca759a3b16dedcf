"""The settings of a run's data, and how records of examples are numbered; `config` has all the others."""

from dataclasses import dataclass
from typing import Annotated, Literal

from diffusionlm import config_mixture
from diffusionlm.config_fields import (
    AtLeastMinusOne,
    AtLeastTwo,
    Canonical,
    Hint,
    NonNegativeReal,
    Positive,
    later,
    op,
)
from diffusionlm.errors import UserError

# Segment ids of records that hold examples: PARTS * (number of the example in its record, from 0) + one of these parts,
# or 0 where nothing is seen. PADDING is EOS padding that belongs to a packed example.
PROMPT, ANSWER, PADDING, PARTS = 1, 2, 3, 4


@dataclass(frozen=True)
class DataConfig(Canonical):
    """The training data: a prepared directory or several, or a source that is first prepared into the run directory."""

    # directory written by `diffusionlm data prepare`; empty: prepare `source` into WORKDIR/data; with `mixture`, the
    # folder that its relative paths start from
    path: str = op("")
    # several prepared directories with their shares of the rows, which sum to 1: PATH=WEIGHT,PATH=WEIGHT; from a batch
    # on with others: ...;BATCH:PATH=WEIGHT,... The last part of a path names the source in metrics
    mixture: str = later("")
    # times that a run may go through a source; one that would do so more often is refused before it begins
    max_epochs: Annotated[NonNegativeReal, Hint("0 sets no limit")] = op(0.0)
    # used when path is empty: a registered corpus (python_docs), text or jsonl(.gz) files, a directory or glob pattern
    # of them, or tfds:NAME
    source: str = ""
    # for `source`: byte, sentencepiece (trained with model.vocab_size pieces, or with run.init_from that checkpoint's
    # own), a tokenizer.model file; or a tokenizer.json file, the directory of a released model or a checkpoint, or the
    # address of one on the Hugging Face Hub (hf://OWNER/NAME); these may lie elsewhere when the run is resumed
    tokenizer: str = "sentencepiece"
    sequence_length: AtLeastTwo = 2048  # tokens the model sees; records hold one more
    batch_size: Positive = 256  # sequences per optimizer step, over all devices and micro-batches
    # concatenate and cut; segments also keeps documents from attending to each other; examples: a prompt and its answer
    # in each record, for supervised fine-tuning: the prompt is given, the answer is learned; packed_examples: several
    # in each record, prepared with --pack, which do not attend to each other
    packing: Literal["chunk", "segments", "examples", "packed_examples"] = "chunk"
    # examples: this many consecutive rows are padded with EOS to their longest, and learn the padding; 1: only the EOS
    # that ends an answer; 0: the whole batch; -1: all rows, to sequence_length. Autoregressive models learn no padding
    pad_group: AtLeastMinusOne = 0
    # examples: what is masked and learned: answers given their prompts, or all of both (SMDM's reversal fine-tuning)
    learn: Literal["answers", "all"] = later("answers")

    @property
    def holds_examples(self) -> bool:
        """True if records hold prompts with answers."""
        return self.packing in ("examples", "packed_examples")

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the datasets that are mixed; none for a run on a single one."""
        return config_mixture.labels(self.mixture)

    def validate(self) -> None:
        """Raise `UserError` for fields that contradict one another."""
        if self.mixture:
            config_mixture.parse(self.mixture)
            if self.source:
                raise UserError(
                    f"data.mixture={self.mixture} is of prepared datasets, and data.source={self.source} is prepared "
                    "first; give one of them"
                )
        if self.pad_group and self.packing != "examples":
            why = ", whose padding was chosen when they were prepared" if self.holds_examples else ""
            raise UserError(
                f"data.pad_group={self.pad_group} is for data.packing=examples, not {self.packing}{why}; drop it"
            )
        if self.learn != "answers" and not self.holds_examples:
            raise UserError(
                f"data.learn={self.learn} is for prompts with answers (data.packing=examples or packed_examples), not "
                f"{self.packing}; drop it"
            )
        if self.pad_group > 0 and self.batch_size % self.pad_group:
            raise UserError(
                f"data.pad_group={self.pad_group} must divide data.batch_size={self.batch_size}; 0 is the whole batch"
            )
