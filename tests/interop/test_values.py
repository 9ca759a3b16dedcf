"""The values of imported tensors: finite, and those of buffers that hold no parameters do not matter."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from support.foreign_weights import CONFIGS, L, bit_equal, flat_params, random_tensors, write_source

import diffusionlm as dlm
from diffusionlm.errors import UserError
from diffusionlm.interop import importing

DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


# Each layout and each dtype once, and then the others.
QUICK = dict(zip(("gpt2", "llama", "llada"), DTYPES, strict=True))


@pytest.mark.parametrize(
    "family, dtype",
    [
        pytest.param(family, dtype, marks=[] if QUICK[family] is dtype else pytest.mark.slow)
        for family in QUICK
        for dtype in DTYPES
    ],
)
def test_values_that_are_not_finite_are_refused_with_their_tensor_and_count(family, dtype, tmp_path):
    for i, (name, original) in enumerate(random_tensors(family, dtype).items()):
        if i % 5:  # every fifth tensor has each layout and each end of a model among them
            continue
        tensors = random_tensors(family, dtype)
        tensors[name] = original.copy()
        tensors[name].reshape(-1)[[0, 3, -1]] = np.nan, np.inf, -np.inf
        source = write_source(tmp_path / "source", CONFIGS[family], tensors)
        start = re.escape(f"{source}: {name}")
        with pytest.raises(UserError, match=rf"^{start} has 3 of {original.size:,} values that are NaN or inf"):
            dlm.import_weights(source, tmp_path / "model")
        assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_exactly_the_values_that_are_not_finite_are_counted(dtype):
    """All bit patterns of 16-bit floats are tried, and hypothesis' choice of those of 32 bits, in chunks of 16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importing, "FINITE_CHUNK", 16)
        if np.dtype(dtype).itemsize == 2:
            for start in range(0, 1 << 16, 37):
                _require_counted(np.arange(start, min(start + 37, 1 << 16), dtype=np.uint16).view(dtype))
        else:
            given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))(
                lambda bits: _require_counted(np.array(bits, np.uint32).view(dtype))
            )()


def _require_counted(tensor):
    with np.errstate(invalid="ignore"):  # of signalling NaN
        count = int((~np.isfinite(tensor)).sum())
    try:
        importing._require_finite("x", tensor)
        assert count == 0
    except UserError as error:
        assert count and str(error).startswith(f"x has {count:,} of {tensor.size:,} values")


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.float32])
def test_causal_masks_of_gpt2_are_no_parameters(dtype, imported, tmp_path):
    """Files of several versions of transformers hold them, as float, byte or bool."""
    tensors = random_tensors("gpt2")
    for i in range(L):
        tensors[f"transformer.h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 32, 32), dtype))
        tensors[f"transformer.h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    dlm.import_weights(write_source(tmp_path / "source", CONFIGS["gpt2"], tensors), tmp_path / "model")
    assert bit_equal(flat_params(imported("gpt2")), flat_params(tmp_path / "model"))


@pytest.mark.parametrize("dtype", [np.bool_, np.int64, np.float64])
def test_a_parameter_in_a_dtype_that_we_do_not_read_is_refused(dtype, tmp_path):
    tensors = random_tensors("gpt2")
    tensors["transformer.ln_f.bias"] = tensors["transformer.ln_f.bias"].astype(dtype)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIGS["gpt2"]))
    safetensors.numpy.save_file(tensors, source / "model.safetensors")
    with pytest.raises(UserError, match="has 'transformer.ln_f.bias' in .*, and this version reads F32, F16, BF16"):
        dlm.import_weights(source, tmp_path / "model")
