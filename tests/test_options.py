"""The words of a command line, as names of options."""

from diffusionlm.options import given


def test_given_options_are_named_as_their_fields_are():
    words = ["model", "--top-p", "0.5", "--length=8", "--data.path=a--b=c", "--steps", "-1", "-x", "--json"]
    assert given(words) == {"top_p", "length", "data.path", "steps", "json"}
