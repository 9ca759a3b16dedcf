"""The colours of confidences can be read by everyone: by their lightness alone, and with letters on them."""

import re
from importlib.resources import files

import pytest

from diffusionlm.app import colours

CONFIDENCES = [k / 200 for k in range(201)]


def linear(colour):
    """Return the light of an sRGB colour, by the definition of the sRGB standard (IEC 61966-2-1)."""
    return [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (c / 255 for c in colour)]


def luminance(colour):
    """Return the relative luminance as WCAG 2 defines it, which is also what a grey printer prints."""
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))


def contrast(a, b):
    """Return the contrast ratio of WCAG 2."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def grey_lightness(colour):
    """Return CIE L*, the lightness of the grey that a colour becomes."""
    y = luminance(colour)
    return 116 * y ** (1 / 3) - 16 if y > 216 / 24389 else y * 24389 / 27


def test_letters_have_the_contrast_that_wcag_asks_of_text():
    assert min(contrast(colours.colour(c), colours.letters(c)) for c in CONFIDENCES) >= 4.5


def test_in_grey_the_colours_rise_evenly_with_the_confidence():
    """The whole is at least 45 of the 100 steps of L*, and no tenth of it has less than half an even share."""
    lightness = [grey_lightness(colours.colour(k / 10)) for k in range(11)]
    rises = [b - a for a, b in zip(lightness, lightness[1:], strict=False)]
    assert sum(rises) > 45 and min(rises) > sum(rises) / 20


# The confusions of dichromats, in linear sRGB: Vienot, Brettel and Mollon (1999).
BLINDNESS = {
    "protanopia": ((0.11238, 0.88762, 0.0), (0.11238, 0.88762, 0.0), (0.00401, -0.00401, 1.0)),
    "deuteranopia": ((0.29275, 0.70725, 0.0), (0.29275, 0.70725, 0.0), (-0.02234, 0.02234, 1.0)),
}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_who_does_not_see_red_or_green_sees_the_colours_rise(kind):
    """Lightness rises from each tenth to the next also in the colours that dichromats see."""
    seen = [
        [
            max(0.0, sum(w * x for w, x in zip(row, linear(colours.colour(k / 10)), strict=True)))
            for row in BLINDNESS[kind]
        ]
        for k in range(11)
    ]
    light = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in seen]
    assert all(b > 1.05 * a for a, b in zip(light, light[1:], strict=False))


def test_the_numbers_are_those_of_the_style_sheet():
    style = files("diffusionlm.pretrained").joinpath("templates/denoising.css").read_text()
    assert re.search(r"--l: calc\(\.4 \+ \.52 \* var\(--c\)\)", style)
    assert (
        "oklch(var(--l) .11 calc(300 - 195 * var(--c)))" in style
        and f"(.{colours.LETTERS_TURN * 100:.0f} - var" in style
    )


def test_white_and_black_are_themselves():
    assert colours.oklab(1.0, 0.0, 0.0) == colours.WHITE and colours.oklab(0.0, 0.0, 0.0) == colours.BLACK
    assert colours.oklab(0.627955, 0.224863, 0.125846) == (255, 0, 0)  # sRGB's red, from the CSS Color 4 examples
