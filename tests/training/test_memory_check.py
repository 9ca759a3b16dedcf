"""A run that cannot fit is refused with an estimate, before anything is allocated or written."""

import jax
import pytest
from support.run_files import content
from support.tiny_run import refusal, tiny, with_changes

from diffusionlm import flops, memory
from diffusionlm.errors import UserError
from diffusionlm.parallel.mesh import make_mesh
from diffusionlm.training import memory_check
from diffusionlm.training import stepper as steppers
from diffusionlm.training.state import create_state


@pytest.mark.slow
def test_the_state_is_counted_as_it_is_stored_on_each_device(dataset):
    cfg = with_changes(tiny(dataset), {"mesh": {"data": 2, "fsdp": 4}})
    mesh = make_mesh(cfg.mesh)
    needs, state = memory_check.needs(cfg, mesh), create_state(cfg, mesh)

    def on_first(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert needs["parameters"] == on_first(state.params) == needs["gradients"]
    assert needs["optimizer"] == on_first(state.opt_state)
    assert needs["activations"] == 16 * 16 * 16 * 2 * 4 // 8  # batch, length, width, layers, bytes; eight devices


def test_on_one_device_the_state_is_what_the_ledger_counts(dataset):
    cfg = tiny(dataset)
    needs = memory_check.needs(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    ledger = flops.memory(cfg.model, cfg.optim)
    assert (needs["parameters"], needs["gradients"]) == (ledger.params, ledger.gradients)
    assert 0 <= needs["optimizer"] - ledger.optimizer <= 16, "and the counts of steps"


def test_adapters_alone_have_gradients(dataset):
    cfg = with_changes(tiny(dataset), {"model": {"lora_rank": 2}})
    needs = memory_check.needs(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
    assert needs["gradients"] == 4 * flops.parameters(cfg.model).trained < needs["parameters"]


@pytest.mark.parametrize("size", [{"d_model": 100_000_000}, {"n_layers": 10_000_000}, {"d_ff": 2**30}])
def test_a_model_beyond_all_memory_is_refused_before_anything_is_written(dataset, tmp_path, size):
    message = refusal(tiny(dataset, model=size), tmp_path / "run")
    assert message.startswith("training tiny needs at least ") and "GiB of memory (parameters " in message
    assert "; use a smaller model" in message
    assert not (tmp_path / "run").exists()


def test_the_limit_of_the_host_decides(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "host_limit", lambda: (10_000, "its control group allows"))
    assert "its control group allows 0.00954 MiB" in refusal(tiny(dataset), tmp_path)
    assert content(tmp_path) == {}


def test_an_allocation_that_is_refused_later_is_one_line(dataset):
    """The estimate cannot foresee everything: activations may be larger, and others may use memory."""
    cfg = tiny(dataset)
    mesh = make_mesh(cfg.mesh)
    with pytest.raises(UserError, match=r"not enough memory for training tiny, .*\(RESOURCE_EXHAUSTED: Out of"):
        with memory_check.refusals(cfg, mesh):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 40 bytes.\n")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory_check.refusals(cfg, mesh):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")


def test_a_state_is_waited_for_before_it_is_read(monkeypatch):
    """On CPUs, a read of one array of a computation whose memory was refused waits for ever; a wait for all raises."""

    def refuse(state):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(steppers.jax, "block_until_ready", refuse)
    with pytest.raises(jax.errors.JaxRuntimeError):
        steppers.Stepper(None, None, None, None).set_state(None)
