"""A report that the tests of its files and of its page share."""

import pytest
from support.simulated_sweep import complete

from diffusionlm.scaling.report import document

WORDS = {"title": "A sweep & <its> laws", "convention": "N counts non-embedding parameters, C = 6 N D."}


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """Return the directory of a report, which no test may change, and the content of its report.json."""
    directory = tmp_path_factory.mktemp("sweep") / "report"
    content = document.write(complete(), directory, **WORDS, overlay=("smdm_mdm", "quokka"), incomplete=2)
    return directory, content
