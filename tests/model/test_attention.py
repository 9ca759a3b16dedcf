"""Attention against loops in numpy, for every kind of mask and grouping of heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from diffusionlm.model.attention import annealed_mask, attention

B, T, K = 2, 7, 6
SEGMENTS = {
    "none": None,
    "documents": np.array([[1, 1, 1, 2, 2, 3, 3], [1, 2, 2, 2, 2, 2, 3]], np.int32),
    "padding": np.array([[1, 1, 1, 1, 2, 0, 0], [0, 0, 1, 1, 1, 1, 0]], np.int32),
}

run = jax.jit(attention, static_argnames=("causal", "block", "window"))


def inputs(H: int, G: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, T, heads, K)).astype(np.float32) for heads in (H, G, G)]


def allowed(b: int, i: int, j: int, causal: bool, segments: np.ndarray | None, block: int = 1, window: int = 0) -> bool:
    last = i - i % block + block - 1  # of the block that i lies in
    return (
        (not causal or j <= last)
        and (not window or i - j < window)
        and (segments is None or segments[b, i] == segments[b, j])
    )


def by_loops(q, k, v, causal, segments, block=1, window=0):
    H, G = q.shape[2], k.shape[2]
    out = np.zeros(q.shape)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for i in range(T):
                keys = [j for j in range(T) if allowed(b, i, j, causal, segments, block, window)]
                scores = np.array([q[b, i, h].astype(np.float64) @ k[b, j, g] / np.sqrt(K) for j in keys])
                weights = np.exp(scores - scores.max())
                out[b, i, h] = (weights / weights.sum()) @ v[b, keys, g]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("H, G", [(4, 4), (4, 2), (3, 1)])
def test_attention_is_what_the_loops_say(causal, segments, H, G):
    q, k, v = inputs(H, G)
    ids = SEGMENTS[segments]
    out = run(q, k, v, causal=causal, segment_ids_BxT=ids)
    assert out.shape == (B, T, H, K) and out.dtype == jnp.float32
    np.testing.assert_allclose(out, by_loops(q, k, v, causal, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("segments", SEGMENTS)
def test_block_causal_attention_is_what_the_loops_say(segments):
    """Blocks of 3, the last of which is shorter."""
    q, k, v = inputs(4, 2)
    ids = SEGMENTS[segments]
    out = run(q, k, v, causal=True, block=3, segment_ids_BxT=ids)
    np.testing.assert_allclose(out, by_loops(q, k, v, True, ids, block=3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 3, T, T + 5])
@pytest.mark.parametrize("segments", SEGMENTS)
def test_a_window_holds_the_newest_positions(segments, window):
    """As many as it is wide, the query's own among them; a window as long as the text is none."""
    q, k, v = inputs(4, 2)
    ids = SEGMENTS[segments]
    out = run(q, k, v, causal=True, window=window, segment_ids_BxT=ids)
    np.testing.assert_allclose(out, by_loops(q, k, v, True, ids, window=window), rtol=1e-5, atol=1e-5)
    if window >= T:
        np.testing.assert_array_equal(out, run(q, k, v, causal=True, segment_ids_BxT=ids))


def test_a_mask_that_is_data_comes_on_top_of_the_others():
    q, k, v = inputs(4, 2)
    ids = SEGMENTS["documents"]
    tri = np.tri(T, dtype=bool)
    out = run(q, k, v, causal=False, segment_ids_BxT=ids, allowed_TxS=tri)
    np.testing.assert_allclose(out, by_loops(q, k, v, True, ids), rtol=1e-5, atol=1e-5)


def test_annealing_opens_a_share_of_the_later_positions():
    """Each independently; nothing that was open closes, and at 1 all are open (DiffuLLaMA's rule)."""
    n, fraction = 400, 0.3
    result = np.asarray(jax.jit(annealed_mask, static_argnums=1)(jax.random.key(0), n, fraction))
    assert result[np.tri(n, dtype=bool)].all()
    later = result[~np.tri(n, dtype=bool)]
    sigma = np.sqrt(fraction * (1 - fraction) / later.size)
    assert abs(later.mean() - fraction) < 4 * sigma
    rows = np.array([result[i, i + 1 :].mean() for i in range(n - 100)])  # no row is open or closed as a whole
    assert rows.std() < 0.1
    np.testing.assert_array_equal(annealed_mask(jax.random.key(0), 50, 0.0), np.tri(50, dtype=bool))
    assert annealed_mask(jax.random.key(0), 50, 1.0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_leaks_from_behind_the_mask(causal):
    """Not even huge values, and not into the gradients either."""
    q, k, v = inputs(4, 2)
    ids = SEGMENTS["padding"]
    b, i = 0, 3  # attends to 0..3 in either case: 4 is another document, 5 and 6 are padding
    loud = [x.copy() for x in (k, v)]
    for x in loud:
        x[b, 4:] = 1e30
    quiet_out = run(q, k, v, causal=causal, segment_ids_BxT=ids)
    loud_out = run(q, *loud, causal=causal, segment_ids_BxT=ids)
    np.testing.assert_array_equal(quiet_out[b, :4], loud_out[b, :4])

    def one(k, v):
        return jnp.square(attention(q, k, v, causal=causal, segment_ids_BxT=ids)[b, i]).sum()

    for grad in jax.jit(jax.grad(one, argnums=(0, 1)))(k, v):
        np.testing.assert_array_equal(grad[b, 4:], 0.0)
        np.testing.assert_array_equal(grad[1], 0.0)
        assert (np.abs(grad[b, :4]).max((1, 2)) > 0).all()


def test_padding_attends_to_padding_and_stays_finite():
    q, k, v = inputs(4, 4)
    ids = np.zeros((B, T), np.int32)
    out = run(q, k, v, causal=False, segment_ids_BxT=ids)
    np.testing.assert_allclose(out, by_loops(q, k, v, False, None), rtol=1e-5, atol=1e-5)


def test_full_attention_does_not_know_the_order_of_the_keys():
    q, k, v = inputs(4, 4)
    order = np.random.default_rng(1).permutation(T)
    np.testing.assert_allclose(
        run(q, k, v, causal=False, segment_ids_BxT=None),
        run(q, k[:, order], v[:, order], causal=False, segment_ids_BxT=None),
        rtol=1e-5,
        atol=1e-6,
    )


def test_bfloat16_scores_are_compared_in_float32():
    """Scores 200 and 200.5 are one number in bfloat16, but their softmax is (0.38, 0.62)."""
    q = jnp.array([[16.0, 1.0, 0.0, 0.0], [0.0] * 4], jnp.bfloat16).reshape(1, 2, 1, 4)
    k = jnp.array([[25.0, 0.0, 0.0, 0.0], [25.0, 1.0, 0.0, 0.0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    v = jnp.array([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    out = attention(q, k, v, causal=False, segment_ids_BxT=None)
    assert out.dtype == jnp.bfloat16
    expected = np.exp([0.0, 0.5]) / np.exp([0.0, 0.5]).sum()
    np.testing.assert_allclose(np.asarray(out[0, 0, 0, :2], np.float32), expected, atol=4e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strict_promotion_and_a_float32_softmax(dtype):
    q, k, v = (jnp.asarray(x, dtype) for x in inputs(4, 2))
    ids = jnp.asarray(SEGMENTS["padding"])

    def exponents(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "exp":
                yield equation.invars[0].aval.dtype
            for inner in jaxprs_in_params(equation.params):
                yield from exponents(inner)

    with jax.numpy_dtype_promotion("strict"):
        jaxpr = jax.make_jaxpr(lambda *x: attention(*x, causal=True, segment_ids_BxT=ids))(q, k, v)
    result = list(exponents(jaxpr.jaxpr))
    assert result and all(d == jnp.float32 for d in result)
    assert jaxpr.out_avals[0].dtype == jnp.dtype(dtype)
