"""The families of released models: what their tensors are called and hold, and how their configs are read and written.

A family is one `Family`, used in both directions. Sources: GPT-2, LLaMA, Mistral and Qwen2 as in Hugging Face's
transformers; Dream-org/Dream-v0-Base-7B; GSAI-ML/LLaDA-8B-Base; nieshen/SMDM; diffusionfamily/diffugpt-s, -m and
diffullama.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffusionlm import presets
from diffusionlm.config import ModelConfig
from diffusionlm.errors import UserError
from diffusionlm.interop.layouts import Fused, Interleaved, Layout, Matrix, Vector, Vocabulary
from diffusionlm.interop.weights import Weights


@dataclass(frozen=True)
class Rule:
    """A tensor of theirs, and those of ours that it holds; `{i}` in a name is the number of a layer."""

    theirs: tuple[str, ...]  # the first that is there; of several that are, all must be equal
    ours: tuple[str, ...]  # paths in the tree of parameters
    layout: Layout


@dataclass(frozen=True)
class Family:
    """A family of released models.

    Attributes:
      model: config.json, or {} without one, and the weights -> the network, causal as `objective` says or, of families
        that have both kinds, as it is; `UserError` for what we have not.
      rules: of the tensors of a network.
      config: the inverse of `model`: a network -> config.json, without ids of tokens.
      objective: what the models were trained for; of families with both kinds, mdm.
      alignment: of its diffusion models.
      architectures: in config.json, by which a family is known; none: it has to be named.
      prefixes: that names may begin with, or not.
      ignored: of other tensors that may be there, a pattern.
      mask_id: of models whose config does not tell it, from the number of rows; None: the row behind the vocabulary.
      suppress_mask: whether the mask id must be kept from being predicted, where it is one of the vocabulary's.
      start: what stands before a text: its BOS, the EOS of the text before, or nothing.
      ids: of tokens, where there is no config.
    """

    model: Callable[[Mapping[str, Any], Weights], ModelConfig]
    rules: Callable[[ModelConfig], list[Rule]]
    config: Callable[[ModelConfig], dict[str, Any]] | None = None
    objective: Literal["arm", "mdm"] = "arm"
    alignment: Literal["same", "shifted"] = "shifted"
    architectures: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    ignored: str = r"$^"
    mask_id: Callable[[ModelConfig], int | None] | None = None
    suppress_mask: bool = False
    start: Literal["bos", "eos", "none"] = "bos"
    ids: Mapping[str, int] = dataclasses.field(default_factory=dict)


# --- tensors


def _rules(cfg: ModelConfig, names: Mapping[str, str]) -> list[Rule]:
    """One tensor of theirs for each of ours; `names`: ours -> theirs. A tied head may be stored under either name."""
    rules = []
    for ours, theirs in names.items():
        if ours == "head" and cfg.tied_head:
            continue
        stored = (theirs, names["head"]) if ours == "embed" and cfg.tied_head else (theirs,)
        rules.append(Rule(stored, (ours,), _layout(cfg, ours)))
    return rules


def _layout(cfg: ModelConfig, ours: str) -> Layout:
    leaf = ours.rpartition("/")[2]
    if leaf == "embed":
        return Vocabulary(cfg.embedding_rows)
    if leaf == "head":
        return Vocabulary(cfg.vocab_size, head=True)
    if leaf == "scale" or leaf.endswith("bias"):
        return Vector()
    return Matrix(inputs=2 if leaf == "o" else 1, transposed=leaf != "positions")


def _hf_decoder(cfg: ModelConfig) -> list[Rule]:
    """LLaMA, Mistral, Qwen2 and Dream."""
    layer = "model.layers.{i}."
    names = {
        "embed": "model.embed_tokens.weight",
        "head": "lm_head.weight",
        "final_norm/scale": "model.norm.weight",
        "blocks/attention_norm/scale": layer + "input_layernorm.weight",
        "blocks/mlp_norm/scale": layer + "post_attention_layernorm.weight",
    }
    names |= {f"blocks/{name}": f"{layer}self_attn.{name}_proj.weight" for name in "qkvo"}
    if cfg.qkv_bias:
        names |= {f"blocks/{name}_bias": f"{layer}self_attn.{name}_proj.bias" for name in "qkv"}
    names |= {f"blocks/{name}": f"{layer}mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    return _rules(cfg, names)


def _llada(cfg: ModelConfig) -> list[Rule]:
    layer = "model.transformer.blocks.{i}."
    theirs = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out"}
    theirs |= {"gate": "ff_proj", "up": "up_proj", "down": "ff_out"}
    theirs |= {"attention_norm/scale": "attn_norm", "mlp_norm/scale": "ff_norm"}
    names = {
        "embed": "model.transformer.wte.weight",
        "head": "model.transformer.ff_out.weight",
        "final_norm/scale": "model.transformer.ln_f.weight",
    }
    return _rules(cfg, names | {f"blocks/{ours}": f"{layer}{name}.weight" for ours, name in theirs.items()})


def _smdm(cfg: ModelConfig) -> list[Rule]:
    layer = "transformer.h.{i}."
    theirs = {"o": "attn.proj", "gate": "mlp.swiglu.w1", "up": "mlp.swiglu.w2", "down": "mlp.swiglu.w3"}
    theirs |= {"attention_norm/scale": "norm_1", "mlp_norm/scale": "norm_2"}
    names = {"embed": "transformer.wte.weight", "head": "lm_head.weight", "final_norm/scale": "transformer.ln_f.weight"}
    rules = _rules(cfg, names | {f"blocks/{ours}": f"{layer}{name}.weight" for ours, name in theirs.items()})
    fused = Rule((layer + "attn.attn.weight",), ("blocks/q", "blocks/k", "blocks/v"), Interleaved())
    return [*rules, fused]


def _gpt2(cfg: ModelConfig, embed: str = "wte.weight", body: str = "") -> list[Rule]:
    """Kernels are (inputs, outputs) in GPT-2."""
    layer = body + "h.{i}."
    names = {"embed": embed, "head": "lm_head.weight", "positions": body + "wpe.weight"}
    for ours, theirs in (
        ("final_norm", body + "ln_f"),
        ("blocks/attention_norm", layer + "ln_1"),
        ("blocks/mlp_norm", layer + "ln_2"),
    ):
        names |= {f"{ours}/scale": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}
    rules = _rules(cfg, names)
    for ours, theirs in (("o", "attn.c_proj"), ("up", "mlp.c_fc"), ("down", "mlp.c_proj")):
        kernel = Matrix(inputs=2 if ours == "o" else 1, transposed=False)
        rules.append(Rule((f"{layer}{theirs}.weight",), (f"blocks/{ours}",), kernel))
        rules.append(Rule((f"{layer}{theirs}.bias",), (f"blocks/{ours}_bias",), Vector()))
    for end, part in (("weight", Matrix(transposed=False)), ("bias", Vector())):
        ours = tuple(f"blocks/{name}{'_bias' * (end == 'bias')}" for name in "qkv")
        rules.append(Rule((f"{layer}attn.c_attn.{end}",), ours, Fused(part)))
    return rules


def _diffugpt(cfg: ModelConfig) -> list[Rule]:
    return _gpt2(cfg, "embed_tokens.weight", "denoise_model.")


# --- configs


def _require(config: Mapping[str, Any], **known: tuple[Any, ...]) -> None:
    """Refuses a config with another value than those that mean what our network does; an absent field is one."""
    for name, values in known.items():
        if name in config and config[name] not in values:
            allowed = " or ".join(map(repr, values))
            raise UserError(f"config.json has {name}={config[name]!r}, which this network has not; only {allowed}")


def _rope_theta(config: Mapping[str, Any], default: float) -> float:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json scales its rotary positions (rope_type={kind!r}), which this network has not")
    return float(config.get("rope_theta") or rope.get("rope_theta") or default)


def _hf_model(config: Mapping[str, Any], qkv_bias: bool, rope_theta: float) -> ModelConfig:
    _require(config, hidden_act=("silu",), mlp_bias=(False, None), attention_bias=(qkv_bias, None))
    max_length = config["max_position_embeddings"]
    if config.get("use_sliding_window", True) and (window := config.get("sliding_window")):
        max_length = min(max_length, window)  # up to there attention is whole
    return ModelConfig(
        d_model=config["hidden_size"],
        n_layers=config["num_hidden_layers"],
        n_heads=config["num_attention_heads"],
        n_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        d_ff=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        mask_row=False,
        max_length=max_length,
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=_rope_theta(config, rope_theta),
        qkv_bias=qkv_bias,
        tied_head=bool(config.get("tie_word_embeddings", False)),
    )


def _hf_config(cfg: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    _can_be_written(cfg, model_type, norm="rmsnorm", positions="rope", mlp="swiglu", linear_bias=False)
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.d_ff,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": cfg.tied_head,
    }


def _can_be_written(cfg: ModelConfig, format: str, **wanted: Any) -> None:
    for name, value in wanted.items():
        if getattr(cfg, name) != value:
            raise UserError(
                f"format={format} has no model with model.{name}={getattr(cfg, name)!r}, only {value!r}; use another "
                "format"
            )


def _llama_config(cfg: ModelConfig) -> dict[str, Any]:
    _can_be_written(cfg, "llama", qkv_bias=False)
    return _hf_config(cfg, "llama", "LlamaForCausalLM") | {"attention_bias": False, "mlp_bias": False}


def _qwen2_config(
    cfg: ModelConfig, model_type: str = "qwen2", architecture: str = "Qwen2ForCausalLM"
) -> dict[str, Any]:
    _can_be_written(cfg, model_type, qkv_bias=True, head_dim=cfg.d_model // cfg.n_heads)
    found = _hf_config(cfg, model_type, architecture) | {"use_sliding_window": False}
    del found["head_dim"]
    return found


def _llada_model(config: Mapping[str, Any], weights: Weights) -> ModelConfig:
    _require(
        config,
        activation_type=("silu",),
        layer_norm_type=("rms",),
        block_type=("llama",),
        include_bias=(False,),
        include_qkv_bias=(False, None),
        attention_layer_norm=(False,),
        input_emb_norm=(False,),
        scale_logits=(False,),
        alibi=(False,),
        rope=(True,),
    )
    return ModelConfig(
        d_model=config["d_model"],
        n_layers=config["n_layers"],
        n_heads=config["n_heads"],
        n_kv_heads=config.get("n_kv_heads") or config["n_heads"],
        head_dim=config["d_model"] // config["n_heads"],
        d_ff=config["mlp_hidden_size"],
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        mask_row=False,
        max_length=config["max_sequence_length"],
        norm_eps=float(config.get("rms_norm_eps", 1e-5)),
        rope_theta=_rope_theta(config, 10000.0),
        tied_head=bool(config.get("weight_tying", False)),
    )


def _llada_config(cfg: ModelConfig) -> dict[str, Any]:
    own = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "linear_bias": False, "qkv_bias": False}
    _can_be_written(cfg, "llada", **own, head_dim=cfg.d_model // cfg.n_heads)
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": cfg.d_model,
        "n_layers": cfg.n_layers,
        "n_heads": cfg.n_heads,
        "n_kv_heads": cfg.n_kv_heads,
        "mlp_hidden_size": cfg.d_ff,
        "vocab_size": cfg.vocab_size,
        "embedding_size": cfg.vocab_size,
        "max_sequence_length": cfg.max_length,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "weight_tying": cfg.tied_head,
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "block_type": "llama",
        "rope": True,
        "rope_full_precision": True,
        "alibi": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
    }


def _smdm_model(config: Mapping[str, Any], weights: Weights) -> ModelConfig:
    """From the shapes alone: SMDM's files come without a config, and sizes are those of its ladder."""
    layers = _layers(weights, r"transformer\.h\.(\d+)\.")
    rows, width = _shape_of(weights, "transformer.wte.weight")
    ladder = [presets.get(name) for name in presets.names() if name.startswith("smdm_")]
    found = [cfg for cfg in ladder if (cfg.n_layers, cfg.d_model) == (layers, width)]
    if not found or rows not in (32000, 32001):
        raise UserError(f"SMDM has no model with {layers} layers of width {width} and {rows} input rows")
    model = dataclasses.replace(found[0], rope_bf16_tables=True)
    return model if rows == 32001 else presets.arm_twin(model)


def _gpt2_model(config: Mapping[str, Any], weights: Weights) -> ModelConfig:
    _require(
        config,
        activation_function=("gelu_new", "gelu_pytorch_tanh"),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
    )
    return dataclasses.replace(
        presets.get("gpt2"),
        d_model=config["n_embd"],
        n_layers=config["n_layer"],
        n_heads=config["n_head"],
        n_kv_heads=config["n_head"],
        head_dim=config["n_embd"] // config["n_head"],
        d_ff=config.get("n_inner") or 4 * config["n_embd"],
        vocab_size=config["vocab_size"],
        max_length=config["n_positions"],
        norm_eps=float(config.get("layer_norm_epsilon", 1e-5)),
        tied_head=bool(config.get("tie_word_embeddings", True)),
        dtype="float32",
    )


def _gpt2_config(cfg: ModelConfig) -> dict[str, Any]:
    own = {"norm": "layernorm", "positions": "learned", "mlp": "gelu", "linear_bias": True, "n_kv_heads": cfg.n_heads}
    _can_be_written(cfg, "gpt2", **own, head_dim=cfg.d_model // cfg.n_heads)
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": cfg.d_model,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "n_inner": cfg.d_ff,
        "n_positions": cfg.max_length,
        "vocab_size": cfg.vocab_size,
        "layer_norm_epsilon": cfg.norm_eps,
        "activation_function": "gelu_new",
        "tie_word_embeddings": cfg.tied_head,
    }


def _diffugpt_model(config: Mapping[str, Any], weights: Weights) -> ModelConfig:
    """From the shapes alone: a head is 64 wide, and only DiffuGPT-M has a row of its own for the mask."""
    rows, width = _shape_of(weights, "embed_tokens.weight", "lm_head.weight")
    gpt2 = presets.get("gpt2")
    return dataclasses.replace(
        gpt2,
        d_model=width,
        n_layers=_layers(weights, r"denoise_model\.h\.(\d+)\."),
        n_heads=width // 64,
        n_kv_heads=width // 64,
        d_ff=4 * width,
        causal=False,
        mask_row=rows > gpt2.vocab_size,
        max_length=_shape_of(weights, "denoise_model.wpe.weight")[0],
        dtype="float32",
    )


def _layers(weights: Weights, pattern: str) -> int:
    numbers = [int(found[1]) for name in weights.shapes if (found := re.match(pattern, name))]
    return max(numbers, default=-1) + 1


def _shape_of(weights: Weights, *names: str) -> tuple[int, ...]:
    for name in names:
        if name in weights.shapes:
            return weights.shapes[name]
    raise UserError(f"{weights.source} has no tensor {names[0]}; is it of this family?")


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        model=_gpt2_model,
        rules=_gpt2,
        config=_gpt2_config,
        architectures=("GPT2LMHeadModel", "GPT2Model"),
        prefixes=("transformer.",),
        ignored=r".*\.attn\.(bias|masked_bias)",
        start="eos",
    ),
    "llama": Family(
        model=lambda config, _: _hf_model(config, qkv_bias=False, rope_theta=10000.0),
        rules=_hf_decoder,
        config=_llama_config,
        architectures=("LlamaForCausalLM", "MistralForCausalLM"),
        ignored=r".*\.rotary_emb\.inv_freq",
    ),
    "qwen2": Family(
        model=lambda config, _: _hf_model(config, qkv_bias=True, rope_theta=1e6),
        rules=_hf_decoder,
        config=_qwen2_config,
        architectures=("Qwen2ForCausalLM",),
        start="eos",
    ),
    "dream": Family(
        model=lambda config, _: _hf_model(config, qkv_bias=True, rope_theta=1e6),
        rules=_hf_decoder,
        config=lambda cfg: _qwen2_config(cfg, "Dream", "DreamModel"),
        objective="mdm",
        architectures=("DreamModel", "DreamForCausalLM"),
    ),
    "llada": Family(
        model=_llada_model,
        rules=_llada,
        config=_llada_config,
        objective="mdm",
        alignment="same",
        architectures=("LLaDAModelLM",),
        start="none",
    ),
    "smdm": Family(
        model=_smdm_model,
        rules=_smdm,
        objective="mdm",
        alignment="same",
        ids={"bos_token_id": 1, "eos_token_id": 2},
    ),
    "diffugpt": Family(
        model=_diffugpt_model,
        rules=_diffugpt,
        objective="mdm",
        prefixes=("model.",),
        ignored=r".*\.attn\.(bias|masked_bias)",
        mask_id=lambda cfg: None if cfg.mask_row else 10541,
        suppress_mask=True,
        start="eos",
        ids={"bos_token_id": 50256, "eos_token_id": 50256},
    ),
    "diffullama": Family(
        model=lambda config, _: _hf_model(config, qkv_bias=False, rope_theta=10000.0),
        rules=_hf_decoder,
        config=_llama_config,
        objective="mdm",
        ignored=r".*\.rotary_emb\.inv_freq",
        mask_id=lambda cfg: 811,
        suppress_mask=True,
        ids={"bos_token_id": 1, "eos_token_id": 2},
    ),
}
