"""Denoising traces as an animated picture."""

import io
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusionlm.app import colours
from diffusionlm.pretrained import terminal
from diffusionlm.pretrained.completion import Reader
from diffusionlm.pretrained.webpage import Section
from diffusionlm.untrusted import printable

WIDTH, MARGIN = 560, 16  # pixels of a section and around it
SIZE = 16  # pixels of the letters
LINE = 26  # pixels from line to line
MOST_FRAMES = 64
SECONDS, PAUSE = 6.0, 2.0  # of the whole, and of its last frame
FONTS = ("DejaVuSansMono.ttf", "DejaVuSans.ttf", "Menlo.ttc", "consola.ttf")  # those that have the most characters
GREY = (110, 110, 110)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class _Box:
    """A piece of text in its place."""

    text: str
    x: int
    y: int
    width: int


def gif(sections: Sequence[Section], tokenizer: Reader, *, ends: Collection[int]) -> bytes:
    """Return traces, side by side, as an animated GIF.

    Args:
      sections: the traces; of one with many states some are left out.
      tokenizer: the model's tokenizer.
      ends: the ids that end a text; nothing is shown behind the first.
    """
    font = _font()
    panels = [_Panel(section, tokenizer, ends, font, i) for i, section in enumerate(sections)]
    last = max(panel.last for panel in panels)
    steps = sorted({round(last * i / (MOST_FRAMES - 1)) for i in range(MOST_FRAMES)})
    size = (len(panels) * (WIDTH + MARGIN) + MARGIN, max(panel.height for panel in panels) + MARGIN)
    frames = []
    for step in steps:
        picture = Image.new("RGB", size, colours.WHITE)
        draw = ImageDraw.Draw(picture)
        for panel in panels:
            panel.draw(draw, min(step, panel.last))
        frames.append(picture.quantize(palette=_palette(), dither=Image.Dither.NONE))
    duration = max(20, round(1000 * SECONDS / len(frames)))
    durations = [duration] * (len(frames) - 1) + [duration + round(1000 * PAUSE)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, disposal=1)
    return file.getvalue()


def _palette() -> Image.Image:
    """Return the colours of confidences and greys; with the same for all frames the file is small."""
    scale = [colours.colour(k / 95) for k in range(96)]
    greys = [(round(k * 255 / 31),) * 3 for k in range(32)]
    image = Image.new("P", (1, 1))
    image.putpalette([value for colour in [*scale, *greys] for value in colour])
    return image


class _Panel:
    """One trace: what is drawn where, in each of its states."""

    def __init__(self, section: Section, tokenizer: Reader, ends: Collection[int], font: Font, column: int):
        self.section, self.ends, self.font = section, ends, font
        self.left = MARGIN + column * (WIDTH + MARGIN)
        self.last = len(section.trace.tokens) - 1
        self.coming = terminal.tokens_to_come(section.trace)
        self.texts = [terminal.token_texts(np.asarray(tokens), tokenizer, ends) for tokens in self.coming]
        self.head = _boxes(_words(f"{section.title}: {section.note}"), font, self.left, MARGIN)
        self.top = self.head[-1].y + 2 * LINE
        self.prompt = _boxes(_words(section.before), font, self.left, self.top)
        self.height = max(self._place(step)[-1].y for step in (0, self.last)) + LINE

    def _place(self, step: int) -> list[_Box]:
        """Return the boxes of the prompt's words and of all tokens."""
        return _boxes([*_words(self.section.before), *self.texts[step]], self.font, self.left, self.top)

    def draw(self, draw: ImageDraw.ImageDraw, step: int) -> None:
        """Draw a state."""
        trace = self.section.trace
        for box in self.head:
            draw.text((box.x, box.y), box.text, font=self.font, fill=GREY)
        masked = int(trace.masked[step].sum())
        line = f"step {step} of {self.last}, {masked} masked"
        draw.text((self.left, self.head[-1].y + LINE), line, font=self.font, fill=GREY)
        boxes = self._place(step)
        n = len(boxes) - trace.tokens.shape[1]
        for box in boxes[:n]:
            draw.text((box.x, box.y), box.text, font=self.font, fill=colours.BLACK)
        behind = terminal.behind_end(trace, step, self.ends)
        for position, box in enumerate(boxes[n:]):
            if not behind[position]:
                self._draw_token(draw, box, step, position)

    def _draw_token(self, draw: ImageDraw.ImageDraw, box: _Box, step: int, position: int) -> None:
        trace = self.section.trace
        area = (box.x, box.y - 2, box.x + max(3, box.width) - 2, box.y + LINE - 6)
        if trace.masked[step, position]:
            draw.rectangle(area, outline=(190, 190, 190))
            for x in range(area[0], area[2], 5):  # stripes, which tell a mask from a token without colour
                draw.line((x, area[3], min(x + 8, area[2]), area[1]), fill=(190, 190, 190))
            return
        fill = colours.BLACK
        if not trace.masked[0, position]:
            pass  # given
        elif trace.tokens[step, position] in self.ends:
            draw.rectangle(area, outline=colours.BLACK)
        elif trace.confidence is not None and (confidence := float(trace.confidence[step, position])) > 0:
            draw.rectangle(area, fill=colours.colour(confidence))
            fill = colours.letters(confidence)
        if step and trace.masked[step - 1, position]:
            draw.rectangle(area, outline=colours.BLACK, width=2)
        draw.text((box.x, box.y), box.text, font=self.font, fill=fill)


def _boxes(texts: Sequence[str], font: Font, left: int, top: int) -> list[_Box]:
    """Place texts one after another in lines; a line break of a text ends its line."""
    x, y, boxes = left, top, []
    for text in texts:
        shown = printable(text.replace("\n", ""))
        width = round(font.getlength(shown))
        if x > left and x + width > left + WIDTH:
            x, y = left, y + LINE
        boxes.append(_Box(shown, x, y, width))
        x += width
        if "\n" in text:
            x, y = left, y + LINE * text.count("\n")
    return boxes or [_Box("", left, top, 0)]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\S\n]*[^\s]*\n?", text)[:-1] or []


def _font() -> Font:
    for name in FONTS:
        try:
            return ImageFont.truetype(name, SIZE)
        except OSError:
            continue
    return ImageFont.load_default(SIZE)
