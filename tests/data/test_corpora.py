"""The corpus of installed documentation: complete, deduplicated, split by module, and read without running anything."""

import collections
import hashlib
import inspect
import re
import statistics
import sys
from pydoc_data.topics import topics

import numpy as np
import pytest

from diffusionlm.data import corpora
from diffusionlm.errors import UserError


@pytest.fixture(
    scope="module", params=[pytest.param(("numpy",), id="one"), pytest.param(corpora.PACKAGES, marks=pytest.mark.slow)]
)
def docs(request):
    """Return the documents of the standard library with those of one package, or of all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PACKAGES", request.param)
        return corpora.get("python_docs")


def module_of(document):
    return document.name if document.name.startswith("help:") else document.name.partition(":")[0]


def paragraphs(document):
    for paragraph in re.split(r"\n\s*\n", document.text.strip()):
        letters = re.sub(r"[\W\d_]", "", paragraph).lower()
        if len(letters) >= corpora.BOILERPLATE:
            yield letters


@pytest.mark.slow
def test_several_megabytes_in_two_splits():
    docs = corpora.get("python_docs")
    size = {split: sum(len(document.text.encode()) for document in documents) for split, documents in docs.items()}
    assert set(size) == {"train", "validation"}
    assert size["train"] > 4e6
    assert 1e5 < size["validation"] < 0.1 * size["train"]


@pytest.mark.slow
def test_holds_what_the_packages_document(docs):
    """`np.concatenate` is written in C: numpy attaches its documentation."""
    everything = "\n".join(document.text for documents in docs.values() for document in documents)
    for documented in (np.linalg.norm, np.concatenate, collections.Counter, statistics.quantiles):
        longest = max(inspect.getdoc(documented).split("\n\n"), key=len)
        assert longest in everything, documented
    assert max(topics["if"].split("\n\n"), key=len) in everything


@pytest.mark.slow
def test_whole_modules_are_held_out_by_the_hash_of_their_name(docs):
    modules = {split: {module_of(document) for document in documents} for split, documents in docs.items()}
    assert not modules["train"] & modules["validation"]
    for split, names in modules.items():
        for name in names:
            held_out = int(hashlib.sha256(name.encode()).hexdigest(), 16) < corpora.VALIDATION_SHARE * 2**256
            assert held_out == (split == "validation"), name
    assert len(modules["validation"]) > 20


@pytest.mark.slow
def test_no_paragraph_comes_twice(docs):
    counts = collections.Counter(
        p for documents in docs.values() for document in documents for p in paragraphs(document)
    )
    assert counts.most_common(1)[0][1] == 1


@pytest.mark.slow
def test_documents_are_clean_text(docs):
    for documents in docs.values():
        for document in documents:
            assert document.text.strip() and document.text.endswith("\n") and "\0" not in document.text
            document.text.encode()


ODD_SOURCE = '''
"""What the head of the module has to say about all of it, at some length."""
raise SystemExit("this file is not to be run")

def first():
    """The first function has a docstring that is long enough to be kept."""

if True:
    class Second:
        """The second definition is a class under a condition, documented.

        The first function has a docstring that is long enough to be kept!
        """
        def method(self):
            """
            A method of it, whose docstring is indented in the usual manner.
              This line is indented further.
            """

add_newdoc("odd", "third", """
    The third text is attached to something that was written in C.
    """)
'''


@pytest.fixture
def odd_package(tmp_path, monkeypatch):
    """A package in the place of all others, in whose files much is odd."""
    (tmp_path / "lib").mkdir()
    package = tmp_path / "site" / "odd"
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "source.py").write_text(ODD_SOURCE)
    (package / "broken.py").write_text("def (:")
    (package / "latin.py").write_bytes(b'"""caf\xe9, in an encoding that was not declared, alas for its readers"""')
    (package / "tests" / "test_source.py").write_text(
        '"""The tests of a package are none of its documentation, by far."""'
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(corpora, "PACKAGES", ("odd", "absent_package"))
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    monkeypatch.setattr(corpora, "_help_topics", list)
    yield
    sys.modules.pop("odd", None)


def test_sources_are_parsed_and_not_run(odd_package):
    documents = [document for split in corpora.get("python_docs").values() for document in split]
    assert {document.name: document.text for document in documents} == {
        "odd.source": "What the head of the module has to say about all of it, at some length.\n",
        "odd.source:first": "The first function has a docstring that is long enough to be kept.\n",
        "odd.source:Second": "The second definition is a class under a condition, documented.\n\n"
        "A method of it, whose docstring is indented in the usual manner.\n  This line is indented further.\n",
        "odd.source:20": "The third text is attached to something that was written in C.\n",
    }
    assert "odd.source" not in sys.modules


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="unknown corpus 'python_doc'; did you mean 'python_docs'"):
        corpora.get("python_doc")
