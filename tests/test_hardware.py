"""Names of TPU slices: chips, shapes, mistakes; peaks of devices."""

import math

import pytest

from diffusionlm import hardware
from diffusionlm.errors import UserError

# From cloud.google.com/tpu/docs/{v4,v5p,v5e,v6e,tpu7x}: name, chips, shape.
DOCUMENTED = [
    ("v4-8", 4, (2, 2, 1)),
    ("v4-32", 16, (2, 2, 4)),
    ("v4-128", 64, (4, 4, 4)),
    ("v4-512", 256, (4, 8, 8)),
    ("v4-4096", 2048, (8, 16, 16)),
    ("v5p-8", 4, (2, 2, 1)),
    ("v5p-16", 8, (2, 2, 2)),
    ("v5p-64", 32, (2, 4, 4)),
    ("v5p-128", 64, (4, 4, 4)),
    ("v5p-256", 128, (4, 4, 8)),
    ("v5p-512", 256, (4, 8, 8)),
    ("v5p-1024", 512, (8, 8, 8)),
    ("v5p-2048", 1024, (8, 8, 16)),
    ("v5p-4096", 2048, (8, 16, 16)),
    ("v5p-8192", 4096, (16, 16, 16)),
    ("v5p-12288", 6144, (16, 16, 24)),
    ("v5litepod-16", 16, (4, 4)),
    ("v5e-1", 1, (1, 1)),
    ("v5e-8", 8, (2, 4)),
    ("v5e-256", 256, (16, 16)),
    ("v6e-4", 4, (2, 2)),
    ("v6e-128", 128, (8, 16)),
    ("tpu7x-8", 4, (2, 2, 1)),
    ("tpu7x-128", 64, (4, 4, 4)),
    ("tpu7x-18432", 9216, (16, 24, 24)),
]


@pytest.mark.parametrize("name, chips, shape", DOCUMENTED)
def test_documented_names(name, chips, shape):
    topology = hardware.parse(name)
    assert topology.chips == math.prod(shape) == chips and topology.shape == shape
    assert hardware.parse(name.upper()) == topology
    assert topology.devices == (2 * chips if name.startswith("tpu7x") else chips)


def test_names_of_libtpu_and_of_the_cloud():
    assert hardware.parse("v5p-128").physical == "v5p:4x4x4"
    assert hardware.parse("v5litepod-8").name == "v5e-8" and hardware.parse("v5litepod-8").physical == "v5e:2x4"
    assert hardware.parse("v5e-256", 4).chips == 1024


@pytest.mark.parametrize("chip", hardware.CHIPS.values(), ids=lambda chip: chip.name)
def test_every_size_is_its_shape(chip):
    offered = hardware.shapes(chip)
    assert list(offered) == sorted(offered)
    for size, shape in offered.items():
        assert size == chip.cores_counted * math.prod(shape) and len(shape) == chip.dimensions
        assert list(shape) == sorted(shape) or max(shape) <= 2
        assert math.prod(shape) <= chip.most_chips
        whole_cubes = all(side % 4 == 0 for side in shape)
        assert chip.dimensions == 2 or whole_cubes or math.prod(shape) < 64


def test_rings():
    assert all(hardware.parse("v5p-128").wraps(axis) for axis in range(3))
    assert not hardware.parse("v5p-64").wraps(2)  # below a cube nothing wraps around
    v5e_128 = hardware.parse("v5e-128")  # 8x16
    assert not v5e_128.wraps(0) and v5e_128.wraps(1)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("v5p-100", ["v5p-64", "v5p-128", "TensorCores"]),
        ("v5e-7", ["v5e-4", "v5e-8", "chips"]),
        ("v5e-512", ["v5e-256"]),
        ("v9-8", ["v4, v5e, v5p, v6e, tpu7x", "v5p-128"]),
        ("v5p", ["v5p-128"]),
        ("", ["v5p-128"]),
    ],
)
def test_the_refusal_of_an_unknown_name_lists_the_nearest(name, expected):
    with pytest.raises(UserError) as error:
        hardware.parse(name)
    message = str(error.value)
    assert repr(name) in message and "\n" not in message
    assert all(part in message for part in expected), message


def test_at_least_one_slice():
    with pytest.raises(UserError, match="slices=0"):
        hardware.parse("v5e-8", 0)


def test_larger_slices():
    assert hardware.larger(hardware.parse("v5p-128", 2)) == hardware.parse("v5p-256", 2)
    assert hardware.larger(hardware.parse("v5e-1")).name == "v5e-4"
    assert hardware.larger(hardware.parse("v5e-256")) is None


def test_peak_flops_come_from_the_data_sheet():
    assert hardware.peak_flops("TPU v5 lite") == hardware.CHIPS["v5e"].peak_flops == 197e12
    assert hardware.peak_flops("TPU7x") == 2307e12 / 2


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("Tesla T4", 65e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H1000", None),
        ("TPU v4 lite", None),
        ("cpu", None),
    ],
)
def test_peak_flops_of_devices(device_kind, peak):
    assert hardware.peak_flops(device_kind) == peak
