"""Presets have the parameter counts of their sources, and the settings that counts cannot show."""

import subprocess
import sys

import pytest

from diffusionlm import flops, presets
from diffusionlm.errors import UserError

# The hard-coded sizes of SMDM's train_mdm.py (2410.18514): number -> non-embedding parameters, all parameters.
SMDM = {
    6: (6_294_784, 22_679_040),
    19: (18_880_896, 43_457_280),
    34: (33_563_136, 66_331_648),
    48: (47_786_688, 84_651_264),
    66: (65_549_440, 106_510_080),
    75: (75_387_520, 116_348_160),
    85: (85_214_080, 126_174_720),
    113: (113_265_408, 162_418_176),
    142: (141_581_568, 190_734_336),
    170: (169_897_728, 219_050_496),
    180: (179_856_768, 237_201_664),
    206: (205_550_464, 262_895_360),
    231: (231_244_160, 288_589_056),
    268: (268_469_248, 334_006_272),
    302: (302_027_776, 367_564_800),
    336: (335_586_304, 401_123_328),
    472: (471_906_560, 553_827_840),
    551: (550_557_440, 632_478_720),
    571: (571_001_728, 661_115_136),
    629: (629_208_320, 711_129_600),
    666: (666_168_448, 756_281_856),
    717: (717_285_888, 815_591_424),
    761: (761_335_168, 851_448_576),
    831: (830_541_312, 928_846_848),
    944: (943_796_736, 1_042_102_272),
    1028: (1_027_677_952, 1_142_367_744),
    1233: (1_233_213_184, 1_347_902_976),
    1476: (1_476_487_168, 1_607_561_216),
    1678: (1_677_826_048, 1_808_900_096),
    2121: (2_121_393_280, 2_260_659_456),
}

# LLaDA (2502.09992, Table 5), and the sizes of the released checkpoints of the others.
OTHERS = {
    "llada_1b": (969_246_720, 1_487_243_264),
    "llada_8b": (6_979_588_096, 8_015_581_184),
    "llada_arm_7b": (5_798_858_752, 6_834_851_840),
    "tinyllama_1b": (968_976_384, 1_100_048_384),
    "gpt2": (85_056_000, 124_439_808),
    "gpt2_medium": (302_311_424, 354_823_168),
    "llama2_7b": (6_476_271_616, 6_738_415_616),
    "dream_7b": (6_525_621_760, 7_615_616_512),
    "llama3_8b": (6_979_588_096, 8_030_261_248),
    "qwen3_8b": (6_946_075_648, 8_190_735_360),
    "mistral_7b": (6_979_588_096, 7_241_732_096),
}

# Sizes of our own: layers, width, MLP width; SwiGLU, 8191 pieces and the mask row, separate input and output rows.
GENERIC = {"mdm_10m": (7, 256, 768), "mdm_30m": (7, 512, 1408), "mdm_100m": (12, 768, 2048)}


def generic_counts(layers, width, mlp):
    """Return the parameters of blocks and norms, and all parameters."""
    blocks = layers * (4 * width**2 + 3 * width * mlp) + (2 * layers + 1) * width
    return blocks, blocks + (8192 + 8191) * width


OTHERS |= {name: generic_counts(*shape) for name, shape in GENERIC.items()}
EXPECTED = {f"smdm_{number}m": counts for number, counts in SMDM.items()} | OTHERS


def test_names_are_the_published_ones_and_ours():
    assert len(SMDM) == 30
    assert set(presets.names()) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_parameter_counts(name):
    cfg = presets.get(name)
    cfg.validate()
    counts = flops.parameters(cfg)
    assert (counts.non_embedding, counts.total) == EXPECTED[name]
    assert counts.total == counts.non_embedding + counts.embedding + counts.head


@pytest.mark.parametrize("name", GENERIC)
def test_generic_sizes_have_about_the_parameters_of_their_name(name):
    assert flops.parameters(presets.get(name)).total == pytest.approx(1e6 * int(name[4:-1]), rel=0.03)


@pytest.mark.parametrize("number", SMDM)
def test_smdm_autoregressive_twin(number):
    cfg = presets.get(f"smdm_{number}m")
    twin = presets.arm_twin(cfg)
    assert (cfg.causal, twin.causal, twin.mask_row) == (False, True, False)
    # The GPT of SMDM's lit_gpt/model.py: the same trunk, 32000 rows in and 32000 out.
    assert flops.parameters(twin).total == SMDM[number][0] + 2 * 32000 * cfg.d_model


# Invisible to parameter counts: query heads, causal, mask row, context, rotary base, epsilon.
SETTINGS = {
    "smdm_75m": (8, False, True, 2048, 1e4, 1e-5),
    "smdm_1028m": (14, False, True, 2048, 1e4, 1e-5),
    "llada_1b": (32, False, False, 4096, 5e5, 1e-5),
    "llada_8b": (32, False, False, 4096, 5e5, 1e-5),
    "llada_arm_7b": (32, True, False, 4096, 5e5, 1e-5),
    "tinyllama_1b": (32, True, False, 2048, 1e4, 1e-5),
    "gpt2": (12, True, False, 1024, None, 1e-5),
    "gpt2_medium": (16, True, False, 1024, None, 1e-5),
    "llama2_7b": (32, True, False, 4096, 1e4, 1e-5),
    "dream_7b": (28, False, False, 131072, 1e6, 1e-6),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name):
    cfg = presets.get(name)
    theta = cfg.rope_theta if cfg.positions == "rope" else None
    assert (cfg.n_heads, cfg.causal, cfg.mask_row, cfg.max_length, theta, cfg.norm_eps) == SETTINGS[name]
    assert cfg.n_heads * cfg.head_dim == cfg.d_model
    assert cfg.dtype == "bfloat16"


def test_mistyped_name_gets_a_suggestion():
    with pytest.raises(UserError, match="unknown preset 'llada8b'; did you mean 'llada_8b'"):
        presets.get("llada8b")


def test_presets_and_flops_do_not_import_jax():
    code = "import sys, diffusionlm.presets, diffusionlm.flops; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
