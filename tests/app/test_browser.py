"""The app in a real browser: a wide and a narrow one, light and dark, with right and with wrong input."""

import time
from urllib.parse import urlsplit

import pytest
from support import browser as browsers
from support import tiny_chat
from support.browser import field, generate

from diffusionlm.app import colours, server
from diffusionlm.pretrained.loading import load
from diffusionlm.sampling.config import SamplingConfig

pytest.importorskip("gradio", reason="the app needs its extra: gradio")
from diffusionlm.app import session as work

# The warnings of the web server and of its libraries are not ours.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SAMPLING = SamplingConfig(length=16, strategy="low_confidence", block_length=8, temperature=0.7, seed=5)
GIVEN = {name: getattr(SAMPLING, name) for name in ("length", "strategy", "block_length", "temperature", "seed")}
NASTY = '<img src=x onerror="hacked=1"><b>b</b> *s*'
BACKGROUND = """element => {
  const context = document.createElement("canvas").getContext("2d");
  context.fillStyle = getComputedStyle(element).backgroundColor;
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
}"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load(tiny_chat.save(tmp_path_factory.mktemp("model") / "model"))


@pytest.fixture(scope="module")
def address(model):
    with server.workplace() as directory:
        blocks = server.start(model, GIVEN, "127.0.0.1", server.find_port("127.0.0.1", None), directory)
        yield blocks.local_url
        blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    with browsers.browser() as started:
        yield started


@pytest.fixture
def visit(browser, address):
    """Return a function that opens the app in a session of its own; at the end no page may have asked elsewhere."""
    asked, contexts, problems = set(), [], []

    def visit(width=1280, theme="light", tab="Continue"):
        context = browser.new_context(viewport={"width": width, "height": 900}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(browsers.PATIENCE)
        page.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{address}?__theme={theme}")
        page.get_by_role("tab", name=tab).click()
        return page

    yield visit
    for context in contexts:
        context.close()
    assert asked <= {"127.0.0.1", None, ""} and not problems


def shown_text(page):
    return field(page, "text").input_value()


def test_a_prompt_is_completed_as_on_the_command_line_and_its_steps_can_be_seen(visit, model):
    page = visit()
    field(page, "prompt").fill("Once")
    generate(page, "complete")
    expected = model.generate("Once", SAMPLING, raw=True)[0]
    assert shown_text(page) == expected.text
    tokens = page.locator("#viewer .text span:not(.prompt)")
    assert tokens.count() == 16 and page.locator("#viewer .text .mask").count() == 0
    sure = page.locator("#viewer .text .on").first
    confidence = float(sure.evaluate("e => e.style.getPropertyValue('--c')"))
    seen = sure.evaluate(BACKGROUND)
    assert max(abs(a - b) for a, b in zip(seen, colours.colour(confidence), strict=True)) <= 2
    page.locator("#viewer #step").focus()
    page.keyboard.press("Home")
    assert page.locator("#viewer .text .mask").count() == 16
    assert page.locator("#viewer small").inner_text().startswith("step 0 of")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(visit, theme):
    page = visit(width=390, theme=theme)
    page.locator("#compare input").check()
    field(page, "prompt").fill("Once upon a time " + "w" * 20)
    generate(page, "complete")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.body.classList.contains('dark')") == (theme == "dark")
    viewer = page.locator("#viewer .denoising")
    dark = sum(viewer.evaluate(BACKGROUND)) < 3 * 128
    assert dark == (theme == "dark")
    assert viewer.locator("section").count() == 2


def test_given_words_stay_where_gaps_are_filled(visit, model):
    page = visit(tab="Fill in")
    field(page, "gaps").fill("Tom{mask:6} cat{mask:3}!")
    generate(page, "fill")
    text = shown_text(page)
    assert text == model.infill("Tom{mask:6} cat{mask:3}!", SAMPLING)[0].text
    assert text.startswith("Tom") and " cat" in text and text.endswith("!")


def test_a_message_is_answered_and_markup_is_text(visit, model):
    page = visit(tab="Chat")
    field(page, "chat-text").fill(NASTY[:40])
    generate(page, "send")
    assert NASTY[:40] in page.locator("#turns").inner_text()
    assert page.evaluate("window.hacked") is None and page.locator("img[src=x]").count() == 0
    assert field(page, "chat-text").input_value() == ""


def test_two_sessions_have_two_dialogues(visit):
    ann, bob = visit(tab="Chat"), visit(tab="Chat")
    for page, name in ((ann, "Ann"), (bob, "Bob")):
        field(page, "chat-text").fill(name)
        page.locator("#send").click()
    for page in (ann, bob):
        page.wait_for_function("() => document.querySelector('#message').innerText.trim() === ''")
    assert "Ann" in ann.locator("#turns").inner_text() and "Bob" not in ann.locator("#turns").inner_text()
    assert "Bob" in bob.locator("#turns").inner_text() and "Ann" not in bob.locator("#turns").inner_text()


def test_markup_in_a_prompt_and_in_a_mistake_is_text(visit):
    page = visit()
    field(page, "prompt").fill(NASTY)
    generate(page, "complete")
    assert NASTY in page.locator("#viewer .text").inner_text()
    field(page, "pins").fill(NASTY)
    generate(page, "complete")
    assert NASTY in page.get_by_role("alert").inner_text()
    assert page.evaluate("window.hacked") is None and page.locator("img[src=x]").count() == 0


def test_a_generation_can_be_stopped(visit, monkeypatch):
    watch = work.watch

    def slowly(runs):
        for due in watch(runs):
            time.sleep(0.5)
            yield due

    monkeypatch.setattr(work, "watch", slowly)
    page = visit()
    field(page, "prompt").fill("Once")
    page.locator("#complete").click()
    page.locator("#viewer .text .mask").first.wait_for()
    page.locator("#stop").click()
    page.get_by_text("Stopped after").wait_for()
    assert page.locator("#viewer .text .mask").count() > 0
    page.wait_for_function("() => !document.querySelector('#complete').disabled")


def test_a_mistake_is_one_line_and_the_page_goes_on(visit):
    page = visit()
    field(page, "steps").fill("-1")
    field(page, "steps").blur()
    generate(page, "complete")
    alert = page.get_by_role("alert").first
    assert alert.inner_text() == "steps=-1 must be an integer from 1 to 2147483647"
    field(page, "steps").fill("4")
    field(page, "steps").blur()
    generate(page, "complete")
    assert page.get_by_role("alert").count() == 0 and page.locator("#viewer .text span").count() == 17


def test_traces_are_downloaded(visit, tmp_path):
    page = visit()
    field(page, "prompt").fill("Once")
    generate(page, "complete")
    for kind, start in (("html", b"<!DOCTYPE html>"), ("gif", b"GIF89a")):
        with page.expect_download() as download:
            page.locator(f"#save-{kind}").click()
        path = tmp_path / kind
        download.value.save_as(path)
        assert path.read_bytes().startswith(start) and download.value.suggested_filename == f"denoising.{kind}"
