"""Fixtures of the tests of sandboxes."""

import pytest
from support.sandboxes import open_sandbox

from diffusionlm.evaluation.sandbox import backends


@pytest.fixture(scope="module", params=list(backends.SANDBOXES))
def place(request):
    return open_sandbox(request.param)
