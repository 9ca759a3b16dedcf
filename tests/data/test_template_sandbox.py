"""The sandbox of chat templates: it computes what Jinja computes, and no template harms, hangs or fills the memory."""

import json

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

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
