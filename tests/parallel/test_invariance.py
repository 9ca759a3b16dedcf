"""The same tokens on other canvases, with padding on the other side, and on other meshes, at the highest precision.

Bits may differ there, so the tests assert that logits agree to 1e-4 and that every token is the same; where the path of
a plain decoding can be replayed, also that no choice along it was closer than 1e-3.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from support.random_params import make_params

from diffusionlm.config import Config, MeshConfig, ModelConfig
from diffusionlm.model.spec import ModelSpec, suppression_mask
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import make_mesh, tree_shardings
from diffusionlm.sampling import programs
from diffusionlm.sampling.canvas import Canvas
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.denoiser import real_positions
from diffusionlm.sampling.generate import generate, lower_request
from diffusionlm.sampling.request import prepare
from diffusionlm.sampling.state import Trace

TINY = ModelConfig(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=64, vocab_size=50, max_length=192)
MDM = ModelSpec.of(Config(model=TINY))
ARM = ModelSpec.of(Config(objective="arm", model=dataclasses.replace(TINY, causal=True, mask_row=False)))
PARAMS = make_params(TINY)
# No two tokens on the way from these are within 1e-3 of each other (see `expected`).
PROMPTS = [[3, 1, 4, 1, 5], [41, 12], [7, 12, 44, 31, 18], [43], [39, 6, 15], [33], [43, 22, 18], [31, 27, 27, 46]]
SETTINGS = {
    "low confidence": (MDM, SamplingConfig(12, 12, "low_confidence", 0.0, stop_at_eos=False)),
    "guided blocks": (MDM, SamplingConfig(12, 6, "low_confidence", 0.0, block_length=6, guidance=0.5)),
    "dual cache": (MDM, SamplingConfig(12, 12, "low_confidence", 0.0, block_length=6, cache="dual")),
    "autoregressive": (ARM, SamplingConfig(12, temperature=0.0)),
}

EACH = [name if name == "dual cache" else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("strict"):
        yield


@functools.partial(jax.jit, static_argnames="cfg")
def logits_of(params, cfg: ModelConfig, tokens, segments):
    model = Transformer(cfg)
    hidden = model.apply({"params": params}, tokens, segments, real_positions(segments))
    return model.apply({"params": params}, hidden, method=Transformer.head)[..., :50]


@functools.cache
def expected(name: str) -> np.ndarray:
    """The tokens of every prompt on one device, after a check that no choice on the way to them was close."""
    spec, sampling = SETTINGS[name]
    result = generate(PARAMS, spec, PROMPTS, sampling, trace=True)
    if name in ("low confidence", "autoregressive"):
        closest = min(closest_call(spec, prompt, result.trace, r) for r, prompt in enumerate(PROMPTS))
        assert closest > 1e-3
    return result.tokens


def closest_call(spec: ModelSpec, prompt: list[int], trace: Trace, r: int) -> float:
    """The least lead of a token that was taken over the second, and of a position over the next, in logits."""
    leads = []
    for tokens, before, after in zip(trace.tokens[:-1, r], trace.masked[:-1, r], trace.masked[1:, r], strict=True):
        row = jnp.asarray([[*prompt, *tokens]], jnp.int32)
        logits = np.asarray(logits_of(PARAMS, spec.model, row, jnp.ones_like(row)), np.float64)[0]
        logits = np.concatenate([logits[:1], logits[:-1]]) if spec.shifted else logits
        logits = np.sort(logits[len(prompt) :], axis=-1)
        odds = logits[:, -1] - np.logaddexp.reduce(logits[:, :-1], axis=-1)
        taken, remaining = before & ~after, after
        leads += list((logits[:, -1] - logits[:, -2])[taken])
        if remaining.any() and taken.any() and not spec.autoregressive:
            leads.append(odds[taken].min() - odds[remaining].max())
    return min(leads)


@pytest.mark.slow
@pytest.mark.parametrize("name", EACH)
def test_tokens_do_not_depend_on_the_canvas(name):
    """A mate that makes the canvas three times as long."""
    spec, sampling = SETTINGS[name]
    for r in (0, 5):
        result = generate(PARAMS, spec, [[1] * 170, PROMPTS[r]], sampling, row_ids=[99, r])
        np.testing.assert_array_equal(result.tokens[1], expected(name)[r])


@pytest.mark.slow
def test_logits_do_not_depend_on_the_canvas_or_the_side_of_the_padding():
    row = jnp.asarray([[3, 1, 4, 50, 50, 9]], jnp.int32)
    alone = logits_of(PARAMS, TINY, row, jnp.ones_like(row))[0]
    for before, after in ((0, 58), (58, 0), (20, 102)):
        pad = ((0, 0), (before, after))
        padded = logits_of(PARAMS, TINY, jnp.pad(row, pad), jnp.pad(jnp.ones_like(row), pad))[0]
        np.testing.assert_allclose(padded[before : before + 6], alone, atol=1e-4)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.slow
def test_tokens_do_not_depend_on_the_side_of_the_padding(name):
    spec, sampling = SETTINGS[name]
    templates = [[*prompt, *[None] * sampling.length] for prompt in PROMPTS]
    request = prepare(spec, templates, sampling)
    canvas = request.inputs.canvas
    shift = [canvas.tokens_BxT.shape[1] - len(template) for template in templates]

    def rolled(x):
        return x if x.ndim == 1 else np.stack([np.roll(row, n) for row, n in zip(x, shift, strict=True)])

    remaining = Canvas(*map(rolled, canvas))
    assert (remaining.segment_ids_BxT[:, -1] == 1).all() and (remaining.segment_ids_BxT[:, 0] == 0).all()
    state, _ = programs.run(PARAMS, request.inputs._replace(canvas=remaining), request.structure)
    np.testing.assert_array_equal(state.tokens_BxT[:, -sampling.length :], expected(name))


MESHES = {
    "data": MeshConfig(data=8, fsdp=1),
    "fsdp": MeshConfig(fsdp=8),
    "tensor": MeshConfig(data=2, fsdp=2, tensor=2),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, layout",
    [("dual cache", "tensor")]
    + [
        pytest.param(name, layout, marks=pytest.mark.slow)
        for name, layout in (
            ("dual cache", "fsdp"),
            ("low confidence", "data"),
            ("guided blocks", "tensor"),
            ("autoregressive", "tensor"),
            ("low confidence", "tensor"),
            ("guided blocks", "data"),
        )
    ],
)
def test_tokens_do_not_depend_on_the_mesh(name, layout):
    spec, sampling = SETTINGS[name]
    mesh = make_mesh(MESHES[layout])
    boxed = jax.eval_shape(Transformer(TINY).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    sharded = jax.device_put(PARAMS, tree_shardings(boxed, mesh))
    assert nn.unbox(boxed).keys() == PARAMS.keys()
    with jax.set_mesh(mesh):
        result = generate(sharded, spec, PROMPTS, sampling)
    np.testing.assert_array_equal(result.tokens, expected(name))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [pytest.param(MeshConfig(data=8, fsdp=1), marks=pytest.mark.slow), MeshConfig(fsdp=2, tensor=4)]
)
@pytest.mark.parametrize("settings", [pytest.param({}, marks=pytest.mark.slow), {"cache": "dual", "block_length": 6}])
def test_neither_logits_nor_keys_are_gathered(settings, layout):
    """Over rows with a data axis, over the vocabulary with a tensor axis that does not divide its 128-id parts."""
    cfg = dataclasses.replace(TINY, vocab_size=640)  # 768 rows: 6 parts of 128
    spec = ModelSpec.of(Config(model=cfg))
    boxed = jax.eval_shape(Transformer(cfg).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    mesh = make_mesh(layout)
    with jax.set_mesh(mesh):
        shardings = tree_shardings(boxed, mesh)
        params = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), shardings
        )
        sampling = SamplingConfig(12, **settings)
        request = prepare(spec, [[p, *[None] * 60] for p in range(8)], sampling)
        text = lower_request(params, request).compile().as_text()
        result = set(re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text))
    gathered = [tuple(map(int, shape.split(","))) for shape in result]
    # The proposals of one turn, one number per position.
    few = [shape for shape in gathered if math.prod(shape) <= 8 * 64]
    # Parts of the embedding and the head, and one layer of the blocks.
    weights = [shape for shape in gathered if len(shape) == 2 and cfg.d_model in shape or shape[0] == 1]
    assert set(gathered) <= set(few) | set(weights if layout.fsdp > 1 else ()), gathered
    assert layout.fsdp == 1 or set(weights) - set(few)  # so the list is that of a program that gathers


def test_logits_do_not_depend_on_the_mesh():
    rows = jnp.asarray(np.random.default_rng(0).integers(0, 51, (8, 12)), jnp.int32)
    alone = logits_of(PARAMS, TINY, rows, jnp.ones_like(rows))
    boxed = jax.eval_shape(Transformer(TINY).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    for layout in MESHES.values():
        mesh = make_mesh(layout)
        with jax.set_mesh(mesh):
            sharded = jax.device_put(PARAMS, tree_shardings(boxed, mesh))
            np.testing.assert_allclose(logits_of(sharded, TINY, rows, jnp.ones_like(rows)), alone, atol=1e-4)


def test_suppressed_rows_are_the_padding():
    """`logits_of` cuts off the rows that a sampler never draws."""
    assert suppression_mask(TINY, ()).tolist() == [False] * 50 + [True] * (TINY.padded_vocab_size - 50)
