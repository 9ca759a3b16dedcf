"""The colours of confidences, as the style sheet of the web page has them, for pictures.

They are computed in OKLab (Ottosson 2020), in which equal distances look equal.
"""

import math

Colour = tuple[int, int, int]  # sRGB, 0 to 255
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
LETTERS_TURN = 0.56  # the lightness below which letters are white


def lightness(confidence: float) -> float:
    """Return the lightness of a confidence; it rises evenly."""
    return 0.4 + 0.52 * confidence


def colour(confidence: float) -> Colour:
    """Return the colour of a confidence from 0, dark violet, to 1, light yellow."""
    hue = math.radians(300 - 195 * confidence)
    return oklab(lightness(confidence), 0.11 * math.cos(hue), 0.11 * math.sin(hue))


def letters(confidence: float) -> Colour:
    """Return the colour of letters on that of a confidence."""
    return WHITE if lightness(confidence) < LETTERS_TURN else BLACK


def oklab(lightness: float, a: float, b: float) -> Colour:
    """Return a colour of OKLab in sRGB."""
    long, medium, short = (
        (lightness + x * a + y * b) ** 3
        for x, y in ((0.3963377774, 0.2158037573), (-0.1055613458, -0.0638541728), (-0.0894841775, -1.2914855480))
    )
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    red, green, blue = (round(255 * _gamma(min(1.0, max(0.0, x)))) for x in linear)
    return red, green, blue


def _gamma(x: float) -> float:
    return 12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055
