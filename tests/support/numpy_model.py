"""An independent forward pass in float64, one sequence at a time, from the formulas of the papers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def norm(cfg, x, p):
    if cfg.norm == "rmsnorm":
        return p["scale"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps)
    x = x - x.mean(-1, keepdims=True)
    return p["scale"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) + p["bias"]


def base_and_divisors(cfg, length):
    """The base of the frequencies in a text of that length, and what each of them is divided by, pair by pair."""
    scaling, theta, dim = cfg.rope_scaling, cfg.rope_theta, cfg.head_dim
    if scaling.kind == "none":
        return theta, np.ones(dim // 2)
    if scaling.kind == "linear":
        return theta, np.full(dim // 2, scaling.factor)
    if scaling.kind == "dynamic":
        longer = max(length, scaling.original_length) / scaling.original_length
        return theta * (scaling.factor * longer - (scaling.factor - 1)) ** (dim / (dim - 2)), np.ones(dim // 2)
    divisors = np.ones(dim // 2)
    for j in range(dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * j / dim)
        if scaling.kind == "llama3":
            if wavelength > scaling.original_length / scaling.low_freq_factor:
                divisors[j] = scaling.factor
            elif wavelength >= scaling.original_length / scaling.high_freq_factor:
                low, high = scaling.low_freq_factor, scaling.high_freq_factor
                smooth = (scaling.original_length / wavelength - low) / (high - low)
                divisors[j] = 1 / ((1 - smooth) / scaling.factor + smooth)
        else:  # the pairs between which YaRN's ramp rises: those with beta_fast and beta_slow turns in the first length
            turns = np.array([scaling.beta_fast, scaling.beta_slow])
            first, last = np.log(scaling.original_length / (turns * 2 * np.pi)) / np.log(theta) * dim / 2
            first, last = max(np.floor(first), 0), min(np.ceil(last), dim - 1)
            ramp = np.clip((j - first) / (last - first), 0, 1)
            divisors[j] = 1 / (ramp / scaling.factor + (1 - ramp))
    return theta, divisors


def rope(cfg, x, positions, length):
    """NeoX layout on (T, heads, K): channel j turns with channel j + K/2 by position * theta^(-2j/K)."""
    half = cfg.head_dim // 2
    theta, divisors = base_and_divisors(cfg, length)
    stretch = 1.0
    if cfg.rope_scaling.kind == "yarn":
        stretch = cfg.rope_scaling.attention_factor or 0.1 * np.log(cfg.rope_scaling.factor) + 1
    out = np.zeros_like(x)
    for t, position in enumerate(positions):
        for j in range(half):
            angle = position * theta ** (-2 * j / cfg.head_dim) / divisors[j]
            cos, sin = stretch * np.cos(angle), stretch * np.sin(angle)
            if cfg.rope_bf16_tables:
                cos, sin = float(jnp.bfloat16(cos)), float(jnp.bfloat16(sin))
            out[t, :, j] = x[t, :, j] * cos - x[t, :, j + half] * sin
            out[t, :, j + half] = x[t, :, j + half] * cos + x[t, :, j] * sin
    return out


class Pass(NamedTuple):
    hidden: np.ndarray  # (T, D)
    logits: np.ndarray  # (T, V)
    keys: list[np.ndarray]  # of each layer, (T, G, K)
    values: list[np.ndarray]


def numpy_forward(cfg, params, tokens, segments, positions, fresh=None, stale: Pass | None = None) -> Pass:
    """Positions where `fresh` (T,) is False use the keys and values of an earlier pass."""
    keys, values = [], []
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    length = len(tokens)
    visible = segments[:, None] == segments[None, :]
    if cfg.causal:
        visible = visible & (np.arange(length)[None, :] <= np.arange(length)[:, None])
    if cfg.sliding_window:
        distance = np.arange(length)[:, None] - np.arange(length)[None, :]
        visible = visible & (distance < cfg.sliding_window)
    x = p["embed"][tokens]
    if cfg.positions == "learned":
        x = x + p["positions"][positions]
    for layer in range(cfg.n_layers):
        block = jax.tree.map(lambda a, i=layer: a[i], p["blocks"])
        bias = lambda name, b=block: b.get(f"{name}_bias", 0.0)  # noqa: E731
        h = norm(cfg, x, block["attention_norm"])
        q, k, v = (np.einsum("td,dhk->thk", h, block[name]) + bias(name) for name in "qkv")
        if cfg.qk_norm:
            q, k = norm(cfg, q, block["q_norm"]), norm(cfg, k, block["k_norm"])
        if cfg.positions == "rope":
            whole = positions[segments != 0].max(initial=0) + 1
            q, k = rope(cfg, q, positions, whole), rope(cfg, k, positions, whole)
        if fresh is not None:
            k = np.where(fresh[:, None, None], k, stale.keys[layer])
            v = np.where(fresh[:, None, None], v, stale.values[layer])
        keys.append(k)
        values.append(v)
        k, v = (np.repeat(a, cfg.n_heads // cfg.n_kv_heads, axis=1) for a in (k, v))
        scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(cfg.head_dim)
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + np.einsum("hts,shk,hkd->td", weights, v, block["o"]) + bias("o")
        h = norm(cfg, x, block["mlp_norm"])
        up = h @ block["up"] + bias("up")
        if cfg.mlp == "swiglu":
            gate = h @ block["gate"] + bias("gate")
            inner = gate / (1 + np.exp(-gate)) * up
        else:
            inner = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        x = x + inner @ block["down"] + bias("down")
    hidden = norm(cfg, x, p["final_norm"])
    return Pass(hidden, hidden @ (p["embed"].T if cfg.tied_head else p["head"]), keys, values)
