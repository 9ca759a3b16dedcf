"""The tokenizer of a repository on the Hub: its files alone are fetched, and read like a directory's."""

import pytest
from support import stub_hub
from support.tokenizer_files import write_byte_level, write_merges

from diffusionlm import hub
from diffusionlm.data import tokenizers
from diffusionlm.errors import UserError


@pytest.fixture
def stub(monkeypatch, tmp_path):
    return stub_hub.install(monkeypatch, tmp_path / "hub")


@pytest.fixture
def released(tmp_path):
    """A directory with the tokenizer of a released model."""
    (tmp_path / "released").mkdir()
    return write_byte_level(tmp_path / "released")


def upload(stub, repository, directory, **others):
    """Put the files of a directory and others into a repository, as its owner may have done; returns its commit."""
    (stub.root / "empty").mkdir(parents=True, exist_ok=True)
    address = hub.push(stub.root / "empty", repository, private=False, message="first")
    for file in directory.iterdir():
        stub.add(repository, file.name, file.read_text())
    for name, text in others.items():
        stub.add(repository, name, text)
    return address


def test_only_the_files_of_the_tokenizer_are_fetched(stub, released, capsys):
    weights = {"model.safetensors": "large", "pytorch_model.bin": "large", "README.md": "a card"}
    address = upload(stub, "me/weights-too", released, **weights, **{"config.json": '{"eos_token_id": 1}'})
    tokenizer = tokenizers.load("hf://me/weights-too")
    assert tokenizer.sha256 == tokenizers.load(str(released)).sha256
    fetched = {path.name for path in (stub.root / "cache").rglob("snapshots/*/*")}
    assert fetched == {"tokenizer.json", "tokenizer_config.json", "config.json"}
    assert capsys.readouterr().err == f"using {address}\n"
    stub.offline = True
    assert tokenizers.load("hf://me/weights-too").sha256 == tokenizer.sha256


def test_vocabularies_with_merges_are_read_too(stub, tmp_path):
    (tmp_path / "merges").mkdir()
    directory = write_merges(tmp_path / "merges", "GPT2Tokenizer")
    upload(stub, "me/merges", directory)
    assert tokenizers.load("hf://me/merges").sha256 == tokenizers.load(str(directory)).sha256


def test_a_revision_is_that_of_the_address(stub, released):
    address = upload(stub, "me/released", released)
    assert tokenizers.load(str(address)).sha256 == tokenizers.load(str(released)).sha256
    with pytest.raises(UserError, match="hf://me/released has no revision 'v9'"):
        tokenizers.load("hf://me/released@v9")


def test_what_has_no_tokenizer_is_one_line(stub, tmp_path):
    (tmp_path / "none").mkdir()
    upload(stub, "me/weights", tmp_path / "none", **{"model.safetensors": "large"})
    for name, message in {
        "hf://me/absent": "there is no model hf://me/absent, or it is private",
        "hf://me": "write hf://OWNER/NAME",
        "hf://me/weights": "hf://me/weights@.* holds no tokenizer: no tokenizer.json",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            tokenizers.load(name)
        assert "\n" not in str(error.value)
