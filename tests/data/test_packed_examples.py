"""Several dialogues in a record: where they lie, which padding belongs to each, and one answer of each."""

import itertools

import numpy as np
import pytest
from support.dialogues import EOS, expected_record, prepare_dialogues, turns, write_dialogues

from diffusionlm.config_data import ANSWER, PADDING, PARTS, PROMPT
from diffusionlm.data import dialogues, inspect, pipeline
from diffusionlm.data.chat_templates import Message
from diffusionlm.errors import UserError

LENGTH = 400  # tokens that a model sees


def conversation(i):
    """Return a dialogue of one to three turns, of varied lengths."""
    asked = [Message("user", "why? " * (i % 4) + chr(65 + i)), Message("assistant", "so " * (i % 5) + "1")]
    later = [[Message("user", "and?"), Message("assistant", f"{n}.")] for n in (2, 3)]
    return sum(later[: i % 3], asked)


CONVERSATIONS = [conversation(i) for i in range(26)]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Return the same dialogues, packed and one to a record; the validation split has them too."""
    folder = tmp_path_factory.mktemp("packed")
    source = write_dialogues(folder / "d.jsonl", [{"messages": turns(messages)} for messages in CONVERSATIONS])
    settings = {"sequence_length": LENGTH, "validation": str(source), "validation_fraction": None}
    prepare_dialogues(source, folder / "alone", **settings)
    prepare_dialogues(source, folder / "packed", pack=True, **settings)
    return pipeline.open_dataset(folder / "packed"), pipeline.open_dataset(folder / "alone")


def alone_record(messages):
    """Return the tokens and parts of a dialogue without padding, written down by hand."""
    tokens, parts = (np.array(x) for x in expected_record(messages, LENGTH))
    return tokens[parts != 0].tolist(), parts[parts != 0].tolist()


def test_records_hold_the_dialogues_one_after_another_with_their_padding(datasets):
    packed, _ = datasets
    rows = packed.rows("train", range(packed.size("train")))
    contents = [alone_record(messages) for messages in CONVERSATIONS]
    lengths = [len(tokens) for tokens, _ in contents]
    found = []
    for tokens, parts in zip(rows["tokens"], rows["segment_ids"], strict=True):
        used = np.count_nonzero(parts)
        assert used <= LENGTH
        assert parts[:used].all() and not parts[used:].any()  # no gaps
        assert (tokens[used:] == EOS).all()
        i = 0
        while i < used:
            content, content_parts = contents[len(found)]
            size = len(content)
            assert tokens[i : i + size].tolist() == content
            assert parts[i : i + size].tolist() == content_parts
            padding = i + size
            while padding < used and parts[padding] == content_parts[-1] + 1:
                assert tokens[padding] == EOS
                padding += 1
            found.append(padding - i)
            i = padding
    assert len(found) == len(CONVERSATIONS)
    assert packed.size("train") < len(CONVERSATIONS) / 2
    # Each is padded to the longer of itself and another, and each is the other of one: LLaDA's local batches of two.
    longer = [slot for slot, length in zip(found, lengths, strict=True) if slot > length]
    assert 5 < len(longer) < len(lengths) and set(longer) <= set(lengths)
    assert all(slot >= length for slot, length in zip(found, lengths, strict=True))


def test_slots_have_the_law_of_the_longer_of_two():
    """P(the longer of two independent ones <= x) = P(one <= x)^2."""
    lengths = np.random.default_rng(0).integers(1, 11, 20_000)
    shares = np.array([(dialogues.slots(lengths) <= x).mean() for x in range(1, 11)])
    np.testing.assert_allclose(shares, (np.arange(1, 11) / 10) ** 2, atol=0.02)  # 5 standard errors


def test_a_record_is_filled_as_far_as_the_next_dialogue_allows():
    assert dialogues.next_fit(np.array([4, 6, 1, 9, 10, 3]), 10).tolist() == [0, 0, 1, 1, 2, 3]


def test_a_batch_has_one_answer_of_each_dialogue_and_its_padding(datasets):
    packed, _ = datasets
    size = packed.size("train")
    stored = packed.rows("train", range(size))
    turns_seen, of_mates = set(), []
    for epoch in range(6):
        rows = packed.examples("train", range(size), [(0, epoch, i) for i in range(size)])
        numbers = iter(range(len(CONVERSATIONS)))
        for tokens, ids, parts in zip(rows["tokens"], rows["segment_ids"], stored["segment_ids"], strict=True):
            of_mates.append([])
            for j, (place, padding) in enumerate(dialogues.places(parts)):
                messages = CONVERSATIONS[next(numbers)]
                mine = (ids // PARTS == j) & (ids != 0)
                kinds = ids[mine] % PARTS
                assert (kinds == PADDING).sum() == padding
                assert (np.diff(np.flatnonzero(mine)) == 1).all() and np.flatnonzero(mine)[0] == place.start
                content = tokens[mine][kinds != PADDING].tolist()
                k = next(k for k in (1, 2, 3) if content == alone_record(messages[: 2 * k])[0])
                of_mates[-1].append((len(messages) // 2, k))
                turns_seen.add((len(messages) // 2, k))
                expected = [ANSWER if part == 2 * k else PROMPT for part in alone_record(messages[: 2 * k])[1]]
                assert kinds[kinds != PADDING].tolist() == expected
            assert (tokens[ids == 0] == EOS).all()
        assert next(numbers, None) is None
    # Dialogues of one record are drawn apart: those with as many turns do not always come with the same one.
    assert any(len({k for n, k in mates if n == 2}) == 2 for mates in of_mates)
    assert turns_seen == {(n, k) for n in (1, 2, 3) for k in range(1, n + 1)}


def test_batches_are_functions_of_their_number(datasets):
    packed, _ = datasets

    def batches(start, count, **settings):
        found = pipeline.train_batches(packed, batch_size=4, seed=3, start=start, **settings)
        return [batch["segment_ids"].tolist() for batch in itertools.islice(found, count)]

    whole = batches(0, 8)
    assert batches(5, 2) == whole[5:7]
    assert batches(5, 1, rows=[2, 0])[0] == [whole[5][2], whole[5][0]]


def test_held_out_dialogues_stay_alone(datasets):
    """So a run on packed data reports the same figure as one on the same data unpacked."""
    found = [list(pipeline.eval_batches(dataset, batch_size=8, records=20, split="validation")) for dataset in datasets]
    for packed, alone in zip(*found, strict=True):
        for name in ("tokens", "segment_ids"):
            np.testing.assert_array_equal(packed[name], alone[name])


def test_counts_are_those_of_the_answers(datasets):
    packed, alone = (dataset.metadata.splits["train"] for dataset in datasets)
    assert (packed.documents, packed.tokens, packed.raw_bytes) == (alone.documents, alone.tokens, alone.raw_bytes)
    assert packed.sha256 == alone.sha256  # of the streams, which are equal
    assert datasets[0].metadata.sha256 != datasets[1].metadata.sha256


def test_inspect_shows_texts_without_padding(datasets):
    packed, alone = (inspect.describe(dataset.path, 100) for dataset in datasets)
    assert packed["document_tokens"] == alone["document_tokens"]
    assert packed["frequent_tokens"] == alone["frequent_tokens"]
    texts = [sum((record["documents"] for record in found["records"]), []) for found in (packed, alone)]
    assert texts[0] == texts[1] and len(texts[0]) == sum(map(len, CONVERSATIONS))


def test_only_dialogues_are_packed_on_request(tmp_path):
    (tmp_path / "text.txt").write_text("some text " * 100)
    with pytest.raises(UserError, match=r"pack=True is for format=sft.*drop it"):
        prepare_dialogues(tmp_path / "text.txt", tmp_path / "out", format="text", pack=True)
