"""Fixtures of the tests of tasks in which a model writes."""

import pytest
from support.written_answers import make_places


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    return make_places(tmp_path_factory.mktemp("generation"))
