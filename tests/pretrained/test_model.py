"""From a saved checkpoint to completions of text."""

import dataclasses
import json
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from support.texts import DOCUMENTS
from support.tiny_pretrained import EOS, MODEL, SPEC, generated, sidecar
from support.tokenizer_files import write_byte_level

from diffusionlm import memory
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.config import Config, MeshConfig
from diffusionlm.data import tokenizers
from diffusionlm.data.chat_templates import Message, choose
from diffusionlm.data.tokenizers import ByteTokenizer
from diffusionlm.errors import UserError
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.monte_carlo import estimate
from diffusionlm.model.spec import ModelSpec
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.pretrained.completion import Completion, completions_json
from diffusionlm.pretrained.loading import load
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.state import Trace

HERE = checkpoint.Location(epath.Path("here"))


@pytest.mark.slow
def test_parameters_are_loaded_as_they_were_saved(model, params):
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    assert model.config == SPEC


@pytest.mark.slow
def test_completions_are_those_of_generate_after_the_start_id(model):
    sampling = SamplingConfig(length=10, steps=5, strategy="low_confidence", seed=3)
    completions = model.generate(["Once", "a longer prompt"], sampling)
    expected = generated(model, [[EOS, *text.encode()] for text in ("Once", "a longer prompt")], sampling)
    assert [completion.tokens for completion in completions] == expected.tokens.tolist()
    assert [completion.prompt for completion in completions] == ["Once", "a longer prompt"]
    assert all(completion.nfe == 5 and completion.seconds > 0 for completion in completions)


@pytest.mark.parametrize("canvas, first", [({}, [EOS]), ({"start_id": 7}, [7]), ({"start_id": None}, [])])
def test_prompts_begin_as_documents_did_in_training(save, canvas, first):
    model = load(save(canvas=canvas))
    completions = model.generate(["ab", "c"], length=8)
    expected = generated(model, [[*first, *b"ab"], [*first, *b"c"]], SamplingConfig(length=8))
    assert [completion.tokens for completion in completions] == expected.tokens.tolist()


def test_text_stops_at_the_first_end_and_tokens_do_not(save, params):
    ends_often = params["head"].at[:, EOS].multiply(6)
    model = load(save(params={**params, "head": ends_often}))
    completions = model.generate(["x"] * 2, length=50)
    assert any(EOS in completion.tokens[:-1] for completion in completions)
    for completion in completions:
        assert len(completion.tokens) == 50
        before = completion.tokens[: completion.tokens.index(EOS)] if EOS in completion.tokens else completion.tokens
        assert completion.text == ByteTokenizer().decode(before)


def test_the_text_keeps_the_space_that_a_decoder_drops_at_the_start(model):
    class Words:
        """Like a SentencePiece model with a dummy prefix: a text loses its first space."""

        words = [" one", " two", " three"]

        def encode(self, text, special=False):
            return [0]

        def decode(self, ids, inside=False):
            text = "".join(self.words[i % 3] for i in ids if i != EOS)
            return text if inside else text.removeprefix(" ")

    model = dataclasses.replace(model, tokenizer=Words())
    for completion in model.generate(["one"] * 2, length=3):
        assert completion.text.startswith(" ")
        assert "one" + completion.text == Words().decode([0, *completion.tokens])


@pytest.mark.slow
def test_autoregressive_checkpoints_sample_through_the_same_call(save):
    cfg = Config(objective="arm", model=dataclasses.replace(MODEL, causal=True, mask_row=False))
    model = load(save(cfg=cfg, mask_id=None))
    assert model.config == dataclasses.replace(ModelSpec.of(cfg), eos_ids=(EOS,))
    completion = model.generate("", length=8)[0]
    assert completion.nfe == 8 and len(completion.tokens) == 8
    assert completion.tokens == generated(model, [[EOS]], SamplingConfig(length=8)).tokens[0].tolist()


@pytest.mark.slow
def test_dtype_is_of_parameters_and_computation(save):
    model = load(save(), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype("bfloat16")}
    assert model.config.model.dtype == "bfloat16"
    assert len(model.generate("a", length=4)[0].tokens) == 4


@pytest.mark.slow
def test_a_mesh_loads_shards_and_gives_the_same_tokens(save, params):
    model = Transformer(MODEL)
    row = [EOS, *b"Once", 257, 257]
    for j in (-2, -1):
        hidden = model.apply({"params": params}, jnp.array([row], jnp.int32))
        logits = np.asarray(model.apply({"params": params}, hidden, method=Transformer.head))[0, j, :257]
        assert np.diff(np.sort(logits)[-2:]) > 1e-3  # other devices sum in another order
        row[j] = int(np.argmax(logits))
    path = save()
    many = load(path, mesh=make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)))
    assert not many.params["blocks"]["q"].sharding.is_fully_replicated
    for loaded in (load(path), many):
        completions = loaded.generate(["Once"] * 2, length=2, strategy="left_to_right", temperature=0.0)
        assert [completion.tokens for completion in completions] == [row[-2:]] * 2


@pytest.mark.slow
def test_traces_belong_to_their_rows(model):
    completions = model.generate(["a", "b"], length=6, steps=8, strategy="ancestral", trace=True)
    for completion in completions:
        assert completion.trace.tokens.shape == completion.trace.masked.shape == completion.trace.confidence.shape
        assert completion.trace.masked[-2].any() and not completion.trace.masked[-1].any()  # not those of its mates
        assert completion.trace.masked[0].all() and not completion.trace.masked[-1].any()
        assert completion.trace.tokens[-1].tolist() == completion.tokens


def test_json_has_the_documented_keys(model):
    sampling = model.sampling_config(length=4, temperature=0.5)
    document = json.loads(json.dumps(completions_json(model.generate(["a", "b"], sampling), sampling)))
    assert set(document) == {"completions", "config"}
    assert set(document["completions"][0]) == {"prompt", "text", "tokens", "nfe", "seconds", "mask_tokens"}
    assert document["config"] == dataclasses.asdict(sampling)
    assert {"length": 4, "steps": 4, "strategy": "ancestral", "temperature": 0.5}.items() <= document["config"].items()
    assert completions_json([Completion("p", "t", [1], 2, 3.0)], sampling)["completions"][0]["nfe"] == 2


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(temprature=1.0), ["temprature", "did you mean 'temperature'"]),
        (dict(length=64), ["prompt 0, of 2 tokens", "length=64", "context of 64", "at most 62"]),
        (dict(prompts=[]), ["no prompts"]),
        (dict(length=0), ["length=0"]),
    ],
)
def test_mistakes_are_told_in_one_line(model, settings, words):
    with pytest.raises(UserError) as error:
        model.generate(**{"prompts": "a", **settings})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_refuses_what_it_cannot_use(save, tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        load(tmp_path / "nowhere")
    path = save(tokenizer=None)
    with pytest.raises(UserError, match="did you mean 'float32'"):
        load(path, dtype="float23")
    with pytest.raises(UserError, match="no tokenizer"):
        load(path).generate("a")


@pytest.mark.slow
def test_needs_nothing_of_training():
    code = (
        "import sys, diffusionlm.pretrained.loading, diffusionlm.pretrained.terminal\n"
        "training = ('diffusionlm.training', 'diffusionlm.diffusion.objectives', 'diffusionlm.diffusion.corruption')\n"
        "print([name for name in sys.modules if name.startswith((*training, 'optax'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_settings_import_no_jax():
    code = "import sys, diffusionlm.sampling.config; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_infilling_keeps_the_text_around_the_gaps(model):
    texts = ["a {mask:3} b{mask:2}", "{mask:1} end"]
    sampling = SamplingConfig(temperature=0.5, top_k=100, stop_at_eos=False, strategy="low_confidence")
    long, short = model.infill(texts, sampling)
    assert [long.prompt, short.prompt] == texts
    assert long.text.startswith("a ") and " b" in long.text and short.text.endswith(" end")
    for completion, tokens, gaps in ((long, 1 + 2 + 3 + 2 + 2, 5), (short, 1 + 1 + 4, 1)):
        assert len(completion.tokens) == tokens and completion.tokens[0] == EOS
        assert completion.text == completion.full_text == ByteTokenizer().decode(completion.tokens)
        assert completion.nfe == gaps and completion.seconds > 0
    assert model.infill_config(texts, sampling) == model.sampling_config(sampling, length=5)


@pytest.mark.slow
def test_the_trace_of_infilling_is_of_the_row(model):
    texts, settings = ["a {mask:3} b", "long text {mask:2}"], dict(strategy="random", stop_at_eos=False)
    for completion in model.infill(texts, trace=True, **settings):
        trace, tokens = completion.trace, np.array(completion.tokens)
        assert trace.tokens.shape == trace.masked.shape == (completion.nfe + 1, len(tokens))
        gap = trace.masked[0]
        assert gap.sum() == completion.nfe and not trace.masked[-1].any()
        assert (trace.tokens[:, ~gap] == tokens[~gap]).all() and (trace.tokens[-1] == tokens).all()
        assert not trace.masked[:, ~gap].any()


@pytest.mark.slow
def test_likelihoods_of_text_are_those_of_its_ids(tmp_path, params):
    """Bytes are tokens here: bits per byte are over the scored ones, with a start token or without."""
    texts, settings = ["abcdef", "hello me"], LikelihoodConfig(draws=4)
    for name, changes, scored in (("without", {"eos_id": None}, [5, 7]), ("with", {}, [6, 8])):
        checkpoint.save_params(tmp_path / name, params, sidecar(**changes))
        model = load(tmp_path / name)
        found = model.perplexity(texts, settings)
        assert found.tokens == found.n_bytes == scored
        assert found.bits_per_byte == pytest.approx(found.nats / sum(scored) / np.log(2))
    answers = ["ab", "b.", "zz"]
    pairs = [("x", answer) for answer in answers]
    choice = model.choose("x", answers, LikelihoodConfig(max_passes=64))
    exact = [one.log_likelihood for one in model.log_likelihood(pairs, LikelihoodConfig("any_order"))]
    assert choice.best == int(np.argmax(exact))
    settings = {"length": 2, "steps": 2, "strategy": "low_confidence", "temperature": 0.0, "stop_at_eos": False}
    decoded = ((prompt, model.generate([prompt] * 2, **settings)[0].tokens) for prompt in "xyzabcdefghijklmnopqrstuvw")
    prompt, greedy = next((prompt, tokens) for prompt, tokens in decoded if max(tokens) < 128)  # else they are no text
    text = ByteTokenizer().decode(greedy)
    assert ByteTokenizer().encode(text) == greedy
    assert model.is_greedy([(prompt, text), (prompt, text[::-1] if text[0] != text[1] else "qz")]) == [True, False]


class Spaced(ByteTokenizer):
    """A tokenizer that puts a space before every text, as SentencePiece models do."""

    def encode(self, text, *, inside=False, special=False):
        return super().encode(text if inside else f" {text}")


def without_start_token(model, tokenizer):
    return dataclasses.replace(model, tokenizer=tokenizer, sidecar=sidecar(canvas={"start_id": None}))


@pytest.mark.parametrize("kind", ["byte", "byte_fallback", "byte_level"])
def test_without_a_start_token_the_bytes_of_the_first_token_do_not_count(kind, model, tmp_path):
    """It is one byte of four, which alone is no character: three are left, and the two bytes behind them."""
    tokenizer = {
        "byte": ByteTokenizer,
        "byte_fallback": lambda: tokenizers.train_sentencepiece(DOCUMENTS, 400),
        "byte_level": lambda: tokenizers.load(str(write_byte_level(tmp_path))),
    }[kind]()
    text = "\U0001d11e!?"
    assert len(text.encode()) == 6 and tokenizer.decode(tokenizer.encode(text)[:1]) == "\ufffd"
    assert without_start_token(model, tokenizer).encode_documents([text, "ab"])[1][0] == 5
    assert dataclasses.replace(model, tokenizer=tokenizer).encode_documents([text])[1] == [6]


def test_a_space_that_the_tokenizer_adds_is_no_byte_of_the_text(model):
    documents, n_bytes = without_start_token(model, Spaced()).encode_documents(["ab\u00e9", " c"])
    assert documents == [[*b" ab\xc3\xa9"], [*b"  c"]]  # the first token, which is given, is that space
    assert n_bytes == [4, 2]


@pytest.mark.slow
def test_a_gap_may_have_bounds(model):
    """In bytes, so that the length of the text tells what was filled in."""
    text = model.infill("a{mask:2-3}b", strategy="random", stop_at_eos=False)[0]
    assert 1 + 1 + 2 + 1 <= len(text.tokens) <= 1 + 1 + 3 + 1
    assert text.nfe == 2 + 3  # every length was tried
    assert model.infill_config("a{mask:2-4}b").length == 4


BAD_GAPS = (
    "{mask:5-3}|{mask:0-3}|{mask:3-}|{mask:1-65}|{mask:0}|{mask:abc}|{mask: 8}|{mask:8 }|{ mask:8}|{mask}|{mask:}|"
    "{mask:-1}|{mask:1.5}|{Mask:8}|{mask 8}|{mask:8|{mask:65}|{mask:99999999999}"
).split("|")


@pytest.mark.parametrize("gap", BAD_GAPS)
def test_a_malformed_gap_is_refused_and_not_taken_for_text(model, gap):
    for text in (f"a{gap}", f"a{{mask:2}} {gap}"):
        with pytest.raises(UserError) as caught:
            model.infill(text)
        message = str(caught.value)
        assert f"{gap!r} is not a gap; write {{mask:N}} without spaces" in message and "from 1 to 64" in message
        assert "\n" not in message


def test_a_text_without_a_gap_is_refused_and_other_braces_are_text(model):
    with pytest.raises(UserError, match="'no gap' has no gap; write {mask:8}"):
        model.infill("no gap")
    text = model.infill(["{masked} {x: 1} {}{mask:1}"] * 2)[0].text
    assert text.startswith("{masked} {x: 1} {}")


@pytest.mark.slow
def test_seconds_are_without_compilation(model, monkeypatch):
    """A clock that jumps by a day at each compilation: no day may be in what was measured."""
    compiled = []

    def listen(event: str, duration: float, **_) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    clock = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 86400 * len(compiled))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert model.generate(["a"] * 3, length=5, guidance=0.5)[0].seconds < 86400 and compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_likelihoods_of_texts_are_those_of_their_tokens(model, params):
    exact = LikelihoodConfig(estimator="chain_rule")
    pairs = [([EOS, *b"ab"], [*b" cd"]), ([EOS], [*b"xyz"])]
    expected = estimate(params, SPEC, pairs, exact)
    assert model.log_likelihood([("ab", " cd"), ("", "xyz")], exact) == expected
    assert model.log_likelihood([("ab ", "cd")], exact)[0].log_likelihood == pytest.approx(
        expected[0].log_likelihood, rel=1e-5
    )


def test_pairs_and_answers_of_another_shape_are_refused(model):
    for pairs in (("a", "b"), ["ab"], [("a", "b", "c")], "ab"):
        with pytest.raises(UserError, match="must be a list of pairs"):
            model.log_likelihood(pairs)
    with pytest.raises(UserError, match="must be a list of texts"):
        model.choose("a", "bc")


def test_a_template_of_another_version_is_refused_when_the_model_is_loaded(save):
    """The checkpoint keeps its template as data; whoever samples checks it."""
    path = save(template={"version": 9})
    with pytest.raises(
        UserError, match="a chat template of version 9, and this diffusionlm knows 1 and 2: upgrade"
    ) as error:
        load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "use",
    [
        lambda model, text: model.generate(["fine", text]),
        lambda model, text: model.infill(["a{mask:2}", "a{mask:2}" + text]),
        lambda model, text: model.perplexity(["fine", text]),
        lambda model, text: model.choose(text, ["a", "b"]),
        lambda model, text: model.choose("a", ["a", text]),
        lambda model, text: model.log_likelihood([("a", text)]),
        lambda model, text: model.is_greedy([(text, "a")]),
    ],
)
@pytest.mark.parametrize(
    ("text", "reason"), [("a\ud83d", "half a surrogate pair at"), ("\udcff", "the byte 0xff, which")]
)
def test_texts_that_utf8_cannot_write_are_refused_in_one_line(use, text, reason):
    model = LoadedModel({}, SPEC, sidecar(), ByteTokenizer(), make_mesh(MeshConfig(), jax.local_devices()[:1]), HERE)
    with pytest.raises(UserError, match=rf"text \d has {reason}") as error:
        use(model, text)
    assert "\n" not in str(error.value)


def test_messages_that_utf8_cannot_write_are_refused_in_one_line():
    template = choose("plain", ByteTokenizer()).to_dict()
    model = LoadedModel({}, SPEC, sidecar(template=template), ByteTokenizer(), make_mesh(MeshConfig()), HERE)
    with pytest.raises(UserError, match=r"content of messages\[1\] has half a surrogate pair at character 0"):
        model.encode_messages([Message("system", "S"), Message("user", "\ud83d")])


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_a_model_without_room_is_refused_before_it_is_read(save, params, dtype, size, monkeypatch):
    path, count = save(), sum(leaf.size for leaf in jax.tree.leaves(params))
    monkeypatch.setattr(memory, "host_limit", lambda: (size * count, "this machine has"))
    load(path, dtype)
    monkeypatch.setattr(memory, "host_limit", lambda: (size * count - 1, "this machine has"))
    monkeypatch.setattr(checkpoint, "load_params", None)
    with pytest.raises(UserError, match=rf"loading {path} needs at least .* of memory \(parameters .*; use a machine"):
        load(path, dtype)


def test_what_a_notebook_shows_of_a_model_and_a_completion_is_short(model):
    assert re.fullmatch(r"LoadedModel\('.*model', mdm, \d{1,3}(,\d{3})* parameters\)", repr(model))
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(model.params)):,}" in repr(model)
    completion = Completion("Hi", "Yo", [5] * 1000, 8, 0.5, trace=Trace(np.zeros((9, 1000)), np.ones((9, 1000))))
    assert repr(completion) == (
        "Completion(prompt='Hi', text='Yo', nfe=8, seconds=0.5, infilled=False, templated=False, mask_tokens=0)"
    )
