"""Small HLO modules as text."""

HEADER = "HloModule test, is_scheduled=true, num_partitions=8\n"
ADD = "%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n"
ADD += "  ROOT %sum = f32[] add(%a, %b)\n}\n"
P0 = "%p = f32[4,8]{1,0} parameter(0)"
GATHER = "%g = f32[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[4,2]<=[8], dimensions={0}"


def module(*computations):
    return HEADER + ADD + "\n".join(computations)


def entry(*lines):
    return "ENTRY %main (p: f32[4,8]) -> f32[4,8] {\n  " + "\n  ".join(lines) + "\n}\n"


def computation(name, *lines):
    return f"%{name} (p: f32[4,8]) -> f32[4,8] {{\n  " + "\n  ".join(lines) + "\n}\n"
