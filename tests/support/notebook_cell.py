"""A cell of a notebook that runs in this process: what it displays is kept, and ipywidgets are missing."""

import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def cell(monkeypatch):
    """Make this process serve a notebook; `outputs` has what each output of the cell shows at the end, `drawn` all."""
    shells = pytest.importorskip("IPython.core.interactiveshell", reason="needs IPython")
    from IPython.core.displaypub import CapturingDisplayPublisher
    from traitlets.config import Config

    shell = shells.InteractiveShell.instance(config=Config(HistoryManager={"enabled": False}))
    publisher = CapturingDisplayPublisher(shell=shell)
    monkeypatch.setattr(shell, "display_pub", publisher)
    monkeypatch.setattr(shell, "kernel", object(), raising=False)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    yield SimpleNamespace(shell=shell, drawn=publisher.outputs, outputs=lambda: _outputs(publisher.outputs))
    shells.InteractiveShell.clear_instance()


def _outputs(drawn):
    """Return the last content of each output, in the order in which they appeared."""
    outputs = {}
    for n, message in enumerate(drawn):
        name = (message.get("transient") or {}).get("display_id", n)
        assert bool(message.get("update")) == (name in outputs), "an output is made once, and then updated"
        outputs[name] = message["data"]
    return list(outputs.values())
