"""Importing and exporting together: bit for bit, through the verbs, and in little memory."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from support.foreign_weights import (
    V,
    bit_equal,
    flat_params,
    import_options,
    make_source,
    random_tensors,
    tensor_shapes,
)

import diffusionlm as dlm
from diffusionlm import config_io
from diffusionlm.checkpoint import store as checkpoint
from diffusionlm.config import ModelConfig
from diffusionlm.interop.families import FAMILIES

# Those whose layout shares the most of its code with another one's.
REPEATED = ("llama", "mistral", "smdm", "qwen2", "qwen3", "dream", "diffugpt", "diffullama")


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (np.float32, np.float16))]
)
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name in REPEATED else name for name in FAMILIES]
)
def test_round_trips_are_exact(family, dtype, imported, tmp_path):
    first = imported(family, dtype)
    dlm.export_weights(first, tmp_path / "out", family)
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    original = random_tensors(family, dtype)
    assert set(written) == set(original)
    for name, tensor in original.items():
        assert written[name].dtype == dtype and written[name].tobytes() == tensor.tobytes(), name
    again = tmp_path / "out" / "model.safetensors" if family == "smdm" else tmp_path / "out"
    dlm.import_weights(again, tmp_path / "two", **import_options(family))
    params = flat_params(first)
    assert bit_equal(params, flat_params(tmp_path / "two"))
    assert all(tensor.dtype == dtype for tensor in params.values())
    sidecars = [dataclasses.replace(checkpoint.load_sidecar(path), source={}) for path in (first, tmp_path / "two")]
    assert sidecars[0] == sidecars[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "alignment", "changes"),
    [
        ("llama", "same", {}),
        ("llama", "shifted", {}),
        ("diffullama", "shifted", {}),
        ("llada", "same", {"rope_bf16_tables": True}),
        ("llama", "same", {"causal": True, "mask_row": False}),
    ],
)
def test_a_native_model_survives_the_round_trip(format, alignment, changes, native, tmp_path):
    """So does what config.json has no field for: the start of texts and prompts, alignment, schedule, mask row."""
    path = native(alignment, **changes)
    cfg = config_io.from_dict(ModelConfig, checkpoint.load_sidecar(path).model)
    dlm.export_weights(path, tmp_path / "out", format)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 2  # for other libraries
    dlm.import_weights(tmp_path / "out", tmp_path / "again")
    first, second = (checkpoint.load_sidecar(directory) for directory in (path, tmp_path / "again"))
    assert dataclasses.replace(first, source={}, pad_id=2, model={}) == dataclasses.replace(second, source={}, model={})
    assert first.model | {"head_chunk": 0} == second.model | {"head_chunk": 0}
    original, again = flat_params(path), flat_params(tmp_path / "again")
    for params in (original, again):  # rows that pad the vocabulary mean nothing
        params["embed"], params["head"] = params["embed"][: cfg.embedding_rows], params["head"][:, :V]
    assert bit_equal(original, again)


def test_an_imported_model_samples_and_is_scored(data_dir, tmp_path, capsys):
    """The figure is that of an independent NumPy forward pass; the wrong rotary layout gives 5.117."""
    from diffusionlm.cli.main import main

    source = Path(data_dir) / "weights" / "tinystories-656k"
    assert main(["import", str(source), "--output", str(tmp_path / "model")]) == 0
    assert "llama, 656,000 parameters, autoregressive, its tokenizer" in capsys.readouterr().out
    data = str(Path(data_dir) / "tinystories" / "valid.jsonl")
    assert main(["evaluate", str(tmp_path / "model"), "perplexity", "--data", data, "--limit", "15", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert abs(report["metrics"]["nats_per_token"]["value"] - 2.999) < 1e-3
    assert main(["export", str(tmp_path / "model"), "--format", "llama", "--output", str(tmp_path / "out")]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    text = dlm.load(tmp_path / "model").generate("Once upon a time", length=40, temperature=0.5)[0].text
    assert len(text.split()) > 15


def test_the_verbs_print_their_result_or_one_line_of_error(tmp_path, capsys):
    from diffusionlm.cli.main import main

    source = make_source("dream", tmp_path / "source")
    args = ["import", str(source), "--output", str(tmp_path / "model"), "--suppress_mask", "yes"]
    assert main(args) == 0
    count = sum(math.prod(shape) for shape in tensor_shapes("dream").values())
    assert f"dream, {count:,} parameters, masked diffusion, mask id 37, no tokenizer" in capsys.readouterr().out
    assert checkpoint.load_sidecar(tmp_path / "model").suppressed_ids == (37,)
    args = ["export", str(tmp_path / "model"), "--format", "qwen2", "--output", str(tmp_path / "out")]
    assert main(args) == 0
    assert "note: the model attends in both directions" in capsys.readouterr().out
    for mistake in (args, ["import", str(source)], ["import", "nowhere", "--output", "x"], [*args[:3], "x", *args[4:]]):
        assert main(mistake) == 2
        error = capsys.readouterr().err
        assert error.startswith("diffusionlm: error: ") and error.count("\n") == 1


@pytest.mark.slow
def test_little_more_than_the_model_is_in_memory(tmp_path):
    """Memory grows by at most 1.3 times a checkpoint of 1 GB."""
    script = Path(__file__).parents[2] / "experiments/benchmarks/interop_memory.py"
    ran = subprocess.run([sys.executable, script, "1000", tmp_path], capture_output=True, text=True, check=True)
    peaks = re.findall(r"(\w+): (\d+) MB .* peak (\d+) MB before, (\d+) after", ran.stdout)
    assert [name for name, *_ in peaks] == ["import_source", "export_model"]
    for _, size, before, after in peaks:
        assert int(after) - int(before) < 1.3 * int(size)
