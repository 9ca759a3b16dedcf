"""The notation of gaps in a text: `{mask:8}` stands for 8 tokens, `{mask:3-8}` for 3 to 8 of them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffusionlm.errors import UserError
from diffusionlm.sampling.canvas import Span
from diffusionlm.sampling.canvas import Template as Row

_GAP = re.compile(r"\{mask:([0-9]{1,9})(?:-([0-9]{1,9}))?\}")
# Matches what is meant as a gap, so that a slip of the pen is not taken for text.
_LIKE_A_GAP = re.compile(r"\{\s*mask\b[^{}]{0,20}\}?", re.IGNORECASE)


@dataclass(frozen=True)
class GappedText:
    """A text with gaps: its given parts with their ids, and the gaps between them."""

    pieces: Sequence[tuple[str, list[int]] | Span]

    @property
    def template(self) -> Row:
        """The row to fill."""
        row: list[int | None | Span] = []
        for piece in self.pieces:
            row += [piece] if isinstance(piece, Span) else piece[1]
        return row

    @property
    def lengths(self) -> list[int]:
        """The least tokens of each gap."""
        return [piece.least for piece in self.pieces if isinstance(piece, Span)]

    def filled(self, row: Sequence[int], lengths: Sequence[int], decode: Callable[[Sequence[int], bool], str]) -> str:
        """Return the text with its gaps filled: what was given as it was given, and between it what was generated.

        Args:
          row: the filled row.
          lengths: the tokens of each gap.
          decode: returns the text of ids; True: they continue a text.
        """
        remaining, place, text = iter(lengths), 0, ""
        for piece in self.pieces:
            if isinstance(piece, Span):
                end = place + next(remaining)
                text += decode(row[place:end], text != "")
                place = end
            else:
                text += piece[0]
                place += len(piece[1])
        return text


def split_at_gaps(text: str, most: int) -> list[str | Span]:
    """Split a text into its gaps and the texts around them, which are in turn and may be empty.

    Args:
      text: the text; it begins and ends with a text in the result.
      most: the most tokens that a gap may have.

    Raises:
      UserError: the text has no gap, or a malformed one.
    """
    parts: list[str | Span] = []
    end = 0
    for match in _LIKE_A_GAP.finditer(text):
        gap = _GAP.match(text, match.start())
        span = Span(int(gap[1]), int(gap[2] or gap[1])) if gap else Span(0, 0)
        if gap is None or not 1 <= span.least <= span.most <= most:
            raise UserError(
                f"{match[0]!r} is not a gap; write {{mask:N}} without spaces, for N tokens, or {{mask:N-M}} for N "
                f"to M, from 1 to {most}"
            )
        parts += [text[end : match.start()], span]
        end = gap.end()
    if not parts:
        raise UserError(f"{text!r} has no gap; write {{mask:8}} where 8 tokens are wanted")
    return [*parts, text[end:]]
