"""Names, text and files that we did not write: what is refused, and what a terminal gets to see."""

import os
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from diffusionlm import untrusted
from diffusionlm.errors import UserError

TEXT = st.text(st.one_of(st.characters(), st.sampled_from("[]/\\\x1b\x9b\x07\n\ud800\u202e#@a=")), max_size=40)


@given(TEXT)
@example("\x1b]0;title\x07")
@example("\ud800")
def test_printable_text_has_nothing_that_a_terminal_obeys(text):
    shown = untrusted.printable(text)
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert not {unicodedata.bidirectional(character) for character in shown} & {"LRE", "RLE", "LRO", "RLO", "LRI"}
    assert untrusted.printable(shown) == shown
    shown.encode()


BAD_NAMES = ["../x", "/abs", "a/b", "..", ".", "", "a\\b", "a\x00b", "\x1b[2J", "n" * 256, "é" * 128, None, 3, ["x"]]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(UserError, match="^the index names the file .*; it must be a name inside its directory$"):
        untrusted.plain_name(name, "the index")


@given(TEXT)
def test_a_plain_name_stays_in_its_directory(name):
    try:
        plain = untrusted.plain_name(name, "the index")
    except UserError:
        return
    path = os.path.normpath(os.path.join("/directory", plain))
    assert os.path.dirname(path) == "/directory" and os.path.basename(path) == name


@given(st.lists(TEXT, max_size=3).map("/".join))
def test_a_relative_name_stays_below_its_directory(name):
    try:
        path = os.path.normpath(os.path.join("/directory", untrusted.relative_name(name, "the index")))
    except UserError:
        return
    assert path == f"/directory/{name}"


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    (tmp_path / "link").symlink_to("/dev/zero")
    for path, message in [
        (tmp_path / "pipe", "is a pipe; only files are read here, so put its content in a file"),
        (tmp_path / "link", "is a device; only files are read here, so put its content in a file"),
        (tmp_path, "is a directory; give a file"),
    ]:
        with pytest.raises(UserError, match=message):
            untrusted.read_bytes(path)


def test_a_link_to_a_file_is_read_and_a_large_file_is_not(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    assert untrusted.read_bytes(tmp_path / "link", limit=5) == b"12345"
    with pytest.raises(UserError, match="has 5 bytes; at most 4 are read"):
        untrusted.read_bytes(tmp_path / "link", limit=4)
