"""Draw how a model denoises a text, as an animated SVG file without scripts, for the first page of the documentation.

    python docs/draw_denoising.py docs/results/models/tinystories docs/images/denoising.svg

Browsers that are asked for less motion show the finished text.
"""

import sys
from html import escape
from pathlib import Path

import numpy as np

import diffusionlm as dlm
from diffusionlm.pretrained import terminal

PROMPT = "Once upon a time, there was a little"
SETTINGS = dlm.SamplingConfig(length=72, steps=36, strategy="low_confidence", block_length=24, temperature=0.0)
COLUMNS, CHARACTER, LINE = 66, 9.0, 24  # a line's characters; pixels of a character and of a line
SECONDS_PER_STEP, SECONDS_AT_THE_END = 0.28, 4.0
STYLE = """
text { font: 15px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre; }
.card { fill: #ffffff; stroke: #c8ccd1; } .given { fill: #57606a; } .new { fill: #14181d; } .mask { fill: #c3cad3; }
@media (prefers-color-scheme: dark) {
  .card { fill: #14181d; stroke: #3a424c; } .given { fill: #9aa5b1; } .new { fill: #f2f5f8; } .mask { fill: #566170; }
}
@media (prefers-reduced-motion: reduce) { .new, .mask { animation: none !important; } }
.mask { opacity: 0; }
"""


def main(checkpoint: str, output: str) -> None:
    """Generate with a trace, and write the drawing of it."""
    model = dlm.load(checkpoint, dtype="float32")
    completion = model.generate(PROMPT, SETTINGS, trace=True)[0]
    trace = completion.trace
    assert trace is not None, "it was asked for"
    revealed_N = np.argmax(~trace.masked, axis=0)  # the first frame in which a token stands
    pieces = terminal.single_texts(trace.tokens[-1], model.reader)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(drawing(list(zip(pieces, revealed_N.tolist(), strict=True)), len(trace.tokens) - 1))


def drawing(pieces: list[tuple[str, int]], steps: int) -> str:
    """Return the SVG of pieces of text with the steps that reveal them."""
    seconds = steps * SECONDS_PER_STEP + SECONDS_AT_THE_END
    rules, marks = [], []
    for step in range(1, steps + 1):
        shown = 100 * step * SECONDS_PER_STEP / seconds
        hidden = f"0%, {shown:.2f}% {{ opacity: 0 }}"
        visible = f"{shown + 0.01:.2f}%, 100% {{ opacity: 1 }}"
        rules += [
            f"@keyframes on{step} {{ {hidden} {visible} }}",
            f"@keyframes off{step} {{ {hidden.replace('0 }', '1 }')} {visible.replace('1 }', '0 }')} }}",
            f".n{step} {{ animation: on{step} {seconds:.2f}s infinite }}",
            f".m{step} {{ animation: off{step} {seconds:.2f}s infinite }}",
        ]
    column, line = 0, 0
    for text, step in [(PROMPT, 0), *pieces]:
        for word in words(text) if step == 0 else [text]:
            if column and column + len(word) > COLUMNS:
                column, line, word = 0, line + 1, word.lstrip(" ")
            x, y = 20 + column * CHARACTER, 36 + line * LINE
            place = f'y="{y}" textLength="{len(word) * CHARACTER:g}"'
            if step == 0:
                marks.append(f'<text class="given" x="{x:g}" {place}>{escape(word)}</text>')
            elif word.strip():
                width = max(len(word) * CHARACTER - 3, 5)
                marks.append(
                    f'<rect class="mask m{step}" x="{x:g}" y="{y - 12}" width="{width:g}" height="14" rx="3"/>'
                )
                marks.append(f'<text class="new n{step}" x="{x:g}" {place}>{escape(word)}</text>')
            column += len(word)
    width, height = round(40 + COLUMNS * CHARACTER), 36 + line * LINE + 26
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    title = "<title>A masked diffusion model fills in the masked tokens of a story, a few at a time</title>"
    card = f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>'
    return "\n".join([head, title, f"<style>{STYLE}{chr(10).join(rules)}</style>", card, *marks, "</svg>"]) + "\n"


def words(text: str) -> list[str]:
    """Return the words of a text, each with the space before it."""
    return [word if i == 0 else f" {word}" for i, word in enumerate(text.split(" "))]


if __name__ == "__main__":
    main(*sys.argv[1:])
