"""Headers of safetensors files: we refuse every one that the format's library refuses, and read the others alike."""

import json
import math
import struct

import hypothesis
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import strategies as st

from diffusionlm.errors import UserError
from diffusionlm.interop import safetensors_header
from diffusionlm.interop.safetensors import find

hypothesis.settings.register_profile("formats", deadline=None, derandomize=True)
SETTINGS = hypothesis.settings(hypothesis.settings.get_profile("formats"), max_examples=400)

SIZES = st.one_of(st.integers(0, 8), st.sampled_from([-1, 2**31, 2**32, 2**40, 2**63, 2**64]))
EMPTY = st.permutations([0, 2**32, 2**33])  # of no element, and too large in some orders
ODD = st.sampled_from([None, True, 1.0, "4", "", [], {}, "\ud800", "a\x1b[2J", 2**70, "F32", "I4", "f32"])


@st.composite
def headers(draw):
    """A valid header and its body, or one with a change in one or two places."""
    dtypes = st.sampled_from(sorted(safetensors_header.BITS))
    end, header = 0, {}
    for name in draw(
        st.lists(st.text(max_size=3).filter(lambda text: text != "__metadata__"), unique=True, max_size=4)
    ):
        end = max(0, end + draw(st.sampled_from([0] * 12 + [4, -4, 1])))  # a gap, or an overlap
        dtype, shape = draw(dtypes), draw(st.one_of(st.lists(st.integers(0, 4), max_size=3), EMPTY))
        if (bits := math.prod(shape) * safetensors_header.BITS[dtype]) % 8:
            shape, bits = [*shape, 4], bits * 4
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + bits // 8]}
        end += bits // 8
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.one_of(st.none(), st.dictionaries(st.text(max_size=3), st.text(max_size=3))))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        change(draw, header)
    items = list(header.items())
    if draw(st.booleans()):
        items = draw(st.permutations(items))
    body = max(0, end + draw(st.sampled_from([0] * 6 + [1, -1, 4])))
    return json.dumps(dict(items)).encode(), b"\0" * body


def change(draw, header):
    if not header:
        return
    name = draw(st.sampled_from(sorted(header)))
    entry = header[name]
    if not isinstance(entry, dict) or name == "__metadata__":
        header[name] = draw(ODD)
        return
    kind = draw(st.sampled_from(["dtype", "shape", "data_offsets", "missing", "extra", "shift", "entry"]))
    if kind == "missing":
        entry.pop(draw(st.sampled_from(sorted(entry))), None)
    elif kind == "extra":
        entry["strides"] = [1]
    elif kind == "entry":
        header[name] = draw(ODD)
    elif kind == "shift" and isinstance(entry.get("data_offsets"), list):
        entry["data_offsets"] = [offset + 4 for offset in entry["data_offsets"] if isinstance(offset, int)]
    elif kind == "dtype":
        entry["dtype"] = draw(st.one_of(ODD, st.sampled_from(sorted(safetensors_header.BITS))))
    else:
        key = "shape" if kind == "shape" else "data_offsets"
        entry[key] = draw(st.one_of(ODD, st.lists(SIZES, max_size=3)))


def ours(header, body):
    try:
        return safetensors_header.parse(header, len(body), "model.safetensors")
    except UserError as error:
        assert "\n" not in str(error) and "\x1b" not in str(error) and len(str(error)) < 500, error
        return None


def library(header, body):
    try:
        return safetensors.deserialize(struct.pack("<Q", len(header)) + header + body)
    except (safetensors.SafetensorError, UnicodeError):  # a lone surrogate
        return None


def assert_no_more_is_read_than_the_library_reads(header, body):
    read, expected = ours(header, body), library(header, body)
    if read is None:
        return expected
    assert expected is not None, "the library refuses it"
    assert {
        name: (entry.dtype, list(entry.shape), entry.data_offsets[1] - entry.data_offsets[0])
        for name, entry in read.items()
    } == {name: (info["dtype"], list(info["shape"]), len(info["data"])) for name, info in expected}
    return None


@pytest.mark.slow
@SETTINGS
@hypothesis.given(headers())
def test_what_the_library_refuses_we_refuse(case):
    header, body = case
    refused_by_us_alone = assert_no_more_is_read_than_the_library_reads(header, body)
    if refused_by_us_alone is not None:  # the library ignores a field that it does not know
        assert b"strides" in header or b"9223372036854775808" in header


@pytest.mark.slow
@SETTINGS
@hypothesis.given(headers(), st.data())
def test_bytes_that_changed_are_refused_where_the_library_refuses_them(case, data):
    header, body = case
    position = data.draw(st.integers(0, len(header) - 1))
    new = data.draw(st.binary(max_size=2))
    assert_no_more_is_read_than_the_library_reads(header[:position] + new + header[position + 1 :], body)


F32 = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
AFTER = F32.replace("[0,4]", "[4,8]")


@pytest.mark.parametrize(
    "header, body, reason",
    {
        "a tensor twice": (f'{{"a":{F32},"a":{AFTER}}}', 8, "the field 'a' comes twice"),
        "overlap": (f'{{"a":{F32},"b":{F32}}}', 4, "'b' begins at 0 and not at 4, which overlaps"),
        "off by four bytes": (f'{{"a":{AFTER}}}', 8, "'a' begins at 4 and not at 0, which leaves a gap"),
        "gap": (f'{{"a":{F32},"b":{F32.replace("[0,4]", "[8,12]")}}}', 12, "'b' begins at 8 and not at 4"),
        "trailing bytes": (f'{{"a":{F32}}}', 5, "1 bytes after its last tensor"),
        "cut short": (f'{{"a":{F32}}}', 3, "is cut short"),
        "unknown dtype": (f'{{"a":{F32.replace("F32", "F33")}}}', 4, "'a' in 'F33', no dtype of the format"),
        "other size": (f'{{"a":{F32.replace("[1]", "[2]")}}}', 4, "takes 8 bytes, and its offsets 0 to 4 span 4"),
        "half a byte": ('{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,0]}}', 0, "takes 0.5 bytes"),
        "overflow": ('{"a":{"dtype":"F32","shape":[4294967296,4294967296,0],"data_offsets":[0,0]}}', 0, "too large"),
        "negative": (f'{{"a":{F32.replace("[0,4]", "[-4,0]")}}}', 4, "data_offsets[0]=-4"),
        "a fraction": (f'{{"a":{F32.replace("[1]", "[1.0]")}}}', 4, "shape[0]=1.0"),
        "extra field": (f'{{"a":{F32[:-1]},"strides":[1]}}}}', 4, "unknown field `strides`"),
        "missing field": ('{"a":{"dtype":"F32","shape":[1]}}', 4, "missing required field `data_offsets`"),
        "metadata of numbers": (f'{{"__metadata__":{{"a":1}},"a":{F32}}}', 4, "__metadata__"),
        "leading space": (f' {{"a":{F32}}}', 4, "does not begin with '{'"),
        "a list": ("[]", 0, "does not begin with '{'"),
        "cut JSON": ('{"a":', 0, "damaged"),
        "escape sequences": ('{"a\\u001b[2J":{}}', 0, "a\\x1b[2J"),
    }.values(),
)
def test_a_damaged_header_is_refused_with_its_reason(header, body, reason):
    with pytest.raises(UserError) as caught:
        safetensors_header.parse(header.encode(), body, "model.safetensors")
    message = str(caught.value)
    assert reason in message and message.startswith("model.safetensors") and "\n" not in message


@pytest.mark.parametrize("length", [100, 10**8 + 1, 2**63, 2**64 - 1])
def test_a_length_beyond_the_file_or_the_limit_allocates_nothing(tmp_path, length):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(UserError, match="is not a safetensors file, or is cut short"):
        find(file)


def test_a_header_of_more_than_the_format_s_limit_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as sparse:
        sparse.write(struct.pack("<Q", safetensors_header.MAX_BYTES + 1))
        sparse.truncate(safetensors_header.MAX_BYTES + 100)
    with pytest.raises(UserError, match="is not a safetensors file"):
        find(file)


def test_tensors_of_every_dtype_are_listed_and_those_we_compute_with_are_read(tmp_path):
    """A causal mask of booleans, which old GPT-2 files hold, is no reason to refuse the weights beside it."""
    tensors = {"mask": np.tril(np.ones((4, 4), bool)), "weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    found = find(tmp_path)
    assert found["mask"].shape == (4, 4) and np.array_equal(found["weight"].read(), tensors["weight"])
    with pytest.raises(UserError, match="has 'mask' in BOOL, and this version reads F32, F16, BF16"):
        found["mask"].read()
