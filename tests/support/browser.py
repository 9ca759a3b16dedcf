"""A headless browser for tests of pages."""

import contextlib
import shutil

import pytest

PATIENCE = 1_800_000  # milliseconds: a test ends when the page has done its work, however slow the machine is
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def chromium() -> str:
    """Return the path of a Chromium, or skip the test."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs a browser: install chromium")
    return found


@contextlib.contextmanager
def browser():
    """Start a headless Chromium that playwright drives."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="drives a browser: pip install playwright")
    path = chromium()
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield started
        finally:
            started.close()


def field(page, name: str):
    """Return the input of a component of the app by its id."""
    return page.locator(f"#{name}").locator("textarea, input").first


def generate(page, button: str) -> None:
    """Click a button that generates, and wait until it can be clicked again."""
    page.evaluate(
        """button => {
          const element = document.querySelector(`#${button}`);
          window.generated = false;
          new MutationObserver((_, observer) => {
            if (element.disabled) return;
            window.generated = true;
            observer.disconnect();
          }).observe(element, { attributes: true, attributeFilter: ["disabled"] });
        }""",
        button,
    )
    page.locator(f"#{button}").click()
    page.wait_for_function("() => window.generated")
