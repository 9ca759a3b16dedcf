"""Mixtures as text: what they mean, what is refused, and what of them is identity."""

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusionlm import config_mixture
from diffusionlm.config import Config
from diffusionlm.errors import UserError
from diffusionlm.fingerprint import fingerprint


def test_sources_weights_and_phases():
    spec = config_mixture.parse(" data/web/=0.70, gs://bucket/code=0.3 ; 20:data/web=0.2,gs://bucket/code=0.5,maths=.3")
    assert spec.paths == ("data/web", "gs://bucket/code", "maths") and spec.labels == ("web", "code", "maths")
    assert [phase.start for phase in spec.phases] == [0, 20]
    assert spec.phases[0].weights == (0.7, 0.3, 0.0) and spec.phases[1].weights == (0.2, 0.5, 0.3)
    assert [spec.phase_of(batch).start for batch in (0, 19, 20, 10**9)] == [0, 0, 20, 20]
    assert config_mixture.parse("a=0.333333,b=0.333333,c=0.333333").phases[0].weights == (1 / 3,) * 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("web", ["'web' must be PATH=WEIGHT"]),
        ("web=", ["the weight of 'web', ''", "a share in [0, 1]"]),
        ("=1", ["'=1' must be PATH=WEIGHT"]),
        ("web=0.5,,code=0.5", ["'' must be PATH=WEIGHT"]),
        ("web=-0.5,code=1", ["the weight of 'web', '-0.5'"]),
        ("web=2", ["the weight of 'web', '2'", "at most six decimal places"]),
        ("web=0.1234567,code=0.8765433", ["'0.1234567'", "at most six decimal places"]),
        ("web=nan", ["'nan'"]),
        ("web=0.7,code=0.4", ["web=0.7, code=0.4 sum to 1.1, not to 1", "that is web=0.636364,code=0.363636"]),
        ("web=0,code=0", ["sum to 0", "positive weight"]),
        ("a/web=0.5,b/web=0.5", ["'a/web' and 'b/web' are both named 'web'", "rename"]),
        ("web=1;5:other/web=1", ["'web' and 'other/web' are both named"]),
        ("web=0.5,web=0.5", ["names 'web' twice"]),
        ("two words=1", ["'two words'", "rename the directory"]),
        ("5:web=1", ["'5:web=1' does not fit", "in order"]),
        ("web=1;code=1", ["'code=1' does not fit"]),
        ("web=1;9:code=1;9:web=1", ["'9:web=1' does not fit"]),
        ("web=1;0:code=1", ["'0:code=1' does not fit"]),
        ("web=1;9:code=0.5", ["sum to 0.5"]),
    ],
)
def test_what_is_no_mixture_is_refused_in_one_line(text, said):
    with pytest.raises(UserError) as caught:
        config_mixture.parse(text)
    message = str(caught.value)
    assert message.startswith(f"data.mixture={text!r}") and "\n" not in message
    assert all(words in message for words in said), message


@settings(deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6).filter(any))
def test_the_proposed_weights_sum_to_one_and_keep_the_proportions(units):
    found = config_mixture._in_proportion(tuple(units))
    assert sum(found) == config_mixture.UNITS
    assert all(abs(a - Fraction(b * 10**6, sum(units))) < 1 for a, b in zip(found, units, strict=True))


def with_mixture(text):
    return dataclasses.replace(Config(), data=dataclasses.replace(Config().data, mixture=text))


def test_the_fingerprint_knows_shares_and_names_and_no_places():
    one = fingerprint(with_mixture("web=0.7,code=0.3"))
    assert one == fingerprint(with_mixture("/elsewhere/web=0.70,gs://bucket/code=.3"))
    others = ["web=0.6,code=0.4", "code=0.3,web=0.7", "web=0.7,code2=0.3", "web=0.7,code=0.3;9:code=1", ""]
    assert len({one, *(fingerprint(with_mixture(text)) for text in others)}) == 6


def test_a_mixture_of_one_dataset_is_none():
    assert fingerprint(with_mixture("data/web=1")) == fingerprint(Config())
    assert with_mixture("data/web=1").data.sources == with_mixture("").data.sources == ()
    assert with_mixture("web=1;5:code=1").data.sources == ("web", "code")


def test_mixtures_agree_up_to_a_batch_by_their_places():
    def phases(text):
        return config_mixture.parse(text).phases

    plain, later = phases("web=1"), phases("web=1;100:web=0.5,code=0.5")
    assert config_mixture.agree(plain, later, 100) and not config_mixture.agree(plain, later, 101)
    assert config_mixture.agree(phases("a=0.7,b=0.3"), phases("x=0.7,y=0.3;50:x=1"), 50)
    assert not config_mixture.agree(phases("a=0.7,b=0.3"), phases("a=0.3,b=0.7"), 1)
    assert config_mixture.agree(phases("a=0.7,b=0.3"), phases("a=0.3,b=0.7"), 0)


@pytest.mark.parametrize("sources", [2, 3, 6])
def test_a_stand_in_has_as_many_sources(sources):
    assert len(config_mixture.parse(config_mixture.of_size(sources)).labels) == sources
    assert config_mixture.of_size(1) == config_mixture.of_size(0) == ""
