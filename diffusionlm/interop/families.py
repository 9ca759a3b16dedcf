"""What is particular to each family of weights: names, layouts and the fields of its config.json, for both directions.

A further family is one entry in `FAMILIES`. Its rules may name parameters that a model does not have (a head where it
is tied, biases): those are left out.
"""

import dataclasses
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from diffusionlm import config_io, presets
from diffusionlm.config import DiffusionConfig, ModelConfig
from diffusionlm.data.chat_templates import Template
from diffusionlm.errors import UserError
from diffusionlm.interop.layouts import Layout

QKV = ("blocks/q", "blocks/k", "blocks/v")
QKV_BIAS = ("blocks/q_bias", "blocks/k_bias", "blocks/v_bias")


class Rule(NamedTuple):
    """One tensor of theirs, one for each layer where its name has {i}, and the parameters of ours that it holds."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout = "transposed"


@dataclass(frozen=True)
class Family:
    """How one family names, lays out and describes its weights.

    Attributes:
      rules: which tensor holds what.
      embedding: the name of the tensor of input rows.
      head: the name of the head, which tied models may have instead of the embedding, or beside it.
      prefix: what names may lack all together.
      ignored: a pattern of tensors that are no parameters.
      marker: what is in the names of this family only.
      fields: field of `ModelConfig` -> field of config.json; empty: there is none, and a preset is found by its shape.
      constants: fields of `ModelConfig` that the family fixes.
      optional: fields of config.json that may be absent, with what that means; a function of the fields of ours so far.
      supported: field of config.json -> values that mean what our network computes; absent means the first.
      architectures: names in config.json.
      model_type: the same.
      mdm: whether it is a masked diffusion model, and not autoregressive.
      shifted: whether position i predicts token i + 1.
      mask_id: where config.json says none; a function of the number of input rows.
      suppress_mask: whether the mask id, if it is in the vocabulary, is never predicted.
      mask_in_head: whether the head has a row for an appended mask token too, as other libraries need.
      ids: special ids where neither the tokenizer nor config.json has them.
    """

    rules: tuple[Rule, ...]
    embedding: str
    head: str = "lm_head.weight"
    prefix: str = ""
    ignored: str = r"(?!)"
    marker: str = ""
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    optional: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    supported: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    architectures: tuple[str, ...] = ()
    model_type: str = ""
    mdm: bool = False
    shifted: bool = True
    mask_id: Any = None
    suppress_mask: bool = False
    mask_in_head: bool = True
    ids: Mapping[str, int] = dataclasses.field(default_factory=dict)


KEY = "diffusionlm"


@dataclass(frozen=True)
class Ours:
    """What the standard fields of config.json do not say of a model that we wrote, kept under `KEY`."""

    family: str
    objective: Literal["mdm", "arm"]
    alignment: Literal["same", "shifted"]
    diffusion: DiffusionConfig
    mask_row: bool
    rope_bf16_tables: bool
    bos_id: int | None
    start_id: int | None  # what a text begins with
    max_length: int  # of texts in training
    template: dict | None = None  # how prompts are written

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> "Ours | None":
        """What a config.json has of it; `UserError` where that is damaged."""
        if KEY not in described:
            return None
        from diffusionlm.diffusion import schedules  # with SciPy: 35 MB that other imports do without

        try:
            found = config_io.from_dict(cls, described[KEY])
            found.diffusion.validate()
            schedules.build(found.diffusion)
            if found.template is not None:
                Template.from_dict(found.template)
        except (UserError, TypeError, AttributeError) as error:
            raise UserError(f"config.json has a damaged {KEY!r}: {error}; export the model again") from error
        if found.family not in FAMILIES:
            raise UserError(f"config.json has {KEY}.family={found.family!r}, and there is {', '.join(FAMILIES)}")
        return found


def _gpt2_rules(embedding: str, body: str) -> tuple[Rule, ...]:
    """GPT-2's Conv1D keeps inputs first, as we do."""
    block = f"{body}h.{{i}}."
    norms = {"ln_1": "blocks/attention_norm", "ln_2": "blocks/mlp_norm"}
    linears = {"attn.c_proj": "blocks/o", "mlp.c_fc": "blocks/up", "mlp.c_proj": "blocks/down"}
    return (
        Rule(embedding, ("embed",), "rows"),
        Rule(f"{body}wpe.weight", ("positions",), "same"),
        *(Rule(f"{block}{name}.weight", (f"{ours}/scale",), "same") for name, ours in norms.items()),
        *(Rule(f"{block}{name}.bias", (f"{ours}/bias",), "same") for name, ours in norms.items()),
        Rule(f"{block}attn.c_attn.weight", QKV, "fused"),
        Rule(f"{block}attn.c_attn.bias", QKV_BIAS, "fused"),
        *(Rule(f"{block}{name}.weight", (ours,), "same") for name, ours in linears.items()),
        *(Rule(f"{block}{name}.bias", (f"{ours}_bias",), "same") for name, ours in linears.items()),
        Rule(f"{body}ln_f.weight", ("final_norm/scale",), "same"),
        Rule(f"{body}ln_f.bias", ("final_norm/bias",), "same"),
        Rule("lm_head.weight", ("head",), "columns"),
    )


def _llama_rules(qkv_bias: bool = False) -> tuple[Rule, ...]:
    block = "model.layers.{i}."
    linears = {
        **{f"self_attn.{name}_proj": f"blocks/{name}" for name in "qkvo"},
        **{f"mlp.{name}_proj": f"blocks/{name}" for name in ("gate", "up", "down")},
    }
    biases = [Rule(f"{block}self_attn.{n}_proj.bias", (f"blocks/{n}_bias",), "same") for n in "qkv"] if qkv_bias else []
    return (
        Rule("model.embed_tokens.weight", ("embed",), "rows"),
        Rule(f"{block}input_layernorm.weight", ("blocks/attention_norm/scale",), "same"),
        *(Rule(f"{block}{name}.weight", (ours,)) for name, ours in linears.items()),
        *biases,
        Rule(f"{block}post_attention_layernorm.weight", ("blocks/mlp_norm/scale",), "same"),
        Rule("model.norm.weight", ("final_norm/scale",), "same"),
        Rule("lm_head.weight", ("head",), "columns"),
    )


def _llada_rules() -> tuple[Rule, ...]:
    block = "model.transformer.blocks.{i}."
    linears = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "attn_out": "o"}
    linears |= {"ff_proj": "gate", "up_proj": "up", "ff_out": "down"}
    return (
        Rule("model.transformer.wte.weight", ("embed",), "rows"),
        Rule(f"{block}attn_norm.weight", ("blocks/attention_norm/scale",), "same"),
        *(Rule(f"{block}{name}.weight", (f"blocks/{ours}",)) for name, ours in linears.items()),
        Rule(f"{block}ff_norm.weight", ("blocks/mlp_norm/scale",), "same"),
        Rule("model.transformer.ln_f.weight", ("final_norm/scale",), "same"),
        Rule("model.transformer.ff_out.weight", ("head",), "columns"),
    )


def _smdm_rules() -> tuple[Rule, ...]:
    block = "transformer.h.{i}."
    linears = {"attn.proj": "o", "mlp.swiglu.w1": "gate", "mlp.swiglu.w2": "up", "mlp.swiglu.w3": "down"}
    return (
        Rule("transformer.wte.weight", ("embed",), "rows"),
        Rule(f"{block}norm_1.weight", ("blocks/attention_norm/scale",), "same"),
        Rule(f"{block}attn.attn.weight", QKV, "interleaved"),
        *(Rule(f"{block}{name}.weight", (f"blocks/{ours}",)) for name, ours in linears.items()),
        Rule(f"{block}norm_2.weight", ("blocks/mlp_norm/scale",), "same"),
        Rule("transformer.ln_f.weight", ("final_norm/scale",), "same"),
        Rule("lm_head.weight", ("head",), "columns"),
    )


def _heads(known: Mapping[str, Any]) -> int:
    return known["n_heads"]


def _head_dim(known: Mapping[str, Any]) -> int:
    return known["d_model"] // known["n_heads"]


_ROPE = {"norm": "rmsnorm", "positions": "rope", "mlp": "swiglu", "linear_bias": False, "qkv_bias": False}

_LLAMA = Family(
    rules=_llama_rules(),
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
        "rope_theta": "rope_theta",
        "tied_head": "tie_word_embeddings",
    },
    constants=_ROPE,
    optional={"n_kv_heads": _heads, "head_dim": _head_dim, "rope_theta": 10000.0, "tied_head": False},
    supported={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None,),
        "sliding_window": (None,),
        "quantization_config": (None,),
    },
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    model_type="llama",
)

_QWEN2 = dataclasses.replace(
    _LLAMA,
    rules=_llama_rules(qkv_bias=True),
    constants=_ROPE | {"qkv_bias": True},
    optional={**_LLAMA.optional},
    supported={
        "hidden_act": ("silu",),
        "rope_scaling": (None,),
        "use_sliding_window": (False,),
        "quantization_config": (None,),
    },
    architectures=("Qwen2ForCausalLM",),
    model_type="qwen2",
)

_GPT2 = Family(
    rules=_gpt2_rules("transformer.wte.weight", "transformer."),
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
    optional={"d_ff": lambda known: 4 * known["d_model"], "norm_eps": 1e-5, "tied_head": True},
    supported={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "quantization_config": (None,),
    },
    architectures=("GPT2LMHeadModel",),
    model_type="gpt2",
)

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "qwen2": _QWEN2,
    "dream": dataclasses.replace(_QWEN2, architectures=("DreamModel",), model_type="Dream", mdm=True),
    "llada": Family(
        rules=_llada_rules(),
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
        optional={"n_kv_heads": _heads, "rope_theta": 10000.0, "norm_eps": 1e-5, "tied_head": False},
        supported={
            "block_type": ("llama",),
            "activation_type": ("silu",),
            "layer_norm_type": ("rms",),
            "rope": (True,),
            "alibi": (False,),
            "include_bias": (False,),
            "include_qkv_bias": (False,),
            "attention_layer_norm": (False,),
            "scale_logits": (False,),
            "input_emb_norm": (False,),
            "quantization_config": (None,),
        },
        architectures=("LLaDAModelLM",),
        model_type="llada",
        mdm=True,
        shifted=False,
    ),
    "smdm": Family(
        rules=_smdm_rules(),
        embedding="transformer.wte.weight",
        constants={"rope_bf16_tables": True},
        mdm=True,
        shifted=False,
        suppress_mask=True,
        mask_in_head=False,
        ids={"bos": 1, "eos": 2, "pad": 2},
    ),
    # 2410.17891. Their mask ids are part of no config.json: the small one and the 7B reuse a token, the medium one has
    # a row of its own.
    "diffugpt": dataclasses.replace(
        _GPT2,
        rules=_gpt2_rules("embed_tokens.weight", "denoise_model."),
        embedding="embed_tokens.weight",
        prefix="",
        marker="denoise_model.",
        architectures=(),
        mdm=True,
        mask_id=lambda rows: 50257 if rows > 50257 else 10541,
        suppress_mask=True,
    ),
    "diffullama": dataclasses.replace(_LLAMA, architectures=(), mdm=True, mask_id=lambda rows: 811, suppress_mask=True),
}


def detect(described: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    """The family of weights with this config.json and these names of tensors.

    Raises:
      UserError: none that is known.
    """
    if ours := Ours.of(described):
        return ours.family
    for name, family in FAMILIES.items():
        if family.marker and any(family.marker in one for one in names):
            return name
    architectures = described.get("architectures") or []
    for name, family in FAMILIES.items():
        if set(architectures) & set(family.architectures):
            return name
    if not architectures:
        for name, family in FAMILIES.items():
            if family.architectures and described.get("model_type") == family.model_type:
                return name
    if described:
        what = ", ".join(architectures) or described.get("model_type") or "none named"
        raise UserError(
            f"config.json says architecture {what}, and this version imports {_known()}; name another family that has "
            f"this layout with --family ({', '.join(FAMILIES)})"
        )
    raise UserError(f"there is no config.json that says what this is; name it with --family ({', '.join(FAMILIES)})")


def _known() -> str:
    return ", ".join(one for family in FAMILIES.values() for one in family.architectures)


def model_config(family: Family, described: Mapping[str, Any]) -> ModelConfig:
    """The network that a config.json describes; its `vocab_size` counts all input rows.

    Raises:
      UserError: a field is missing, or has a value that our network does not compute.
    """
    described = _unified(described)
    for name, allowed in family.supported.items():
        value = described.get(name, allowed[0])
        if value not in allowed:
            raise UserError(
                f"config.json has {name}={value!r}, and this version computes {' or '.join(map(repr, allowed))} only"
            )
    known: dict[str, Any] = {"mask_row": False, "causal": not family.mdm, **family.constants}
    for ours, theirs in family.fields.items():
        value = described.get(theirs)
        if value is None:
            if ours not in family.optional:
                raise UserError(f"config.json lacks {theirs}, our {ours}; restore the file")
            value = family.optional[ours]
            value = value(known) if callable(value) else value
        known[ours] = _checked(ours, theirs, value)
    known.setdefault("n_kv_heads", known["n_heads"])
    known.setdefault("head_dim", _head_dim(known))
    cfg = ModelConfig(**known)
    cfg.validate()
    return cfg


def _checked(ours: str, theirs: str, value: Any) -> Any:
    """A value of config.json, of the type that our field has."""
    kind = typing.get_type_hints(ModelConfig)[ours]
    if kind is float and type(value) in (int, float):
        return float(value)
    if type(value) is kind and not (kind is int and value < 1):
        return value
    wanted = {int: "a whole number of at least 1", float: "a number", bool: "true or false"}[kind]
    raise UserError(f"config.json has {theirs}={value!r}, which must be {wanted}; restore the file")


def _unified(described: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the rotary settings, and a window that no text can reach, told in one way."""
    told = dict(described)
    parameters = told.pop("rope_parameters", None) or {}
    scaling = told.get("rope_scaling") or parameters
    if isinstance(parameters, dict):
        told.setdefault("rope_theta", parameters.get("rope_theta"))
    default = isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type", "default")) == "default"
    told["rope_scaling"] = None if default else scaling
    window, longest = told.get("sliding_window"), told.get("max_position_embeddings")
    if isinstance(window, int) and isinstance(longest, int) and window >= longest:
        told["sliding_window"] = None
    return told


def ladder_config(shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """The network of SMDM's ladder that has the shapes of these tensors.

    Raises:
      UserError: none has.
    """
    layers = len({name.split(".")[2] for name in shapes if re.match(r"transformer\.h\.\d+\.", name)})
    rows, d_model = shapes.get("transformer.wte.weight", (0, 0))
    d_ff = shapes.get("transformer.h.0.mlp.swiglu.w1.weight", (0, 0))[0]
    for name in presets.names():
        cfg = presets.get(name)
        if name.startswith("smdm_") and (cfg.n_layers, cfg.d_model, cfg.d_ff) == (layers, d_model, d_ff):
            cfg = dataclasses.replace(cfg, **FAMILIES["smdm"].constants)
            return cfg if rows == cfg.embedding_rows else presets.arm_twin(cfg)
    raise UserError(
        f"{layers} layers of width {d_model} and MLP width {d_ff} are no size of SMDM's ladder (`diffusionlm.presets`)"
    )


def config_json(family: Family, cfg: ModelConfig, rows: int, ids: Mapping[str, int | None]) -> dict[str, Any]:
    """The config.json of a network in the family's terms, the inverse of `model_config`.

    Args:
      family: of the format.
      cfg: the network.
      rows: input rows that are written.
      ids: bos, eos, pad and mask ids; None: there is none.

    Raises:
      UserError: the family cannot describe this network.
    """
    for name, value in family.constants.items():
        if name != "rope_bf16_tables" and getattr(cfg, name) != value:
            raise UserError(f"this format has {name}={value!r}, and the model {name}={getattr(cfg, name)!r}")
    if cfg.causal and family.mdm:
        raise UserError("this format is of masked diffusion models, and the model is autoregressive")
    if not family.fields:
        return {}
    implied = {"n_kv_heads": cfg.n_heads, "head_dim": cfg.d_model // cfg.n_heads}
    for name, value in implied.items():
        if name not in family.fields and getattr(cfg, name) != value:
            raise UserError(f"this format has no field for {name}={getattr(cfg, name)}, and means {value}")
    values = {ours: rows if ours == "vocab_size" else getattr(cfg, ours) for ours in family.fields}
    described: dict[str, Any] = {"architectures": list(family.architectures[:1]), "model_type": family.model_type}
    described |= {family.fields[ours]: value for ours, value in values.items()}
    described |= {name: allowed[0] for name, allowed in family.supported.items() if allowed[0] is not None}
    if "embedding_size" in described:  # LLaDA's
        described["vocab_size"] = rows
    return described | {f"{name}_token_id": i for name, i in ids.items() if i is not None}
