"""The sandbox of chat templates: it computes what Jinja computes, and no template harms, hangs or fills the memory."""

import json

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from support.slow_cases import thinned
from support.wrong_paths import within

from diffusionlm.data.template_sandbox import Sandbox, TooMuchWork

MESSAGES = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi {{ 1 }} <b>\u00e9"}]
VARIABLES = {"messages": MESSAGES, "bos_token": "<s>", "add_generation_prompt": True, "tools": None}

DOUBLED = "{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {value} %}}{{% endfor %}}"
TEXT = "{% set s = range(999) | map('string') | list | join %}"
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    TEXT + "{% for i in range(99999) %}{% set t = s.split('1') %}{% endfor %}",
    TEXT + "{% for i in range(99999) %}{% if 'zz' in s %}{% endif %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% block b %}{{ self.b() }}{% endblock %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
]
HUGE = [
    DOUBLED.format(start="'aaaa'", value="ns.x ~ ns.x"),
    DOUBLED.format(start="'aaaa'", value="ns.x + ns.x"),
    DOUBLED.format(start="[1]", value="[ns.x, ns.x]") + "{{ ns.x }}",
    DOUBLED.format(start="[1]", value="(ns.x, ns.x)") + "{{ ns.x == ns.x }}",
    DOUBLED.format(start="{}", value="{'a': ns.x, 'b': ns.x}") + "{{ ns.x | tojson }}",
    DOUBLED.format(start="{}", value="dict(a=ns.x, b=ns.x)") + "{{ ns.x | string }}",
    DOUBLED.format(start="9", value="ns.x * ns.x"),
    "{{ 'a' * 1000000000 }}",
    "{{ [0] * 1000000000 }}",
    "{{ 99999999 ** 65 }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ '{:>1000000000}' | format(1) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    TEXT + "{{ s | replace('', s) }}",
    TEXT + "{{ s.replace('1', s) }}",
    TEXT + "{{ range(9999) | list | join(s) }}",
    TEXT + "{{ s.join(range(9999) | map('string') | list) }}",
    TEXT + "{% for i in range(999) %}{{ s }}{% endfor %}",
]
FORBIDDEN = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ (messages | first).__class__ }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{{ cycler('a') }}",
    "{{ lipsum.__globals__ }}",
    "{{ raise_exception('no') }}",
    "{{ x.y.z }}",
    "{{ 1 | nothing }}",
    "{{ 1 // 0 }}",
    "{{ [][0].x }}",
    "{% for",
]


@pytest.mark.parametrize("source", ENDLESS + HUGE)
def test_no_template_runs_for_ever_or_fills_the_memory(source):
    """In Jinja's own sandbox these take hours or gigabytes, or end with an error of Python's."""
    with pytest.raises(jinja2.TemplateError) as error:
        Sandbox().render(source, VARIABLES)
    assert isinstance(error.value, TooMuchWork | jinja2.TemplateAssertionError) or "unsafe" in str(error.value)


@pytest.mark.parametrize("source", FORBIDDEN)
def test_what_a_template_must_not_do_is_an_error_of_the_template(source):
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises(jinja2.TemplateError):
        rendered = Sandbox().render(source, {"messages": messages})
        assert "class" in source and rendered.strip("[]") in ("", "Undefined, Undefined")
        raise jinja2.TemplateError("an attribute that is not there")
    assert messages == MESSAGES


Y = TEXT + "{% set y = s * 15 %}"
BOMBS = [
    "{{ 5 | round(-30000000) }}",
    "{{ 5 | round(-30000000, 'ceil') }}",
    "{{ 5 | round(method='ceil', precision=30000000) }}",
    Y + "{% for i in range(60000) %}{% if 'zz' in y %}{% endif %}{% endfor %}",
    Y + "{% set z = y ~ '' %}{% for i in range(60000) %}{% if y == z %}{% endif %}{% endfor %}",
    Y + "{% for i in range(60000) %}{% set z = y[1:] %}{% endfor %}",
    Y + "{% for i in range(60000) %}{% if 'zz' is in y %}{% endif %}{% endfor %}",
    Y + "{% for i in range(60000) %}{% if y is upper %}{% endif %}{% endfor %}",
    "{% set l = range(9999) | list %}{% for i in range(60000) %}{% if -1 in l %}{% endif %}{% endfor %}",
    "{% set l = range(9999) | list %}{% for i in range(60000) %}{{ loop.changed(l) }}{% endfor %}",
    "{{ (5).to_bytes(1000000000, 'big') }}",
    "{{ (5).to_bytes(9, 'big').ljust(1000000000) }}",
    Y + "{{ " + " ~ ".join(["y"] * 2000) + " }}",
    Y + "{{ y | replace(old='', new=y) }}",
    Y + "{{ [y] | replace('', y) }}",
    Y + "{{ range(9999) | list | join(d=y) }}",
    Y + "{{ [{'a': 1}] | join(attribute='a', d=y * 99) }}",
    Y + "{% set n = namespace(x=y) %}{{ [" + "n, " * 999 + "] | join(attribute='x') }}",
    Y + "{% set n = namespace(x=y) %}{{ [" + "n, " * 999 + "] | join }}",
    "{% for i in [1] %}{{ [loop] | join(attribute='index') }}{% endfor %}",
    Y + "{% set d = {'a': 1, 'b': 2, 'c': 3} %}{{ y.join(d.keys()) }}",
    Y + "{{ ' '.join(y) | join(y) }}",
    Y + "{{ '" + "%(a)s" * 9999 + "' % {'a': y} }}",
    Y + "{{ ('%s' * 9999) % y }}",
    "{{ '%(a)1000000000d' % {'a': 1} }}",
    "{{ '-' * 1000000000 }}",
    "{{ 1000000000 * '-' }}",
    Y + "{{ y * 99 }}",
    "{% set n = ('f' * 60000) | int(base=16) %}{% for i in range(60000) %}{% set m = n // 3 %}{% endfor %}",
    "{% set n = namespace() %}{% set n.a = n %}{{ [n] | map(attribute='" + "a." * 999 + "a') | list }}",
]
HARMLESS = [
    ("{{ 5.126 | round(2) }} {{ 5.1 | round(method='ceil') }} {{ 123 | round(-1) }}", "5.13 6.0 120"),
    ("{{ 'a' in 'abc' }} {{ 1 < 2 < 3 }} {{ [1, 2, 3][1:] }} {{ 'abc'[::-1] }}", "True True [2, 3] cba"),
    ("{{ x is defined }} {{ x == none }} {{ 4 is divisibleby 2 }} {{ 'a' is in ['a'] }}", "False False True True"),
    ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{{ loop.last }}{% endfor %}", "a1True"),
    ("{% set n = namespace(x=1) %}{% set n.x = n.x + 1 %}{{ n.x }} {{ {'a': 1}.get('b', 2) }}", "2 2"),
    ("{{ [1, 2, 1].count(1) }} {{ (1, 2).index(2) }} {{ 'a b'.split(' ') }}", "2 1 ['a', 'b']"),
    ("{{ 'a' ~ 1 ~ none ~ x ~ [2] }}", "a1None[2]"),
    ("{{ 'aba' | replace(old='a', new='c') }} {{ 'aba'.replace('a', 'c') }}", "cbc cbc"),
    ("{{ [1, 2] | join(d=', ') }} {{ ', '.join(['a', 'b']) }} {{ 'ab' | join('-') }} {{ x | join }}", "1, 2 a, b a-b "),
    ("{{ [{'a': 1}, {'a': 2}] | join(', ', attribute='a') }} {{ {'k': 1}.keys() | list | join }}", "1, 2 k"),
    ("{{ '%(a)s-%(a)s' % {'a': 'b'} }} {{ '%s of %05d' % ('a', 3) }} {{ '%s' % 2024 }}", "b-b a of 00003 2024"),
    ("{{ '-' * 20 }} {{ 3 * 'a' }} {{ 'a' * 0 }}{{ 'a' * -1 }} {{ 3 * 4 }}", "-" * 20 + " aaa  12"),
    ("{{ 7 // 2 }} {{ 7 % 2 }} {{ 2 ** 40 // 1000 }} {{ 'ff' | int(base=16) }}", "3 1 1099511627 255"),
    ("{% macro f(a, b=2) %}{{ a + b }}{% endmacro %}{{ f(1) }}{{ f(1, b=4) }}", "35"),
]


@pytest.mark.parametrize("source", thinned(BOMBS, every=2))
def test_a_single_operation_that_would_take_minutes_or_gigabytes_is_refused(source):
    with within(60), pytest.raises(jinja2.TemplateError) as error:
        Sandbox().render(source, VARIABLES)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, TooMuchWork) or "unsafe" in str(error.value)


@pytest.mark.parametrize(("source", "expected"), HARMLESS)
def test_the_harmless_use_of_what_is_bounded_works(source, expected):
    assert Sandbox().render(source, VARIABLES) == expected


STATEMENTS = [
    *("{% for m in messages %}", "{% endfor %}", "{% if m %}", "{% else %}", "{% endif %}", "{% set x = messages %}"),
    *(
        "{{ x }}",
        "{{ m['content'] | trim }}",
        "{{ loop.index0 }}",
        "{{- 'a' -}}",
        "\n  ",
        "{% macro f(a) %}",
        "{{ f(1) }}",
    ),
    *(
        "{% endmacro %}",
        "{{ 1 + x }}",
        "{% break %}",
        "{# c #}",
        "{{ x[0] ~ 'b' }}",
        "{{ tools is none }}",
        "{{ bos_token }}",
    ),
    *("{{ [1, x] }}", "{{ {'a': x}['a'] | length }}", "{{ messages | map(attribute='role') | list | join('-') }}"),
    *("{% if loop.last %}", "{% for m in messages if m.role == 'user' %}", "{{ messages | tojson }}"),
]


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.one_of(st.lists(st.sampled_from(STATEMENTS), max_size=12).map("".join), st.text(max_size=60)))
def test_any_template_gives_what_jinja_gives_or_an_error_of_templates(source):
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        rendered = Sandbox().render(source, VARIABLES)
    except jinja2.TemplateError:
        return
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    assert rendered == environment.from_string(source).render(VARIABLES)


def test_marks_for_training_change_nothing():
    source = "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}"
    assert Sandbox().render(source, VARIABLES) == "systemuser"
