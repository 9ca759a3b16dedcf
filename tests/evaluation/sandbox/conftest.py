"""Fixtures of the tests of sandboxes."""

import pytest
from support.sandboxes import open_sandbox
from support.slow_cases import slow_but

from diffusionlm.evaluation.sandbox import backends


@pytest.fixture(scope="module", params=slow_but(backends.SANDBOXES, ("namespaces",)))
def place(request):
    return open_sandbox(request.param)
