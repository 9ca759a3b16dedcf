"""The message of a tokenizer.model, as far as it is read here; what is not named here is kept as it is.

The module that comes with SentencePiece works only with releases of protobuf that are no older than those it was made
with, which Apache Beam's may be. The numbers are those of its sentencepiece_model.proto.
"""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

CONTROL, USER_DEFINED = 3, 4  # types of pieces
BPE = 2  # the type of models that merge pairs

_FIELD = descriptor_pb2.FieldDescriptorProto
_MESSAGES: dict[str, list[dict[str, Any]]] = {
    "Piece": [
        {"name": "piece", "number": 1, "type": _FIELD.TYPE_STRING},
        {"name": "type", "number": 3, "type": _FIELD.TYPE_INT32, "default_value": "1"},  # an enum; 1: normal
    ],
    "Trainer": [
        {"name": "model_type", "number": 3, "type": _FIELD.TYPE_INT32, "default_value": "1"},  # an enum; 1: unigram
        {"name": "byte_fallback", "number": 35, "type": _FIELD.TYPE_BOOL},
    ],
    "Normalizer": [
        {"name": "precompiled_charsmap", "number": 2, "type": _FIELD.TYPE_BYTES},
        {"name": "add_dummy_prefix", "number": 3, "type": _FIELD.TYPE_BOOL, "default_value": "true"},
        {"name": "remove_extra_whitespaces", "number": 4, "type": _FIELD.TYPE_BOOL, "default_value": "true"},
    ],
    "Model": [
        {"name": "pieces", "number": 1, "type_name": "Piece", "label": _FIELD.LABEL_REPEATED},
        {"name": "trainer_spec", "number": 2, "type_name": "Trainer"},
        {"name": "normalizer_spec", "number": 3, "type_name": "Normalizer"},
    ],
}


def _model_class() -> Any:
    package = "diffusionlm.sentencepiece"
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto2")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for values in fields:
            field = message.field.add(**{"label": _FIELD.LABEL_OPTIONAL} | values)
            if field.type_name:
                field.type, field.type_name = _FIELD.TYPE_MESSAGE, f".{package}.{field.type_name}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.Model"))


Model: Any = _model_class()
