"""The families of weights: names, layouts and config.json fields of each, used in both directions.

To add a family, add an entry to `FAMILIES`; its tensors are named in `rules`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusionlm.interop.rules import Rule, gpt2_rules, llada_rules, llama_rules, smdm_rules
from diffusionlm.interop.translations import ALL_KINDS, MISTRAL_WINDOW, QWEN_WINDOW, Translation, rope

# A constant stands in for an absent field only; a function, of the values of `ModelConfig` known so far and the parsed
# config.json, also for null, where the family's reference computes the value.
Default = bool | int | float | Callable[[Mapping[str, Any], Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Family:
    """Names, layouts and config.json fields of one family of weights.

    Attributes:
      rules: the tensors and the parameters that they hold.
      embedding: the name of the tensor of input rows.
      head: the name of the head; tied models may store it instead of the embedding, or besides it.
      prefix: a prefix that all names may lack together.
      ignored: a pattern of tensors that hold no parameters.
      marker: a string that only the tensor names of this family contain.
      fields: `ModelConfig` field -> config.json field. If empty, the format has no config.json, and the shapes of the
        tensors select a preset.
      translations: rules for config.json fields that mean some of ours together; later ones see what earlier ones read.
      constants: `ModelConfig` fields that the family fixes.
      optional: `ModelConfig` fields that config.json may omit, with their defaults.
      supported: config.json field -> the values that our network computes; an absent field has the first, unless
        `absent` says otherwise.
      absent: config.json field -> the value that the family's reference takes for it where it is absent, if that is not
        the first supported one or our default. Exports have all of these fields.
      unread: `ModelConfig` fields that the reference computes from others, whatever config.json says; not exported.
      harmless: config.json fields that the reference ignores, besides those that every family may have.
      exported: config.json fields that exports have besides.
      generation_config: True if the reference needs a generation_config.json.
      code: the files of code that `exported["auto_map"]` names, which exports do not contain.
      architectures: values of the config.json field `architectures` -> the value of `model_type` that goes with it.
      mdm: True for masked diffusion models, False for autoregressive models.
      shifted: True if position i predicts token i + 1.
      mask_id: the mask id as a function of the number of input rows, for families whose config.json has none.
      suppress_mask: True if the mask id is never predicted, where it is a token of the vocabulary.
      mask_in_head: True if the head has a row for an appended mask token too, as other libraries require.
      ids: special ids to fall back on where neither the tokenizer nor config.json has them.
    """

    rules: tuple[Rule, ...]
    embedding: str
    head: str = "lm_head.weight"
    prefix: str = ""
    ignored: str = r"(?!)"
    marker: str = ""
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    translations: tuple[Translation, ...] = ()
    constants: Mapping[str, bool | str] = dataclasses.field(default_factory=dict)
    optional: Mapping[str, Default] = dataclasses.field(default_factory=dict)
    supported: Mapping[str, tuple[bool | int | str | None, ...]] = dataclasses.field(default_factory=dict)
    absent: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unread: frozenset[str] = frozenset()
    harmless: frozenset[str] = frozenset()
    exported: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    generation_config: bool = False
    code: tuple[str, ...] = ()
    architectures: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mdm: bool = False
    shifted: bool = True
    mask_id: Callable[[int], int] | None = None
    suppress_mask: bool = False
    mask_in_head: bool = True
    ids: Mapping[str, int] = dataclasses.field(default_factory=dict)


def _n_heads(known: Mapping[str, Any], fields: Mapping[str, Any]) -> int:
    return known["n_heads"]


def equal_head_dim(known: Mapping[str, Any], fields: Mapping[str, Any]) -> int:
    """Return the head dimension of heads that share `d_model` equally."""
    return known["d_model"] // known["n_heads"]


def _llada_d_ff(known: Mapping[str, Any], fields: Mapping[str, Any]) -> Any:
    ratio = fields.get("mlp_ratio", 4)
    return ratio * known["d_model"] if type(ratio) is int else ratio


_ROPE = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "linear_bias": False, "qkv_bias": False}

_LLAMA = Family(
    rules=llama_rules(),
    embedding="model.embed_tokens.weight",
    prefix="model.",
    ignored=r".*rotary_emb\.inv_freq",
    fields={
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "d_ff": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_length": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "tied_head": "tie_word_embeddings",
    },
    translations=(rope(*ALL_KINDS),),
    constants=_ROPE,
    optional={"n_kv_heads": _n_heads, "head_dim": equal_head_dim, "tied_head": False},
    supported={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "sliding_window": (None,),
        "quantization_config": (None,),
    },
    harmless=frozenset({"is_llama_config", "max_sequence_length"}),
    architectures={"LlamaForCausalLM": "llama"},
)

_MISTRAL = dataclasses.replace(
    _LLAMA,
    translations=(rope(*ALL_KINDS), MISTRAL_WINDOW),
    supported={"hidden_act": ("silu",), "quantization_config": (None,)},
    absent={"num_key_value_heads": 8, "sliding_window": 4096},
    harmless=frozenset(),
    architectures={"MistralForCausalLM": "mistral"},
)

_QWEN2 = dataclasses.replace(
    _LLAMA,
    rules=llama_rules(qkv_bias=True),
    translations=(rope(*ALL_KINDS), QWEN_WINDOW),
    constants=_ROPE | {"qkv_bias": True},
    supported={"hidden_act": ("silu",), "quantization_config": (None,)},
    absent={"num_key_value_heads": 32},
    harmless=frozenset({"attention_bias"}),
    architectures={"Qwen2ForCausalLM": "qwen2"},
)

_QWEN3 = dataclasses.replace(
    _QWEN2,
    rules=llama_rules(qk_norm=True),
    constants=_ROPE | {"qk_norm": True},
    optional={"n_kv_heads": _n_heads, "head_dim": 128, "tied_head": False},
    supported={"hidden_act": ("silu",), "attention_bias": (False,), "quantization_config": (None,)},
    harmless=frozenset(),
    architectures={"Qwen3ForCausalLM": "qwen3"},
)

_DREAM = dataclasses.replace(
    _QWEN2,
    translations=(rope(),),
    supported={"hidden_act": ("silu",), "use_sliding_window": (False,), "quantization_config": (None,)},
    absent={"num_key_value_heads": 32, "mask_token_id": 151666, "pad_token_id": 151643},
    unread=frozenset({"head_dim"}),
    harmless=frozenset({"attention_bias", "max_window_layers", "mlp_bias", "sliding_window"}),
    exported={
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "pad_token_id": None,
        "sliding_window": None,
    },
    generation_config=True,
    code=("configuration_dream.py", "modeling_dream.py", "generation_utils.py"),
    architectures={"DreamModel": "Dream"},
    mdm=True,
)

_GPT2 = Family(
    rules=gpt2_rules("transformer.wte.weight", "transformer."),
    embedding="transformer.wte.weight",
    prefix="transformer.",
    ignored=r".*\.attn\.(masked_)?bias",  # the causal mask
    fields={
        "d_model": "n_embd",
        "n_layers": "n_layer",
        "n_heads": "n_head",
        "d_ff": "n_inner",
        "vocab_size": "vocab_size",
        "max_length": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "tied_head": "tie_word_embeddings",
    },
    constants={"norm": "layernorm", "positions": "learned", "mlp": "gelu", "linear_bias": True, "qkv_bias": False},
    optional={"d_ff": lambda known, fields: 4 * known["d_model"], "norm_eps": 1e-5, "tied_head": True},
    supported={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    },
    harmless=frozenset({"attn_pdrop", "embd_pdrop", "n_ctx", "reorder_and_upcast_attn", "resid_pdrop"}),
    architectures={"GPT2LMHeadModel": "gpt2"},
)

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "dream": _DREAM,
    "llada": Family(
        rules=llada_rules(),
        embedding="model.transformer.wte.weight",
        head="model.transformer.ff_out.weight",
        prefix="model.",
        fields={
            "d_model": "d_model",
            "n_layers": "n_layers",
            "n_heads": "n_heads",
            "n_kv_heads": "n_kv_heads",
            "d_ff": "mlp_hidden_size",
            "vocab_size": "embedding_size",
            "max_length": "max_sequence_length",
            "norm_eps": "rms_norm_eps",
            "rope_theta": "rope_theta",
            "tied_head": "weight_tying",
        },
        constants=_ROPE,
        optional={
            "n_kv_heads": _n_heads,
            "d_ff": _llada_d_ff,
            "vocab_size": lambda known, fields: fields.get("vocab_size"),
            "rope_theta": 10000.0,
            "norm_eps": 1e-5,
        },
        supported={
            "block_type": ("llama",),
            "block_group_size": (1,),
            "activation_type": ("silu",),
            "layer_norm_type": ("rms",),
            "layer_norm_with_affine": (True,),
            "bias_for_layer_norm": (False, None),
            "rope": (True,),
            "rope_full_precision": (True,),
            "alibi": (False,),
            "include_bias": (False,),
            "include_qkv_bias": (False,),
            "multi_query_attention": (None,),
            "attention_layer_norm": (False,),
            "scale_logits": (False,),
            "input_emb_norm": (False,),
            "quantization_config": (None,),
        },
        absent={
            "activation_type": "swiglu",
            "attention_dropout": 0.1,
            "block_type": "sequential",
            "embedding_dropout": 0.1,
            "embedding_size": 50304,
            "eos_token_id": 50256,
            "layer_norm_type": "default",
            "mask_token_id": 50256,
            "max_sequence_length": 1024,
            "pad_token_id": 50256,
            "residual_dropout": 0.1,
            "rope": False,
            "weight_tying": True,
        },
        harmless=frozenset(
            "alibi_bias_max attention_layer_norm_with_affine embedding_dropout flash_attention init_cutoff_factor "
            "init_device init_fn init_std mlp_ratio precision residual_dropout vocab_size".split()
        ),
        exported={
            "auto_map": {
                "AutoConfig": "configuration_llada.LLaDAConfig",
                "AutoModel": "modeling_llada.LLaDAModelLM",
                "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
            },
            "attention_dropout": 0.0,
            "embedding_dropout": 0.0,
            "residual_dropout": 0.0,
            "eos_token_id": None,
            "pad_token_id": None,
        },
        code=("configuration_llada.py", "modeling_llada.py"),
        architectures={"LLaDAModelLM": "llada"},
        mdm=True,
        shifted=False,
    ),
    "smdm": Family(
        rules=smdm_rules(),
        embedding="transformer.wte.weight",
        constants={"rope_bf16_tables": True},
        mdm=True,
        shifted=False,
        suppress_mask=True,
        mask_in_head=False,
        ids={"bos": 1, "eos": 2, "pad": 2},
    ),
    # 2410.17891. No config.json has the mask ids: the small model and the 7B reuse a token, the medium appends a row.
    "diffugpt": dataclasses.replace(
        _GPT2,
        rules=gpt2_rules("embed_tokens.weight", "denoise_model."),
        embedding="embed_tokens.weight",
        prefix="",
        marker="denoise_model.",
        architectures={"GPT2LMHeadModel": "gpt2", "DiscreteDiffusionModel": "gpt2"},
        mdm=True,
        mask_id=lambda rows: 50257 if rows > 50257 else 10541,
        suppress_mask=True,
    ),
    "diffullama": dataclasses.replace(
        _LLAMA,
        architectures={"LlamaForCausalLM": "llama", "DiscreteDiffusionModel": "llama"},
        mdm=True,
        mask_id=lambda rows: 811,
        suppress_mask=True,
    ),
}
