"""Prompts: gaps, chat templates, special tokens, the ends of texts and predicted masks, in texts and in tokens."""

import dataclasses
import json
import re
from collections import Counter

import numpy as np
import pytest
from support.tiny_pretrained import EOS, SPEC, generated, with_sidecar

from diffusionlm.data.chat_templates import Message, choose
from diffusionlm.data.jinja_templates import JinjaTemplate
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.data.tokenizers import load as load_tokenizer
from diffusionlm.errors import UserError
from diffusionlm.pretrained import terminal
from diffusionlm.sampling.config import SamplingConfig


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """A tokenizer in LLaMA's form, with a space before every text, whose ids fit into the model."""
    directory = tmp_path_factory.mktemp("spaced")
    pieces = ["<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz", "ab", "\u2581a"]
    pieces += [f"<{i}>" for i in range(len(pieces), EOS)]  # so that its end of text is that of the bytes
    vocab = {piece: i for i, piece in enumerate([*pieces, "</s>"])}
    definition = {
        "added_tokens": [],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False},
        "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["\u2581", "a"]], "unk_token": "<unk>"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(definition))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return load_tokenizer(str(directory))


GAPPED = ["un{mask:2}able", "{mask:1}able", "un{mask:1} able {mask:2}", "a{mask:1}{mask:1-2} b{mask:1}", "a {mask:1}."]


@pytest.mark.slow
@pytest.mark.parametrize("text", GAPPED)
def test_what_was_given_around_gaps_stays_as_it_was(model, spaced, text):
    """In the text, and in the tokens, where only the start of the whole text has a space of the tokenizer's."""
    assert spaced.eos_id == EOS
    model = dataclasses.replace(model, tokenizer=spaced)
    # As many rows as the gap with a range of two lengths needs.
    completion = model.infill([text] * (1 if "-" in text else 2), seed=1)[0]
    given = re.split(r"\{mask:[0-9-]+\}", text)
    assert re.fullmatch(".*".join(map(re.escape, given)), completion.text, re.DOTALL)
    place = 1  # after the start token
    for k, (part, gap) in enumerate(zip(given, [*re.findall(r"[0-9-]+(?=\})", text), "0"], strict=True)):
        ids = spaced.encode(part, inside=k > 0)
        assert completion.tokens[place : place + len(ids)] == ids
        assert k == 0 or "." in part or spaced.decode(ids, inside=True) == part
        place += len(ids) + (int(gap) if "-" not in gap else filled_length(completion.tokens, text, spaced))
    assert place == len(completion.tokens)


def filled_length(tokens, text, tokenizer):
    """Return the tokens of the one gap of a text that has bounds."""
    parts = re.split(r"\{mask:[0-9-]+\}", text)
    fixed = sum(map(int, re.findall(r"\{mask:([0-9]+)\}", text)))
    return len(tokens) - 1 - fixed - sum(len(tokenizer.encode(part, inside=k > 0)) for k, part in enumerate(parts))


TEMPLATE = choose("plain", ByteTokenizer())


@pytest.mark.slow
def test_a_fine_tuned_model_is_asked_in_its_template(model):
    """As its training wrote prompts; an empty text, `raw` and everything else take texts as they are."""
    model = with_sidecar(model, template=TEMPLATE.to_dict(), canvas={"max_length": 64, "start_id": EOS})
    sampling = SamplingConfig(length=10, steps=5)
    asked = [EOS, *b"### user\n2+2?\n\n### assistant\n"]
    assert model.template == TEMPLATE and model.encode_messages([Message("user", " 2+2? ")]) == asked
    for prompts, encoded, settings in (
        (["2+2?", ""], [asked, [EOS]], {}),
        (["2+2?", ""], [[EOS, *b"2+2?"], [EOS]], {"raw": True}),
    ):
        completions = model.generate(prompts, sampling, **settings)
        expected = generated(model, encoded, sampling)
        assert [completion.tokens for completion in completions] == expected.tokens.tolist()
    completion = model.generate(["2+2?"] * 2, sampling)[0]
    assert completion.prompt == "2+2?" and completion.full_text == "2+2?\n\n" + completion.text
    assert "### user" not in model.infill(["a{mask:2} b"] * 2)[0].text


def test_what_a_template_cannot_write_is_one_line(model):
    with pytest.raises(UserError, match="no chat template"):
        model.encode_messages([Message("user", "Hi")])
    marked = dataclasses.replace(TEMPLATE, turn="<|eot_id|>{role}: {content}")
    model = dataclasses.replace(model, sidecar=dataclasses.replace(model.sidecar, template=marked.to_dict()))
    with pytest.raises(UserError, match="holds '<.eot_id.>'") as error:
        model.generate("Hi<|eot_id|>")
    assert "\n" not in str(error.value)


def test_messages_come_as_mappings_too_and_nothing_else(model):
    model = with_sidecar(model, template=TEMPLATE.to_dict(), canvas={"max_length": 64, "start_id": EOS})
    asked = [Message("system", "S"), Message("user", "Hi")]
    expected = [EOS, *b"### system\nS\n\n### user\nHi\n\n### assistant\n"]
    assert model.encode_messages(asked) == expected
    assert model.encode_messages([message._asdict() for message in asked]) == expected
    for messages, said in (
        ([], "no message of a user"),
        ([{"role": "system", "content": "S"}], "no message of a user"),
        ([{"role": "tool", "content": "x"}], "role 'tool' of messages[0] is none of system, user, assistant"),
        ([Message("human", "x")], "role 'human' of messages[0] is none of"),
        ([asked[1], {"role": "user"}], "messages[1]={'role': 'user'} is neither a Message"),
        (["Hi"], "messages[0]='Hi' is neither a Message"),
        ("Hi", "messages[0]='H' is neither a Message"),
        ([{"role": "user", "content": 3}], "content of messages[0] is int, not a text"),
        ([{"role": ["user"], "content": "x"}], "role of messages[0] is list, not a text"),
    ):
        with pytest.raises(UserError, match=re.escape(said)) as error:
            model.encode_messages(messages)
        assert "\n" not in str(error.value)


def test_a_template_that_writes_nothing_sets_nothing_off(model):
    """The new text goes on from the prompt, with or without `raw`."""
    bare = choose("none", ByteTokenizer())
    model = with_sidecar(model, template=bare.to_dict(), canvas={"max_length": 64, "start_id": EOS})
    sampling = SamplingConfig(length=10, steps=5)
    found, raw = (model.generate(["Once"] * 2, sampling, raw=raw)[0] for raw in (False, True))
    assert found.full_text == "Once" + found.text == raw.full_text and not found.templated


# --- dialogues


CHAT = JinjaTemplate(
    "a test", "{% for m in messages %}{{ m.role[0] + ':' + m.content + '\n' }}{% endfor %}{{ 'a:' }}", {}
)


@pytest.mark.slow
def test_a_released_template_writes_prompts_and_dialogues(model):
    """It writes whatever comes before the text, so that no start token is put before it."""
    model = with_sidecar(model, template=CHAT.to_dict())
    sampling = SamplingConfig(length=10, steps=5)
    hello = [
        Message("system", "S"),
        Message("user", "Hi"),
        Message("assistant", "Yo"),
        {"role": "user", "content": "?"},
    ]
    for completions, prompts, encoded in (
        (model.generate("Hi", sampling), ["Hi"], [[*b"u:Hi\na:"]]),
        (model.generate(messages=hello, sampling=sampling), ["?"], [[*b"s:S\nu:Hi\na:Yo\nu:?\na:"]]),
        (
            model.generate(messages=[hello, [Message("user", "Hi")]], sampling=sampling),
            ["?", "Hi"],
            [[*b"s:S\nu:Hi\na:Yo\nu:?\na:"], [*b"u:Hi\na:"]],
        ),
    ):
        expected = generated(model, encoded, sampling)
        assert [completion.tokens for completion in completions] == expected.tokens.tolist()
        assert [completion.prompt for completion in completions] == prompts
        assert all(completion.templated for completion in completions)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"messages": [Message("user", "a")], "prompts": "b"}, "exclude prompts, raw and special_tokens"),
        ({"messages": [Message("user", "a")], "raw": True}, "exclude prompts, raw and special_tokens"),
        ({"messages": []}, "must be a list of messages"),
        ({"messages": [[], []]}, "must be a list of messages"),
        ({"messages": "Hi"}, "must be a list of messages"),
        ({"messages": Message("user", "a")}, "must be a list of messages"),
        ({"messages": ["Hi"]}, r"messages\[0\]='Hi' is neither a Message"),
        ({"prompts": "a", "special_tokens": True}, "special_tokens needs raw"),
    ],
)
def test_requests_that_contradict_themselves_are_one_line(model, settings, message):
    with pytest.raises(UserError, match=message) as error:
        with_sidecar(model, template=CHAT.to_dict()).generate(**settings)
    assert "\n" not in str(error.value)


def test_a_model_without_a_template_has_no_dialogues(model):
    with pytest.raises(UserError, match="no chat template"):
        model.generate(messages=[Message("user", "a")])


# --- special tokens


def test_special_tokens_in_a_text_are_tokens_where_they_are_asked_for(model, spaced):
    model, end = dataclasses.replace(model, tokenizer=spaced), spaced.eos_id
    assert model.encode("a</s>b") == [end, *spaced.encode("a</s>b")] and end not in spaced.encode("a</s>b")
    whole = [*spaced.encode("a"), end, *spaced.encode("b")]
    assert model.encode("a</s>b", special_tokens=True) == [end, *whole]
    assert model.encode("</s>a</s>b", special_tokens=True) == [end, *whole]  # written in full: nothing is put before it
    completion = model.infill(["a</s>{mask:1}b"] * 2, special_tokens=True)[0]
    assert completion.tokens[:3] == [end, *spaced.encode("a"), end] and completion.text.startswith("a</s>")


# --- ends of texts, and masks


@pytest.mark.slow
def test_a_text_stops_at_the_first_of_several_ends(model, params):
    eot = ord("e")
    model = dataclasses.replace(
        model,
        params={**params, "head": params["head"].at[:, eot].multiply(3)},
        config=dataclasses.replace(SPEC, eos_ids=(EOS, eot)),
    )
    completions = model.generate(["x"] * 4, length=40, stop_at_eos=True, strategy="left_to_right")
    assert any(eot in completion.tokens for completion in completions)
    for completion in completions:
        ends = [i for i, token in enumerate(completion.tokens) if token in (EOS, eot)]
        if ends:
            assert completion.text == ByteTokenizer().decode(completion.tokens[: ends[0]])
            assert completion.tokens[ends[0] + 1 :] == [EOS] * (39 - ends[0])  # nothing is drawn after an end


@pytest.mark.slow
def test_a_predicted_mask_is_marked_and_no_text(model, params):
    """LLaDA's reference lets it be predicted; the id of DiffuLLaMA's stands for a word of its vocabulary."""
    mask = ord("m")
    config = dataclasses.replace(SPEC, mask_id=mask, suppressed_ids=())
    model = dataclasses.replace(model, config=config)
    liked = Counter(model.generate("x", length=20)[0].tokens).most_common(1)[0][0]
    head = params["head"].at[:, mask].set(2 * params["head"][:, liked])
    model = dataclasses.replace(model, params={**params, "head": head})
    completion = model.generate("x", length=20)[0]
    assert completion.mask_tokens == completion.tokens.count(mask) > 0
    assert "m" not in completion.text
    assert all("m" not in piece for piece in terminal.single_texts(np.array(completion.tokens), model.reader))
    filled = model.infill("x{mask:9}y")[0]
    assert filled.mask_tokens == filled.tokens.count(mask) > 0 and "m" not in filled.text
    suppressed = dataclasses.replace(model, config=dataclasses.replace(config, suppressed_ids=(mask,)))
    assert suppressed.generate("x", length=20)[0].mask_tokens == 0
