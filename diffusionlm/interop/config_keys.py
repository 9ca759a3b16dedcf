"""Decide whether a foreign config.json describes a family's network: its architecture, and every key that it has."""

from collections.abc import Iterable, Mapping
from typing import Any

from diffusionlm import untrusted
from diffusionlm.errors import UserError
from diffusionlm.interop.families import FAMILIES, Family

NATIVE_KEY = "diffusionlm"

# Keys that change nothing that any of our families computes: names, files, versions, special ids and labels, and
# settings of training, of sampling, of outputs and of heads that are not language models.
HARMLESS = frozenset(
    f"""
    architectures model_type {NATIVE_KEY} auto_map _name_or_path name_or_path _commit_hash tokenizer_class
    transformers_version transformers.js_config torch_dtype dtype use_bfloat16 unsloth_version unsloth_fixed
    bos_token_id eos_token_id pad_token_id mask_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id
    initializer_range attention_dropout hidden_dropout classifier_dropout gradient_checkpointing pretraining_tp
    use_cache torchscript tf_legacy_loss chunk_size_feed_forward output_attentions output_hidden_states output_scores
    return_dict return_dict_in_generate use_return_dict _attn_implementation attn_implementation
    _attn_implementation_autoset _attn_implementation_internal _flash_attn_2_enabled is_decoder finetuning_task
    task_specific_params problem_type num_labels id2label label2id prefix model_max_length
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    max_new_tokens max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)
# Keys that some repositories write although their network does without; any other value is another network.
SWITCHED_OFF: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "is_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
}


def detect_family(fields: Mapping[str, Any], tensor_names: Iterable[str]) -> str:
    """Return the name of the family that a config.json and the names of the tensors belong to.

    Raises:
      UserError: no known family matches.
    """
    tensor_names = list(tensor_names)
    for name, family in FAMILIES.items():
        if family.marker and any(family.marker in tensor for tensor in tensor_names):
            return name
    for name, family in FAMILIES.items():
        if family.architectures and _mismatch(family, fields) is None:
            return name
    if not fields:
        names = ", ".join(FAMILIES)
        raise UserError(f"there is no config.json that names the architecture; name the family with --family ({names})")
    known = ", ".join(dict.fromkeys(name for family in FAMILIES.values() for name in family.architectures))
    raise UserError(f"config.json has {_described(fields)}, and this version imports {known} only")


def require_architecture(name: str, fields: Mapping[str, Any]) -> None:
    """Refuse the config.json of another architecture than those of the family `name`.

    Raises:
      UserError: `architectures` or `model_type` is not the family's, or they contradict each other.
    """
    named = any(fields.get(key) is not None for key in ("architectures", "model_type"))
    if named and (mismatch := _mismatch(FAMILIES[name], fields)):
        others = [other for other, family in FAMILIES.items() if family.architectures and not _mismatch(family, fields)]
        advice = f"; import it with --family {others[0]}" if others else ""
        raise UserError(f"config.json has {_described(fields)}, and the family {name} {mismatch}{advice}")


def _described(fields: Mapping[str, Any]) -> str:
    present = {name: fields[name] for name in ("architectures", "model_type") if name in fields}
    if not present:
        return "neither architectures nor model_type"
    return " and ".join(f"{name}={untrusted.printable(repr(value))}" for name, value in present.items())


def _mismatch(family: Family, fields: Mapping[str, Any]) -> str | None:
    """Return what a family has instead of the architecture of a config.json, or None if it is the family's."""
    if not family.architectures:
        return "has no config.json"
    architectures, model_type = fields.get("architectures"), fields.get("model_type")
    if architectures is None or architectures == []:
        types = sorted(set(family.architectures.values()))
        return None if model_type in types else f"has model_type={' or '.join(types)}"
    known = isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    if not known or not set(architectures) <= set(family.architectures):
        return f"has architectures={' or '.join(family.architectures)}"
    types = sorted({family.architectures[name] for name in architectures})
    if model_type is not None and [model_type] != types:
        return f"has model_type={' or '.join(types)} with it; the two contradict each other"
    return None


def require_known(family: Family, fields: Mapping[str, Any]) -> None:
    """Refuse keys of a config.json that could change what the network computes, unless we know their meaning.

    Raises:
      UserError: there are such keys, or a feature that our network lacks is switched on.
    """
    translated = frozenset().union(*(translation.keys for translation in family.translations))
    read = {*family.fields.values(), *family.supported, *family.harmless, *translated}
    read |= {*HARMLESS, *SWITCHED_OFF, "layer_types"}
    for name, allowed in SWITCHED_OFF.items():
        if name in fields and name not in family.supported and fields[name] not in allowed:
            shown = untrusted.printable(repr(fields[name]))
            raise UserError(f"config.json has {name}={shown}, and this version computes {allowed[0]!r} only")
    layers = fields.get("layer_types")
    unread = "layer_types" not in translated and layers is not None
    if unread and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
        raise UserError(
            f"config.json has layer_types={untrusted.printable(repr(layers))[:80]}, and this version computes "
            "'full_attention' in every layer only"
        )
    if unknown := sorted(name for name in fields if name not in read):
        shown = ", ".join(f"{name}={fields[name]!r:.40}" for name in unknown[:3])
        more = f" and {len(unknown) - 3} more keys" if len(unknown) > 3 else ""
        raise UserError(
            f"config.json has {untrusted.printable(shown)}{more}, which this version does not know and which could "
            "change what the network computes; remove what its own code does not read"
        )
