"""The roofline: links, rings, slices and the four terms, against figures by hand."""

import pytest

from diffusionlm import hardware
from diffusionlm.compile_check import hlo, roofline
from diffusionlm.compile_check.collectives import Collective
from diffusionlm.compile_check.kernels import Kernel
from diffusionlm.compile_check.roofline import Network, Terms, Traffic


class Device:
    def __init__(self, coords, slice_index=0):
        self.coords, self.slice_index = coords, slice_index


def network(name, slices=1):
    topology = hardware.parse(name, slices)
    coords = [(0, 0, 0)]
    for axis, side in enumerate(topology.shape):
        coords = [place[:axis] + (i,) + place[axis + 1 :] for place in coords for i in range(side)]
    return Network(topology, [Device(place, s) for s in range(slices) for place in coords])


def reduce(groups, size=1e9, kind="all-reduce", **more):
    return Collective(kind, int(size), groups, 1, False, "", **more)


def test_a_collective_over_a_cube_uses_all_six_links():
    cost = network("v5p-128").cost(reduce((tuple(range(64)),)))
    assert cost.ici_bytes == pytest.approx(2 * 63 / 64 * 1e9) and not cost.dcn_bytes
    # The longest way is half of each ring of 4, and there and back.
    assert cost.ici_seconds == pytest.approx(cost.ici_bytes / (6 * 90e9) + 2 * 6 * roofline.HOP_SECONDS)


@pytest.mark.parametrize(
    "name, group, links",
    [
        ("v5p-128", range(4), 2),  # a ring along one axis
        ("v5p-128", range(2), 1),  # a part of it
        ("v5e-256", range(16), 2),
        ("v5e-256", range(256), 4),
        ("v5e-64", range(8), 1),  # too short to be a ring
        ("v5e-64", range(64), 2),
    ],
)
def test_links_of_a_group(name, group, links):
    net = network(name)
    cost = net.cost(reduce((tuple(group),), 1e12))
    assert cost.ici_seconds == pytest.approx(cost.ici_bytes / (links * net.topology.chip.link_bandwidth), rel=1e-3)


def test_between_slices_the_network_card_is_the_link():
    net = network("v5e-8", 2)
    cost = net.cost(reduce(((1, 2),), between_slices=True))
    assert cost.dcn_bytes == 1e9 and not cost.ici_bytes  # 2 * (2 - 1) / 2
    assert cost.dcn_seconds == pytest.approx(1e9 / 3.125e9, rel=1e-2)
    # A group over all devices of both slices first works within them, so that a byte crosses once.
    both = net.cost(reduce((tuple(range(16)),)))
    assert both.ici_bytes == pytest.approx(2 * 7 / 8 * 1e9) and both.dcn_bytes == pytest.approx(1e9 / 8)


def kernel(flops=0, size=0, runs=1, asynchronous=False):
    return Kernel(flops, size, runs, asynchronous, False, "")


def traffic(seconds, asynchronous, network="ici"):
    return Traffic("all-gather", network, 8, asynchronous, 1, 1.0, seconds, "")


def test_terms_add_up_to_what_nothing_hides():
    where = hardware.parse("v5e-8")  # 197e12 FLOP/s, 819e9 bytes/s
    kernels = (kernel(flops=int(197e12)), kernel(size=int(819e9 / 2), runs=4), kernel(size=819, asynchronous=True))
    program = hlo.ProgramCosts((), kernels, 0)
    assert roofline.terms(program, [], where, 197e12) == Terms(pytest.approx(1), pytest.approx(2), 0, 0)
    hidden = roofline.terms(program, [traffic(2, True)], where, 197e12)
    assert hidden.ici == 0
    shown = roofline.terms(program, [traffic(4, True), traffic(0.5, False), traffic(1, False, "dcn")], where, 197e12)
    assert shown.ici == pytest.approx(1.5) and shown.dcn == 1 and shown.total == pytest.approx(5.5)


def test_a_kernel_takes_the_longer_of_its_matmul_and_its_traffic():
    where = hardware.parse("v5e-8")
    program = hlo.ProgramCosts((), (kernel(flops=int(197e12), size=int(819e9 * 1.5)),), 0)
    assert roofline.terms(program, [], where, 197e12).total == pytest.approx(1.5)
