"""With `jax_enable_x64`, which some notebooks set, every result is the same bit for bit."""

import ast
import contextlib
import dataclasses
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from support import tiny_likelihood, tiny_run, tiny_sampler, tiny_step
from support.random_params import make_params

from diffusionlm.checkpoint import store
from diffusionlm.compile_check import workloads
from diffusionlm.errors import UserError
from diffusionlm.likelihood.confidence import confidences
from diffusionlm.likelihood.config import LikelihoodConfig
from diffusionlm.likelihood.greedy import is_greedy
from diffusionlm.likelihood.monte_carlo import estimate
from diffusionlm.model.transformer import Transformer
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.sampling.config import SamplingConfig
from diffusionlm.sampling.generate import generate, stream
from diffusionlm.sampling.strategies import STRATEGIES
from diffusionlm.training import loop as trainer

MDM, SHIFTED, ARM = tiny_likelihood.MDM, tiny_likelihood.SHIFTED, tiny_likelihood.ARM


@contextlib.contextmanager
def x64(value):
    """Set the option for all threads, as its environment variable does."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", value)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def in_both_modes(function, *args, **kwargs):
    """Return what a function returns without the option and with it."""
    results = []
    for value in (False, True):
        with x64(value):
            results.append(jax.device_get(function(*args, **kwargs)))
    return results


def assert_same_bits(function, *args, **kwargs):
    without, with_x64 = in_both_modes(function, *args, **kwargs)
    chex.assert_trees_all_equal(without, with_x64, strict=True)  # dtypes too


def test_the_option_changes_what_jax_does():
    """Otherwise the tests below would compare a mode with itself."""
    draws = in_both_modes(lambda: jax.random.uniform(jax.random.key(0), (4,)))
    assert [draw.dtype for draw in draws] == [np.float32, np.float64]
    assert not np.array_equal(*draws)


@pytest.mark.parametrize("objective", tiny_step.CONFIGS)
def test_a_training_step(objective):
    state, batch = tiny_step.host_state(objective), tiny_step.random_batch()
    assert_same_bits(tiny_step.run_step, objective, state, batch, 3)


@pytest.mark.slow
def test_a_whole_run(tmp_path, monkeypatch):
    """Its initial weights, three objectives one after another, its evaluations and its checkpoint."""
    monkeypatch.setattr(trainer, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
    cfg = tiny_run.in_parts(tiny_run.make_dataset(tmp_path / "data"))

    def run():
        workdir = tmp_path / f"run_{jax.config.jax_enable_x64}"
        return trainer.train(cfg, workdir).result["eval"], store.load_params(workdir)

    assert_same_bits(run)


def generated(spec, **settings):
    """The tokens, passes and trace of some prompts."""
    sampling = SamplingConfig(length=8, temperature=1.0, **settings)
    result = generate(tiny_sampler.PARAMS, spec, tiny_sampler.PROMPTS, sampling, trace=True)
    return result.tokens, result.nfe, result.trace


def test_every_strategy():
    """They share a program, in which all of them are branches."""
    for strategy in STRATEGIES:
        assert_same_bits(generated, tiny_sampler.MDM, strategy=strategy, steps=6, top_k=20, top_p=0.9, remask=0.2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (tiny_sampler.MDM, {"guidance": 0.5}),
        (tiny_sampler.MDM, {"block_length": 4, "cache": "dual"}),
        (tiny_sampler.MDM, {"block_length": 4, "cache": "prefix"}),
        (dataclasses.replace(tiny_sampler.MDM, eos_ids=(7, 9)), {"eos_penalty": 0.5, "eos_last": True}),
        (tiny_sampler.ARM, {}),
    ],
)
def test_caches_guidance_and_ends_of_text(spec, settings):
    assert_same_bits(generated, spec, **settings)


@pytest.mark.slow
def test_streams():
    """Their steps are calls of another program."""
    sampling = SamplingConfig(length=8, steps=6, temperature=1.0)
    args = (tiny_sampler.PARAMS, tiny_sampler.MDM, tiny_sampler.PROMPTS, sampling)
    assert_same_bits(lambda: [tuple(frame) for frame in stream(*args)])


@pytest.mark.slow
def test_programs_that_are_compiled_ahead():
    """Those of `diffusionlm compile` are those that run."""
    mesh = tiny_step.mesh_of(tiny_step.ALONE)

    def texts():
        sampling = SamplingConfig(length=6).resolve(autoregressive=False)
        programs = (
            workloads.training_step(tiny_step.MDM, mesh),
            workloads.sampling_loop(tiny_step.MDM, mesh, sampling, count=2),
        )
        with jax.set_mesh(mesh):
            return [program.lower().as_text() for program in programs]

    without, with_x64 = in_both_modes(texts)
    assert without == with_x64


def scored(function, spec, **settings):
    pairs = [(tiny_likelihood.PREFIX, tiny_likelihood.TARGET), ([7], [8, 3])]
    return function(tiny_likelihood.params_of(spec), spec, pairs, LikelihoodConfig(**settings))


@pytest.mark.parametrize(
    ("function", "spec", "settings"),
    [
        (estimate, MDM, {"estimator": "exact_count"}),
        (estimate, MDM, {"estimator": "iid"}),
        pytest.param(estimate, MDM, {"estimator": "chain_rule"}, marks=pytest.mark.slow),
        pytest.param(estimate, MDM, {"estimator": "any_order"}, marks=pytest.mark.slow),
        pytest.param(estimate, SHIFTED, {"guidance": 0.5}, marks=pytest.mark.slow),
        pytest.param(estimate, ARM, {}, marks=pytest.mark.slow),
        (is_greedy, MDM, {}),
        (confidences, MDM, {}),
    ],
)
def test_likelihoods(function, spec, settings):
    assert_same_bits(scored, function, spec, **settings)


def test_a_model_that_is_applied_by_itself_is_refused_in_one_line_that_says_what_to_do():
    model, params = Transformer(tiny_step.MDM.model), make_params(tiny_step.MDM.model)
    tokens = np.zeros((1, 4), np.int32)
    expected = model.apply({"params": params}, tokens)
    with x64(True):
        with pytest.raises(UserError, match=r"^jax_enable_x64 is on, .* `with jax\.enable_x64\(False\):`") as error:
            model.apply({"params": params}, tokens)
        assert "\n" not in str(error.value)
        with jax.enable_x64(False):
            np.testing.assert_array_equal(model.apply({"params": params}, tokens), expected)


def test_every_compiled_function_runs_in_32_bits():
    """But `programs.denoise`, which is called and lowered by functions that do."""
    package = Path(store.__file__).parents[1]
    compiled = {}
    for path in package.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [ast.unparse(each) for each in getattr(node, "decorator_list", [])]
            if any("jax.jit" in name for name in names):
                compiled[f"{path.stem}.{node.name}"] = names[0] == "in_32_bits"
    assert len(compiled) > 5 and [name for name, wrapped in compiled.items() if not wrapped] == ["programs.denoise"]
