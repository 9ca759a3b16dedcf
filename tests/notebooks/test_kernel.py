"""A real kernel without ipywidgets: training draws its curve, an interrupted cell saves, and the next one resumes."""

import json
import time

import pytest
from jupyter_client.manager import start_new_kernel
from support import child_processes, tiny_run

pytestmark = pytest.mark.slow

PREPARED = """
import sys
sys.modules["ipywidgets"] = None
sys.path[:0] = {path!r}
import diffusionlm as dlm
from support import tiny_run
cfg = tiny_run.tiny({dataset!r}, run={{"steps": {steps}, "eval_every": 0, "checkpoint_every": 10**6}})
"""
STEPS = 400


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny_run.make_dataset(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def kernel(dataset, tmp_path_factory):
    """Return a manager and a client of a kernel in which `cfg` is a tiny run."""
    manager, client = start_new_kernel(
        kernel_name="python3", cwd=str(tmp_path_factory.mktemp("notebook")), env=child_processes.environment()
    )
    path = [str(tiny_run.Path(tiny_run.__file__).parents[1])]
    execute(client, PREPARED.format(path=path, dataset=str(dataset), steps=STEPS))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def execute(client, code, on_message=lambda message: None):
    """Run a cell; return what it shows, by kind and in order."""
    messages = []

    def hook(message):
        messages.append(message)
        on_message(message)

    reply = client.execute_interactive(code, output_hook=hook, timeout=600)
    assert reply["content"]["status"] == "ok", messages
    return messages


def texts(messages):
    return " ".join(json.dumps(message["content"]) for message in messages)


def test_training_draws_its_curve_and_the_bar_stays(kernel):
    _, client = kernel
    messages = execute(client, "whole = dlm.train(cfg, 'whole')\nwhole")
    assert "ipywidgets" not in texts(messages)
    shown = {}
    for message in messages:
        if message["msg_type"] in ("display_data", "update_display_data"):
            name = message["content"]["transient"].get("display_id")
            assert (message["msg_type"] == "update_display_data") == (name in shown and name is not None)
            shown[name] = message["content"]["data"]
    assert sum("image/png" in data for data in shown.values()) == 1
    assert any(f"{STEPS}/{STEPS}" in data.get("text/html", "") for data in shown.values())
    (result,) = [message for message in messages if message["msg_type"] == "execute_result"]
    assert "nats per token" in result["content"]["data"]["text/html"]


def test_an_interrupted_cell_saves_and_the_same_call_resumes(kernel):
    manager, client = kernel
    interrupted = []

    def interrupt(message):
        if not interrupted and "loss" in texts([message]):  # steps are being taken
            interrupted.append(time.monotonic())
            manager.interrupt_kernel()

    code = "run = dlm.train(cfg, 'interrupted')\nprint('returned at', run.step, run.done)"
    messages = execute(client, code, interrupt)
    assert interrupted and "returned at" in texts(messages) and "False" in texts(messages)
    assert "stopped and saved at step" in texts(messages)
    execute(client, "assert 0 < run.step < cfg.run.steps and run.result is None, run")
    messages = execute(client, "again = dlm.train(cfg, 'interrupted')")
    assert "resuming from step" in texts(messages)
    execute(client, "assert again.done and again.result['eval'] == whole.result['eval'], (again, whole)")
