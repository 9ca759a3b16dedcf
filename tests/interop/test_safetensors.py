"""The safetensors format, against the library."""

import json

import ml_dtypes
import safetensors.numpy
from support.foreign_weights import random_tensors, tensor_shapes

from diffusionlm.interop import safetensors as safetensors_format


def test_the_safetensors_library_reads_our_shards(tmp_path):
    tensors = random_tensors("llama", ml_dtypes.bfloat16)
    specs = {name: safetensors_format.Spec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    files = safetensors_format.write(tmp_path, specs, tensors.__getitem__, shard_bytes=4000)
    index = json.loads((tmp_path / files[-1]).read_text())
    assert len(files) > 3 and index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    read = {}
    for file in files[:-1]:
        part = safetensors.numpy.load_file(tmp_path / file)
        assert sum(tensor.nbytes for tensor in part.values()) <= 4000 or len(part) == 1
        assert all(index["weight_map"][name] == file for name in part)
        read |= part
    assert all(read[name].tobytes() == tensor.tobytes() for name, tensor in tensors.items())
    assert {name: tensor.shape for name, tensor in safetensors_format.find(tmp_path).items()} == tensor_shapes("llama")
