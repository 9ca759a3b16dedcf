"""Denoising traces as one web page that moves: it needs no network, no library and no server."""

import html
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusionlm.data.tokenizers import Tokenizer
from diffusionlm.errors import UserError
from diffusionlm.pretrained import terminal as display
from diffusionlm.pretrained.completion import Completion
from diffusionlm.sampling.state import Trace


def save_page(completions: Sequence[Completion], tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """Writes an animated page of the completions' traces, one section each; the file is there whole or not at all.

    Args:
      completions: generated with `trace=True`.
      tokenizer: of the model.
      path: of the page; its directory must exist, and a file that is there is replaced.

    Raises:
      UserError: no completions, one without a trace, or a path that cannot be written.
    """
    if not completions:
        raise UserError("no completions to show; give at least one")
    if any(completion.trace is None for completion in completions):
        raise UserError("a completion has no trace to show; generate with trace=True")
    check_page_path(path)
    content = _page(completions, tokenizer).encode("ascii", "xmlcharrefreplace")
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".diffusionlm-{os.getpid()}.tmp")  # beside it: a move between disks is a copy
    try:
        temporary.write_bytes(content)
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write html={str(path)!r}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_page_path(path: str | os.PathLike) -> None:
    """Raises `UserError` where `save_page` could not write, to be asked before the work of generating."""
    directory = os.path.dirname(os.path.realpath(path))
    if not os.path.basename(path) or (os.path.exists(path) and not os.path.isfile(path)):
        raise UserError(f"html={str(path)!r} is not a file; name one, such as trace.html")
    if not os.path.isdir(directory):
        raise UserError(f"html={str(path)!r}: the directory {directory!r} does not exist; make it first")
    if not os.access(directory, os.W_OK):
        raise UserError(f"html={str(path)!r}: the directory {directory!r} cannot be written to; choose another")


def events(trace: Trace) -> list[list[list]]:
    """What each step of one row's trace changes: [position, id, confidence] of a reveal, [position] of a new mask.

    The confidence has three digits; it is None where it is not known, and for the end of text that fills up a row.

    Args:
      trace: arrays (frames, length), as in `Completion.trace`.
    """
    steps = []
    for i in range(1, len(trace.tokens)):
        masked_N, tokens_N = trace.masked[i], trace.tokens[i]
        changed_N = (masked_N != trace.masked[i - 1]) | (~masked_N & (tokens_N != trace.tokens[i - 1]))
        steps.append(
            [
                [n] if masked_N[n] else [n, int(tokens_N[n]), _confidence(trace, i, n)]
                for n in np.flatnonzero(changed_N).tolist()
            ]
        )
    return steps


def _confidence(trace: Trace, frame: int, position: int) -> float | None:
    if trace.confidence is None or trace.confidence[frame, position] == 0:
        return None
    return round(float(trace.confidence[frame, position]), 3)


def _section(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    trace = completion.trace
    given = [-1 if masked else token for token, masked in zip(trace.tokens[0].tolist(), trace.masked[0], strict=True)]
    return {
        "prompt": completion.before,
        "nfe": completion.nfe,
        "seconds": round(completion.seconds, 2),
        "given": given,  # ids, -1 where a position starts as a mask
        "steps": events(trace),
        "characters": display.characters(trace.tokens[-1], tokenizer),
    }


def _page(completions: Sequence[Completion], tokenizer: Tokenizer) -> str:
    ids = np.unique(np.concatenate([c.trace.tokens[~c.trace.masked] for c in completions]))
    data = {
        "texts": dict(zip(ids.tolist(), display.single_texts(ids, tokenizer), strict=True)),
        "sections": [_section(completion, tokenizer) for completion in completions],
    }
    # No text of a token can end the script element: in JSON, a `<` may as well be written by its number.
    payload = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    # The texts themselves are for readers without scripts; the script puts the moving ones in their place.
    sections = "\n".join(
        f'<section aria-label="Text {i}">\n<h2>Text {i} <small></small></h2>\n'
        f'<p class="text">{html.escape(completion.full_text)}</p>\n</section>'
        for i, completion in enumerate(completions, start=1)
    )
    swatches = "".join(f'<i class="on" style="--c:{k / 10}"></i>' for k in range(11))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>Denoising trace</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>Denoising trace</h1>
<div class="controls" role="group" aria-label="Playback">
<button id="play" type="button">Play</button>
<label>Step <input id="step" type="range" min="0" value="0"></label> <output id="shown" for="step"></output>
<label>Speed <select id="speed"><option value="0.25">0.25&times;</option><option value="0.5">0.5&times;</option>
<option value="1" selected>1&times;</option><option value="2">2&times;</option><option value="4">4&times;</option>
</select></label>
</div>
<p class="legend">
<span>confidence when revealed: 0
<span role="img" aria-label="colours from dark violet to light yellow">{swatches}</span> 1</span>
<span><span class="mask" aria-hidden="true">mask</span> masked</span>
<span><span class="on fresh" style="--c:.8">new</span> revealed in this step</span>
<span><span class="mask back" aria-hidden="true">mask</span> taken back in this step</span>
<span><kbd>space</kbd> plays and pauses, <kbd>&larr;</kbd> <kbd>&rarr;</kbd> step</span>
</p>
{sections}
<script type="application/json" id="data">{payload}</script>
<script>{_SCRIPT}</script>
</body>
</html>
"""


# Lightness rises evenly with the confidence in a perceptual colour space, from dark violet to light yellow, and the
# letters are white or black by it, so that the scale reads the same on a light and on a dark page. A mask is the text
# to come with transparent letters: exactly as wide in any font, so that no line moves when it is revealed.
_STYLE = """
:root { color-scheme: light dark; --veil: color-mix(in oklab, CanvasText 24%, Canvas); }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto; padding: 0 1rem;
  background: Canvas; color: CanvasText; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin: 1.5rem 0 .3rem; } small { font-weight: normal; }
.controls { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .4rem 1rem;
  align-items: center; padding: .5rem 0; background: Canvas; border-bottom: 1px solid var(--veil); }
.controls label { display: flex; align-items: center; gap: .4rem; }
.controls button { min-width: 5rem; } .controls button, .controls select { font: inherit; }
#step { width: 16rem; } #shown { min-width: 7rem; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.5rem; font-size: .85rem; }
.legend i { display: inline-block; width: .9em; height: .9em; vertical-align: -.1em; }
.text { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.8;
  font-family: ui-monospace, monospace; }
.prompt { font-weight: bold; }
.on { --l: calc(.4 + .52 * var(--c)); color: oklch(clamp(0, (.56 - var(--l)) * 1e6, 1) 0 0);
  background: oklch(var(--l) .11 calc(300 - 195 * var(--c))); }
.on, .mask { box-shadow: inset 1px 0 Canvas; }
.unknown { border-bottom: 2px solid var(--veil); }
.mask { color: transparent; background: var(--veil); forced-color-adjust: none; user-select: none; }
.fresh { outline: 2px solid CanvasText; } .back { outline: 2px dashed CanvasText; }
.empty { display: inline-block; width: .4ch; height: 1.1em; vertical-align: -.2em; margin-right: 1px; }
@media (prefers-reduced-motion: no-preference) {
  .fresh { animation: appear .3s; } @keyframes appear { from { opacity: .2; } }
}
"""

_SCRIPT = """
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const [play, slider, shown, speed] = ["play", "step", "shown", "speed"].map((id) => document.getElementById(id));
const last = Math.max(...data.sections.map((section) => section.steps.length));
const SECONDS = 6;  // of the whole, at speed 1

// One section: its `show(step)` changes only what differs from what is on the page.
function view(section, element) {
  const text = element.querySelector(".text"), status = element.querySelector("small");
  const history = section.given.map((id) => (id < 0 ? [] : [[0, id, null]]));  // [step, id, confidence]; -1: masked
  section.steps.forEach((events, i) =>
    events.forEach(([position, id = -1, confidence = null]) => history[position].push([i + 1, id, confidence])));
  const whole = new Map();  // position -> [the step from which a character of several tokens is whole, its part]
  for (const [first, count, character] of section.characters) {
    const from = Math.max(...history.slice(first, first + count).map((states) => states.at(-1)[0]));
    for (let i = 0; i < count; i++) whole.set(first + i, [from, i ? "" : character]);
  }
  const prompt = document.createElement("span");
  prompt.className = "prompt";
  prompt.textContent = section.prompt;
  const spans = history.map(() => document.createElement("span"));
  const drawn = history.map(() => "");
  text.replaceChildren(prompt, ...spans);

  function draw(position, step) {
    const states = history[position], span = spans[position];
    const at = states.findLastIndex(([since]) => since <= step);
    const [since, id, confidence] = at < 0 ? [0, -1, null] : states[at];
    const joined = whole.has(position) && step >= whole.get(position)[0];
    const now = since === step && step > 0;
    if (drawn[position] === `${at} ${joined} ${now}`) return;
    drawn[position] = `${at} ${joined} ${now}`;
    const masked = id < 0, given = since === 0 && !masked;
    const token = data.texts[masked ? states[at + 1][1] : id];
    const visible = joined ? whole.get(position)[1] : token;
    span.textContent = given ? visible : visible.replaceAll("\\n", "\\u21b5\\n");
    const names = [];
    if (masked) names.push("mask", now ? "back" : "");
    else if (!given) names.push(confidence === null ? "unknown" : "on", now ? "fresh" : "");
    if (!given && !visible && !joined) names.push("empty");
    span.className = names.join(" ").trim();
    span.style.setProperty("--c", confidence ?? 0);
    if (masked) span.setAttribute("aria-hidden", "true"); else span.removeAttribute("aria-hidden");
    const sure = confidence === null ? "" : `, confidence ${confidence.toFixed(3)}`;
    if (masked) span.title = since ? `masked again in step ${since}` : "masked";
    else span.title = `${JSON.stringify(token)} (id ${id}), ` + (given ? "given" : `revealed in step ${since}${sure}`);
  }

  return (step) => {
    spans.forEach((_, position) => draw(position, step));
    const left = spans.filter((span) => span.classList.contains("mask")).length;
    const own = section.steps.length;  // other texts may take longer
    status.textContent =
      `step ${Math.min(step, own)} of ${own}, ${left} masked; ` +
      `${section.nfe} forward passes, its batch took ${section.seconds} s`;
  };
}

const elements = document.querySelectorAll("section");
const views = data.sections.map((section, i) => view(section, elements[i]));
let step = 0, timer = null;

function show(to) {
  step = Math.max(0, Math.min(last, to));
  views.forEach((one) => one(step));
  slider.value = step;
  shown.textContent = `${step} of ${last}`;
  slider.setAttribute("aria-valuetext", `step ${shown.textContent}`);
}

function pause() {
  clearTimeout(timer);
  timer = null;
  play.textContent = "Play";
}

function tick() {
  if (step >= last) return pause();
  timer = setTimeout(() => { show(step + 1); tick(); }, (SECONDS * 1000) / last / Number(speed.value));
}

function toggle() {
  if (timer !== null) return pause();
  if (step >= last) show(0);
  play.textContent = "Pause";
  tick();
}

play.addEventListener("click", toggle);
slider.addEventListener("input", () => { pause(); show(Number(slider.value)); });
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target === speed) return;
  const to = { ArrowLeft: step - 1, ArrowRight: step + 1, Home: 0, End: last }[event.key];
  if (to !== undefined) {
    pause();
    show(to);
  } else if (event.key === " " && event.target !== play) {  // the button does it by itself
    toggle();
  } else {
    return;
  }
  event.preventDefault();
});

slider.max = last;
if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
  show(last);
} else {
  show(0);
  toggle();
}
"""
