"""Set-up of the tests of sampling."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_dtypes():
    """Let implicit promotions of dtypes fail."""
    with jax.numpy_dtype_promotion("strict"):
        yield
