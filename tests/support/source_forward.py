"""Forward passes in float64, written from descriptions of other systems, on tensors in their names and layouts."""

import jax.numpy as jnp
import numpy as np


def rms(x, weight, eps):
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def rotate(x_TxHxK, theta, bf16):
    """Apply half-split rotary positions: channel j is paired with channel j + K/2."""
    T, _, K = x_TxHxK.shape
    angles = np.arange(T)[:, None] * theta ** (-2.0 * np.arange(K // 2) / K)[None]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    if bf16:
        cos, sin = (np.asarray(jnp.asarray(t, jnp.bfloat16), np.float64) for t in (cos, sin))
    a, b = x_TxHxK[..., : K // 2], x_TxHxK[..., K // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q_TxHxK, k_TxGxK, v_TxGxK, causal):
    T, H, K = q_TxHxK.shape
    k, v = (np.repeat(x, H // x.shape[1], axis=1) for x in (k_TxGxK, v_TxGxK))
    scores = np.einsum("thk,shk->hts", q_TxHxK, k) / np.sqrt(K)
    if causal:
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hts,shk->thk", weights, v).reshape(T, H * K)


def silu(x):
    return x / (1 + np.exp(-x))


def llada(t, ids, heads, theta, eps):
    x = t["model.transformer.wte.weight"][ids]
    T, layers = len(ids), len([name for name in t if name.endswith("attn_norm.weight")])
    for i in range(layers):
        p = lambda name, i=i: t[f"model.transformer.blocks.{i}.{name}.weight"]  # noqa: E731
        h = rms(x, p("attn_norm"), eps)
        K = p("q_proj").shape[0] // heads
        q, k, v = ((h @ p(f"{n}_proj").T).reshape(T, -1, K) for n in "qkv")
        x = x + attend(rotate(q, theta, False), rotate(k, theta, False), v, causal=False) @ p("attn_out").T
        h = rms(x, p("ff_norm"), eps)
        x = x + (silu(h @ p("ff_proj").T) * (h @ p("up_proj").T)) @ p("ff_out").T
    return rms(x, t["model.transformer.ln_f.weight"], eps) @ t["model.transformer.ff_out.weight"].T


def smdm(t, ids, heads, causal):
    """Run SMDM; the rows of its fused matrix are q, k and v of head 0, then of head 1, and so on."""
    x = t["transformer.wte.weight"][ids]
    layers = len([name for name in t if name.endswith("norm_1.weight")])
    for i in range(layers):
        p = lambda name, i=i: t[f"transformer.h.{i}.{name}.weight"]  # noqa: E731
        fused = rms(x, p("norm_1"), 1e-5) @ p("attn.attn").T
        K = fused.shape[1] // (3 * heads)
        q, k, v = (
            np.stack([fused[:, (3 * h + part) * K : (3 * h + part + 1) * K] for h in range(heads)], 1)
            for part in range(3)
        )
        x = x + attend(rotate(q, 10000.0, True), rotate(k, 10000.0, True), v, causal) @ p("attn.proj").T
        h = rms(x, p("norm_2"), 1e-5)
        x = x + (silu(h @ p("mlp.swiglu.w1").T) * (h @ p("mlp.swiglu.w2").T)) @ p("mlp.swiglu.w3").T
    return rms(x, t["transformer.ln_f.weight"], 1e-5) @ t["lm_head.weight"].T


def dream(t, ids, heads, theta, eps):
    x = t["model.embed_tokens.weight"][ids]
    T, layers = len(ids), len([name for name in t if name.endswith("input_layernorm.weight")])
    for i in range(layers):
        p = lambda name, i=i: t[f"model.layers.{i}.{name}"]  # noqa: E731
        h = rms(x, p("input_layernorm.weight"), eps)
        K = p("self_attn.q_proj.weight").shape[0] // heads
        q, k, v = (
            (h @ p(f"self_attn.{n}_proj.weight").T + p(f"self_attn.{n}_proj.bias")).reshape(T, -1, K) for n in "qkv"
        )
        x = x + attend(rotate(q, theta, False), rotate(k, theta, False), v, False) @ p("self_attn.o_proj.weight").T
        h = rms(x, p("post_attention_layernorm.weight"), eps)
        gate, up = (h @ p(f"mlp.{n}_proj.weight").T for n in ("gate", "up"))
        x = x + (silu(gate) * up) @ p("mlp.down_proj.weight").T
    return rms(x, t["model.norm.weight"], eps) @ t["lm_head.weight"].T


def diffugpt(t, ids, heads):
    """Run GPT-2 without its causal mask; Conv1D weights are (inputs, outputs)."""

    def layer_norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    def conv(x, name):
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    x = t["embed_tokens.weight"][ids] + t["denoise_model.wpe.weight"][: len(ids)]
    T, D = x.shape
    layers = len([name for name in t if name.endswith("ln_1.weight")])
    for i in range(layers):
        block = f"denoise_model.h.{i}"
        fused = conv(layer_norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")
        q, k, v = (fused[:, part * D : (part + 1) * D].reshape(T, heads, D // heads) for part in range(3))
        x = x + conv(attend(q, k, v, False), f"{block}.attn.c_proj")
        h = conv(layer_norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + conv(h, f"{block}.mlp.c_proj")
    return layer_norm(x, "denoise_model.ln_f") @ t["embed_tokens.weight"].T
