"""Addresses of models on the Hub, and every refusal of the Hub as one line."""

import importlib.util

import pytest
from support import stub_hub

from diffusionlm import hub
from diffusionlm.errors import UserError


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """The Hub in a folder, with one repository of one commit."""
    stub = stub_hub.install(monkeypatch, tmp_path)
    (tmp_path / "model" / "params").mkdir(parents=True)
    (tmp_path / "model" / "params" / "a").write_text("1")
    hub.push(tmp_path / "model", "me/model", private=False, message="first")
    stub.add("me/model", "pickle.bin", "not ours")
    return stub


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://me/model", ("me/model", None)),
        ("hf://me/model@main", ("me/model", "main")),
        ("hf://me-2/my.model_v1@refs/pr/3", ("me-2/my.model_v1", "refs/pr/3")),
    ],
)
def test_addresses(text, expected):
    address = hub.parse(text)
    assert address == expected and str(address) == text


@pytest.mark.parametrize(
    "text", ["hf://", "hf://me", "hf://me/", "hf://me/model/part", "hf://me/model@", "hf://../model", "hf://me/mo del"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(UserError, match="no address of a model on the Hub; write hf://OWNER/NAME"):
        hub.parse(text)


def test_a_model_is_pushed_to_a_name_without_revision():
    assert hub.require_repository("me/model") == hub.require_repository("hf://me/model") == "me/model"
    with pytest.raises(UserError, match="a model is pushed to OWNER/NAME"):
        hub.require_repository("hf://me/model@main")


def test_a_fetch_names_the_commit_and_takes_only_files_of_a_checkpoint(stub, capsys):
    fetched = hub.fetch("hf://me/model")
    assert str(fetched.address) == f"hf://me/model@{stub.commits['me/model'][0]}"
    assert [path.name for path in fetched.path.rglob("*") if path.is_file()] == ["a"]
    assert capsys.readouterr().err == f"using {fetched.address}\n"
    assert hub.fetch(str(fetched.address)) == fetched


def test_a_push_replaces_the_model_of_before_and_keeps_its_commit(stub, tmp_path):
    (tmp_path / "new" / "params").mkdir(parents=True)
    (tmp_path / "new" / "params" / "b").write_text("2")
    first = stub.commits["me/model"][0]
    second = hub.push(tmp_path / "new", "me/model", private=True, message="second")
    assert stub.files("me/model") == {"params/b", "pickle.bin"}  # what is not ours stays
    assert second.revision != first and stub.private["me/model"] is False
    assert (hub.fetch(f"hf://me/model@{first}").path / "params" / "a").read_text() == "1"


def test_every_refusal_is_one_line(stub):
    def refusal(address):
        with pytest.raises(UserError) as error:
            hub.fetch(address)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "there is no model hf://me/other, or it is private" in refusal("hf://me/other")
    assert "hf://me/model has no revision 'v9'" in refusal("hf://me/model@v9")
    stub.gated.add("me/closed")
    assert "hf://me/closed is gated: ask for access at https://huggingface.co/me/closed" in refusal("hf://me/closed")
    stub.offline = True
    assert "cannot reach the Hub, and hf://me/other is not on this disk" in refusal("hf://me/other")


def test_without_a_network_a_model_that_was_fetched_is_used(stub):
    fetched = hub.fetch("hf://me/model")
    stub.offline = True
    assert hub.fetch("hf://me/model") == fetched


def test_a_push_leaves_files_that_are_none_of_a_checkpoint_here(stub, tmp_path):
    model = tmp_path / "model"
    for name in ("secret.env", ".secret", "notes/a", "README.md"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("x")
    hub.push(model, "me/new", private=False, message="x")
    assert stub.files("me/new") == {"params/a", "README.md"}


def test_a_push_without_the_right_is_one_line(stub, tmp_path):
    with pytest.raises(UserError, match="the Hub refuses hf://somebody-else/model: 403 Client Error.; log in") as error:
        hub.push(tmp_path / "model", "somebody-else/model", private=False, message="x")
    assert "\n" not in str(error.value)


def test_a_push_without_a_network_is_one_line(stub, tmp_path):
    stub.offline = True
    with pytest.raises(UserError, match="cannot reach the Hub for hf://me/new: .*Connection refused") as error:
        hub.push(tmp_path / "model", "me/new", private=False, message="x")
    assert "\n" not in str(error.value)


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"hf://me/model needs the package huggingface_hub.*\[hub\]"):
        hub.fetch("hf://me/model")
