"""Key/value caches: the model's windows, decoding that stays exact, and approximations that are the published ones."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy import special
from support.numpy_model import numpy_forward
from support.tiny_sampler import ARM, MASK, MDM, PARAMS, PROMPTS, TINY

from diffusionlm.config_model import RopeScaling
from diffusionlm.model.cache import Window
from diffusionlm.model.transformer import Transformer
from diffusionlm.sampling.canvas import bucket_size, build_canvas
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import generate, infill, stream
from diffusionlm.sampling.kv_cache import Windows, in_window, plan_windows, window_indices

CAUSAL = ARM.model


# --- which positions a step computes


def test_windows_hold_what_a_step_needs():
    """One row with its gap in two parts, the block 1 of which lies on both sides of a given token."""
    canvas = build_canvas(MDM, [[3, None, None, None, 4, None, None, 5]], 2, [0])  # blocks 0 0 1, 1 2

    def members(cache, shifted):
        return in_window(Windows(cache, shifted), canvas, np.array([1]))[0].nonzero()[0].tolist()

    assert members("dual", False) == [3, 5]
    assert members("dual", True) == [2, 3, 4, 5]  # what predicts them, too
    assert members("prefix", False) == [3, 4, 5, 6, 7]
    assert members("prefix", True) == [2, 3, 4, 5, 6, 7]
    assert members("causal", True) == [2, 4]


def test_widths_cover_every_block():
    canvas = build_canvas(MDM, [[3] * 20 + [None] * 60, [3] * 2 + [None] * 70], 16, [0, 1])
    assert plan_windows("dual", False, canvas).widths == (16,)
    assert plan_windows("dual", True, canvas).widths == (24,)
    prefix = plan_windows("prefix", False, canvas).widths
    assert prefix[-1] == 72 and prefix == tuple(sorted(prefix)) and len(prefix) > 1
    arm = build_canvas(ARM, [[3, 4, None, None], [5, None, None, None]], 1, [0, 1])
    assert plan_windows("causal", True, arm).widths == (1,)


WINDOW_CANVASES = {
    "gap at the start": (MDM, [[None, None, 3, 4, None, None], [None, 3, None, None, None, 4]], 2),
    "left padding": (MDM, [[3, 4, None, None, None, None], [5, None, None]], 2),
    "autoregressive": (ARM, [[3, 4, None, None], [5, None, None, None]], 1),
}


def members_by_definition(cache, shifted, blocks, segments, block):
    """The places of a row's block, those before them for a shifted model, or all from the first of these on."""
    T = len(blocks)
    active = {j for j in range(T) if blocks[j] == block}
    predicting = {j - 1 for j in active if j > 0} if shifted else set()
    if cache == "causal":
        return predicting
    if cache == "dual":
        return active | predicting
    return {j for j in range(min(active | predicting, default=T), T) if segments[j]}


@pytest.mark.parametrize("name", WINDOW_CANVASES)
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_are_their_definition_in_every_block(name, shifted):
    spec, templates, block_length = WINDOW_CANVASES[name]
    canvas = build_canvas(spec, templates, block_length, range(len(templates)))
    for cache in ("dual", "prefix") if spec is MDM else ("causal",):
        windows = plan_windows(cache, shifted, canvas)
        most = 0
        for block in range(canvas.block_BxT.max() + 1):
            window = in_window(windows, canvas, np.full(len(templates), block))
            for r, row in enumerate(window):
                expected = members_by_definition(
                    cache, shifted, canvas.block_BxT[r].tolist(), canvas.segment_ids_BxT[r].tolist(), block
                )
                assert set(row.nonzero()[0].tolist()) == expected
                most = max(most, len(expected))
        assert windows.widths[-1] == bucket_size(most)
        assert (windows.cache, windows.shifted, windows.lockstep) == (cache, shifted, cache != "causal")


def test_without_a_cache_there_are_no_windows():
    canvas = build_canvas(MDM, [[3, None, None]], 0, [0])
    assert plan_windows("none", True, canvas) == Windows("none", False, ()) and not Windows().lockstep


def test_a_prefix_window_shrinks_by_halves_down_to_the_last_block():
    """With 120 positions in blocks of 8, the first window has 120 and the last 8; at most four widths are compiled."""
    canvas = build_canvas(MDM, [[None] * 120], 8, [0])
    assert plan_windows("prefix", False, canvas).widths == (16, 32, 64, 120)
    assert plan_windows("dual", False, canvas).widths == (8,)
    assert plan_windows("prefix", False, build_canvas(MDM, [[None] * 32], 16, [0])).widths == (16, 32)
    assert plan_windows("prefix", False, build_canvas(MDM, [[None] * 32], 0, [0])).widths == (32,)


def test_window_indices_are_the_places_in_rising_order_and_then_t():
    window = np.array([[False, True, True, False, True], [True, False, False, False, False], [False] * 5])
    assert window_indices(window, 3).tolist() == [[1, 2, 4], [0, 5, 5], [5, 5, 5]]
    assert window_indices(window, 5).tolist() == [[1, 2, 4, 5, 5], [0, 5, 5, 5, 5], [5] * 5]
    assert window_indices(window, 12).tolist() == [[1, 2, 4] + [5] * 9, [0] + [5] * 11, [5] * 12]
    assert window_indices(window, 3).dtype == np.int32


# --- the model's windows


DYNAMIC = RopeScaling("dynamic", factor=3, original_length=4)  # so that frequencies depend on the text's length
NETWORKS = {
    "full": TINY,
    "causal": CAUSAL,
    "dynamic": dataclasses.replace(TINY, rope_scaling=DYNAMIC),
    "sliding window": dataclasses.replace(CAUSAL, sliding_window=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_a_window_sees_new_keys_inside_and_old_ones_outside(network):
    """Two rows, the second one padded on the left, with windows that are scattered and not full."""
    cfg = NETWORKS[network]
    rng = np.random.default_rng(0)
    before = rng.integers(0, 50, (2, 10)).astype(np.int32)
    segments = np.array([[1] * 10, [0, 0] + [1] * 8], np.int32)
    positions = np.array([list(range(10)), [0, 0, *range(8)]], np.int32)
    places = np.array([[2, 3, 7, 10], [4, 5, 6, 9]], np.int32)
    after = before.copy()
    fresh = np.zeros((2, 10), bool)
    for r in range(2):
        for place in places[r][places[r] < 10]:
            after[r, place], fresh[r, place] = rng.integers(0, 50), True

    @jax.jit
    def run(params, before, after):
        model = Transformer(cfg)
        first, cache = model.apply({"params": params}, before, segments, positions, method=Transformer.refresh)
        window = Window(places, segments)
        return first, *model.apply({"params": params}, after, positions, window, cache, method=Transformer.extend)

    first, hidden, cache = run(PARAMS, before, after)
    for r in range(2):
        old = numpy_forward(cfg, PARAMS, before[r], segments[r], positions[r])
        new = numpy_forward(cfg, PARAMS, after[r], segments[r], positions[r], fresh[r], old)
        np.testing.assert_allclose(first[r], old.hidden, rtol=1e-4, atol=1e-5)
        inside = places[r][places[r] < 10]
        np.testing.assert_allclose(hidden[r, : len(inside)], new.hidden[inside], rtol=1e-4, atol=1e-5)
        for layer in range(cfg.n_layers):
            np.testing.assert_allclose(cache.k_NxBxSxGxK[layer, r], new.keys[layer], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(cache.v_NxBxSxGxK[layer, r], new.values[layer], rtol=1e-4, atol=1e-5)


# --- what stays exact


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}])
def test_an_autoregressive_cache_changes_nothing(settings):
    sampling = SamplingConfig(length=12, stop_at_eos=False, **settings)
    cached = generate(PARAMS, ARM, PROMPTS, sampling)
    plain = generate(PARAMS, ARM, PROMPTS, dataclasses.replace(sampling, cache="none"))
    np.testing.assert_array_equal(cached.tokens, plain.tokens)
    assert cached.nfe.tolist() == [12] * 4


@pytest.mark.slow
def test_an_autoregressive_cache_is_exact_under_a_sliding_window_and_dynamic_positions():
    model = dataclasses.replace(CAUSAL, sliding_window=5, rope_scaling=DYNAMIC)
    spec, sampling = dataclasses.replace(ARM, model=model), SamplingConfig(length=12, stop_at_eos=False)
    cached = generate(PARAMS, spec, PROMPTS, sampling)
    plain = generate(PARAMS, spec, PROMPTS, dataclasses.replace(sampling, cache="none"))
    np.testing.assert_array_equal(cached.tokens, plain.tokens)
    assert not np.array_equal(plain.tokens, generate(PARAMS, ARM, PROMPTS, sampling).tokens)


EXACT = {
    "low confidence": {"strategy": "low_confidence", "temperature": 0.0},
    "coins": {"strategy": "ancestral"},
    "remasking": {"strategy": "remdm", "remask": 0.3},
    "threshold": {"strategy": "confidence_threshold", "threshold": 0.3},
    "guided": {"strategy": "entropy", "guidance": 0.7},
    "growing": {"strategy": "low_confidence", "temperature": 0.0, "growing": True},
    "standard guidance": {"strategy": "entropy", "guidance": 0.7, "guidance_kind": "standard"},
    "shifted": {"strategy": "low_confidence", "temperature": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "cache, name",
    [
        ("dual", name) if name in ("coins", "growing") else pytest.param("dual", name, marks=pytest.mark.slow)
        for name in EXACT
    ]
    + [pytest.param("prefix", "threshold", marks=pytest.mark.slow)],
)
def test_a_cache_that_is_always_refreshed_is_exact(cache, name):
    spec = dataclasses.replace(MDM, shifted=name == "shifted")
    sampling = SamplingConfig(15, 12, block_length=6, **EXACT[name])
    plain = generate(PARAMS, spec, PROMPTS, sampling)
    exact = generate(PARAMS, spec, PROMPTS, dataclasses.replace(sampling, cache=cache, refresh=1))
    np.testing.assert_array_equal(exact.tokens, plain.tokens)


@pytest.mark.slow
def test_one_step_a_block_is_exact_however_little_is_refreshed():
    """Every step is then the first of its block."""
    sampling = SamplingConfig(15, 3, block_length=6, strategy="low_confidence", temperature=0.0)
    plain = generate(PARAMS, MDM, PROMPTS, sampling)
    np.testing.assert_array_equal(
        generate(PARAMS, MDM, PROMPTS, dataclasses.replace(sampling, cache="dual")).tokens, plain.tokens
    )


# --- what is approximate


def fast_dllm(template, cache, length, steps, block_length, refresh, shifted=False):
    """Fast-dLLM's decoding of one row from its description, at temperature 0; asserts that no choice is close."""
    N, first = len(template), len(template) - length
    row = [MASK if token is None else token for token in template]
    segments, positions = np.ones(N, int), np.arange(N)
    blocks = -(-length // block_length)
    for b in range(blocks):
        begin = first + b * block_length
        end = min(begin + block_length, N)
        S = steps // blocks + (b < steps % blocks)
        for i in range(S):
            if i == 0 or (refresh and i % refresh == 0):
                seen = numpy_forward(TINY, PARAMS, np.array(row), segments, positions)
            else:
                fresh = np.zeros(N, bool)
                fresh[begin - shifted : end if cache == "dual" else N] = True
                again = numpy_forward(TINY, PARAMS, np.array(row), segments, positions, fresh, seen)
                seen = again._replace(logits=np.where(fresh[:, None], again.logits, seen.logits))
            logits = np.concatenate([seen.logits[:1], seen.logits[:-1]]) if shifted else seen.logits.copy()
            logits[:, 50:] = -np.inf
            p = special.softmax(logits, -1)
            masked = [j for j in range(begin, end) if row[j] == MASK]
            order = sorted(masked, key=lambda j: -p[j].max())
            count = (end - begin) // S + (i < (end - begin) % S)
            for j in order[:count]:
                top = np.sort(p[j])
                assert top[-1] - top[-2] > 1e-4
            if 0 < count < len(order):
                chosen, rival = (special.logit(p[order[k]].max()) for k in (count - 1, count))
                assert chosen - rival > 2e-5
            for j in order[:count]:
                row[j] = int(np.argmax(p[j]))
    return row[first:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "cache, refresh, shifted",
    [
        ("dual", 2, False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("prefix", 0, True), ("dual", 0, False), ("dual", 0, True), ("prefix", 0, False))
        ),
    ],
)
def test_approximations_match_a_slow_reference(cache, refresh, shifted):
    sampling = SamplingConfig(
        14, 14, "low_confidence", 0.0, block_length=5, cache=cache, refresh=refresh, stop_at_eos=False
    )
    spec = dataclasses.replace(MDM, shifted=shifted)
    tokens = generate(PARAMS, spec, PROMPTS, sampling).tokens.tolist()
    expected = [fast_dllm([*p, *[None] * 14], cache, 14, 14, 5, refresh, shifted) for p in PROMPTS]
    assert tokens == expected
    plain = generate(PARAMS, spec, PROMPTS, dataclasses.replace(sampling, cache="none", refresh=0)).tokens.tolist()
    assert tokens != plain  # an approximation


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_batch_mates_do_not_change_a_row_with_a_cache(cache):
    """Also mates of other lengths, whose windows are wider and whose blocks end at other steps."""
    sampling = SamplingConfig(strategy="confidence_threshold", threshold=0.3, cache=cache, block_length=5, steps=14)
    spec = dataclasses.replace(MDM, shifted=cache == "prefix")
    templates = [[*p, *[None] * 14] for p in PROMPTS]
    together = infill(PARAMS, spec, templates, sampling).rows
    for r, template in enumerate(templates):
        mates = [[3] * 20 + [None] * 14, template, [4, None, None, 5, None], [6] + [None] * 14]
        assert infill(PARAMS, spec, mates, sampling, row_ids=[50, r, 51, 52]).rows[1] == together[r]


@pytest.mark.slow
def test_streaming_goes_through_the_same_states_with_a_cache():
    sampling = SamplingConfig(9, 9, block_length=4, strategy="entropy", cache="dual")
    whole = generate(PARAMS, MDM, PROMPTS, sampling, trace=True)
    frames = list(stream(PARAMS, MDM, PROMPTS, sampling))
    assert [frame.step for frame in frames] == list(range(len(whole.trace.tokens)))
    for k, frame in enumerate(frames):
        np.testing.assert_array_equal(frame.tokens, whole.trace.tokens[k])
