"""Take pictures of the app: `python docs/screenshot_app.py CHECKPOINT OUTPUT.png [--chat TEXT] [--width 390] ...`.

With several widths or themes the pictures have them in their names. Needs the extra `app`, playwright and a Chromium.
"""

import argparse
import itertools
import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from diffusionlm.app import server
from diffusionlm.pretrained.loading import load


def main() -> None:
    """Read the command line, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("output", type=Path)
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--chat", help="a message, instead of a prompt")
    parser.add_argument("--gaps", help="a text with gaps, instead of a prompt")
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--width", type=int, nargs="+", default=[1280])
    parser.add_argument("--theme", nargs="+", default=["light"])
    parser.add_argument("--step", type=int, help="the step to show; without it the last")
    args = parser.parse_args()
    model = load(args.checkpoint)
    with server.workplace() as directory, sync_playwright() as playwright:
        port = server.find_port("127.0.0.1", None)
        blocks = server.start(model, {"length": args.length}, "127.0.0.1", port, directory)
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        combinations = list(itertools.product(args.width, args.theme))
        for width, theme in combinations:
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.set_default_timeout(600_000)
            page.goto(f"{blocks.local_url}?__theme={theme}")
            _generate(page, args)
            name = args.output.stem + (f"_{width}_{theme}" if len(combinations) > 1 else "")
            page.screenshot(path=args.output.with_stem(name), full_page=True)
            page.close()
        browser.close()
        blocks.close(verbose=False)


def _generate(page: Page, args: argparse.Namespace) -> None:
    """Let the app do what the arguments say."""
    ways = {
        "send": ("Chat", "chat-text", args.chat),
        "fill": ("Fill in", "gaps", args.gaps),
        "complete": ("Continue", "prompt", args.prompt),
    }
    button, (tab, field, text) = next((name, way) for name, way in ways.items() if way[2])
    page.get_by_role("tab", name=tab).click()
    page.locator(f"#{field} textarea").fill(text)
    if args.compare:
        page.locator("#compare input").check()
    page.locator(f"#{button}").click()
    page.wait_for_function("b => document.querySelector(`#${b}`).disabled", arg=button)
    page.wait_for_function("b => !document.querySelector(`#${b}`).disabled", arg=button)
    if args.step is not None:
        slider = page.locator("#viewer #step")
        slider.fill(str(args.step))
    page.wait_for_timeout(500)


if __name__ == "__main__":
    main()
