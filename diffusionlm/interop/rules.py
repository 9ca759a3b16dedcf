"""The tensors of each family of weights, and the parameters that they hold.

Rules may name parameters that a model lacks (the head of a tied model, biases); those are skipped. "Tensor" always
means one of the foreign format, "parameter" one of ours.
"""

from typing import NamedTuple

from diffusionlm.interop.layouts import Layout

QKV = ("blocks/q", "blocks/k", "blocks/v")
QKV_BIAS = ("blocks/q_bias", "blocks/k_bias", "blocks/v_bias")


class Rule(NamedTuple):
    """A tensor of the format and the parameters that it holds.

    Attributes:
      tensor: the tensor's name; with {i} in it, there is one for each layer.
      parameters: the names of the parameters.
      layout: the arrangement of the parameters in the tensor.
    """

    tensor: str
    parameters: tuple[str, ...]
    layout: Layout = "transposed"


def gpt2_rules(embedding: str, body: str) -> tuple[Rule, ...]:
    """Return the rules of GPT-2, whose Conv1D weights are (inputs, outputs), as ours are."""
    block = f"{body}h.{{i}}."
    norms = {"ln_1": "blocks/attention_norm", "ln_2": "blocks/mlp_norm"}
    linears = {"attn.c_proj": "blocks/o", "mlp.c_fc": "blocks/up", "mlp.c_proj": "blocks/down"}
    return (
        Rule(embedding, ("embed",), "rows"),
        Rule(f"{body}wpe.weight", ("positions",), "same"),
        *(Rule(f"{block}{name}.weight", (f"{parameter}/scale",), "same") for name, parameter in norms.items()),
        *(Rule(f"{block}{name}.bias", (f"{parameter}/bias",), "same") for name, parameter in norms.items()),
        Rule(f"{block}attn.c_attn.weight", QKV, "fused"),
        Rule(f"{block}attn.c_attn.bias", QKV_BIAS, "fused"),
        *(Rule(f"{block}{name}.weight", (parameter,), "same") for name, parameter in linears.items()),
        *(Rule(f"{block}{name}.bias", (f"{parameter}_bias",), "same") for name, parameter in linears.items()),
        Rule(f"{body}ln_f.weight", ("final_norm/scale",), "same"),
        Rule(f"{body}ln_f.bias", ("final_norm/bias",), "same"),
        Rule("lm_head.weight", ("head",), "columns"),
    )


def llama_rules(qkv_bias: bool = False, qk_norm: bool = False) -> tuple[Rule, ...]:
    """Return the rules of LLaMA and its kin: Qwen2 has biases, Qwen3 norms of queries and keys."""
    block = "model.layers.{i}."
    linears = {
        **{f"self_attn.{name}_proj": f"blocks/{name}" for name in "qkvo"},
        **{f"mlp.{name}_proj": f"blocks/{name}" for name in ("gate", "up", "down")},
    }
    biases = [Rule(f"{block}self_attn.{n}_proj.bias", (f"blocks/{n}_bias",), "same") for n in "qkv"] if qkv_bias else []
    norms = [Rule(f"{block}self_attn.{n}_norm.weight", (f"blocks/{n}_norm/scale",), "same") for n in "qk" if qk_norm]
    return (
        Rule("model.embed_tokens.weight", ("embed",), "rows"),
        Rule(f"{block}input_layernorm.weight", ("blocks/attention_norm/scale",), "same"),
        *(Rule(f"{block}{name}.weight", (parameter,)) for name, parameter in linears.items()),
        *biases,
        *norms,
        Rule(f"{block}post_attention_layernorm.weight", ("blocks/mlp_norm/scale",), "same"),
        Rule("model.norm.weight", ("final_norm/scale",), "same"),
        Rule("lm_head.weight", ("head",), "columns"),
    )


def llada_rules() -> tuple[Rule, ...]:
    """Return the rules of LLaDA."""
    block = "model.transformer.blocks.{i}."
    linears = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "attn_out": "o"}
    linears |= {"ff_proj": "gate", "up_proj": "up", "ff_out": "down"}
    return (
        Rule("model.transformer.wte.weight", ("embed",), "rows"),
        Rule(f"{block}attn_norm.weight", ("blocks/attention_norm/scale",), "same"),
        *(Rule(f"{block}{name}.weight", (f"blocks/{parameter}",)) for name, parameter in linears.items()),
        Rule(f"{block}ff_norm.weight", ("blocks/mlp_norm/scale",), "same"),
        Rule("model.transformer.ln_f.weight", ("final_norm/scale",), "same"),
        Rule("model.transformer.ff_out.weight", ("head",), "columns"),
    )


def smdm_rules() -> tuple[Rule, ...]:
    """Return the rules of SMDM (lit-gpt)."""
    block = "transformer.h.{i}."
    linears = {"attn.proj": "o", "mlp.swiglu.w1": "gate", "mlp.swiglu.w2": "up", "mlp.swiglu.w3": "down"}
    return (
        Rule("transformer.wte.weight", ("embed",), "rows"),
        Rule(f"{block}norm_1.weight", ("blocks/attention_norm/scale",), "same"),
        Rule(f"{block}attn.attn.weight", QKV, "interleaved"),
        *(Rule(f"{block}{name}.weight", (f"blocks/{parameter}",)) for name, parameter in linears.items()),
        Rule(f"{block}norm_2.weight", ("blocks/mlp_norm/scale",), "same"),
        Rule("transformer.ln_f.weight", ("final_norm/scale",), "same"),
        Rule("lm_head.weight", ("head",), "columns"),
    )
