"""Animate a denoising in the terminal, with masks as dim blocks."""

import time
from collections.abc import Collection, Sequence

import numpy as np
from rich.cells import cell_len
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from diffusionlm.console import KEPT, Console
from diffusionlm.pretrained.completion import Draft, Reader
from diffusionlm.sampling.state import Trace
from diffusionlm.untrusted import printable

BLOCK = "░"
END = "⟨eos⟩"  # the mark of a token that ends a text
STILLS = 4  # frames that are printed where nothing can move
UNREADABLE = "\ufffd"  # the text that a tokenizer gives for a part of a character
LONGEST = 8  # tokens that are tried together for a whole character


def show(
    trace: Trace,
    tokenizer: Reader,
    *,
    ends: Collection[int] = (),
    prompt: str = "",
    seconds: float = 5.0,
    console: Console | None = None,
) -> None:
    """Play the trace of one row, or print a few stills where the output is not a terminal.

    Args:
      trace: tokens and masked, arrays (frames, length), as in `Completion.trace`.
      tokenizer: the model's tokenizer.
      ends: the ids that end a text; they are shown as a mark, and nothing is shown behind the first.
      prompt: shown before the new text.
      seconds: how long the animation takes.
      console: the output; None: stdout.
    """
    console = console or Console()
    last = len(trace.tokens) - 1
    tokens = tokens_to_come(trace)
    if not console.is_terminal:
        for i in sorted({round(last * still / STILLS) for still in range(STILLS + 1)}):
            console.print(f"step {i}/{last}", style="bold", highlight=False)
            console.print(frame(trace, i, token_texts(tokens[i], tokenizer, ends), prompt, ends), soft_wrap=True)
        return
    with Live(console=console, auto_refresh=False) as live:
        for i in range(last + 1):
            masked = int(trace.masked[i].sum())
            bar = ProgressBar(total=trace.masked[i].size, completed=trace.masked[i].size - masked, width=40)
            text = frame(trace, i, token_texts(tokens[i], tokenizer, ends), prompt, ends)
            live.update(Group(text, bar, Text(f"step {i}/{last}, {masked} masked")), refresh=True)
            time.sleep(seconds / (last + 1))


def frame(trace: Trace, index: int, pieces: list[str], prompt: str = "", ends: Collection[int] = ()) -> Text:
    """Return one state as styled text, without what is behind its end.

    A mask is as wide as the text it will become, so that no line moves.

    Args:
      trace: tokens and masked, arrays (frames, length).
      index: the frame.
      pieces: the text of each token of this frame, from `token_texts`; for a mask, the text of the token to come.
      prompt: shown before the new text.
      ends: the ids that end a text.
    """
    masked_N = trace.masked[index]
    fresh_N = ~masked_N & trace.masked[index - 1] if index else np.zeros_like(masked_N)
    shown = [n for n, behind in enumerate(behind_end(trace, index, ends)) if not behind]
    masked, fresh = masked_N[shown].tolist(), fresh_N[shown].tolist()
    return Text(printable(prompt, KEPT), style="bold").append_text(_styled([pieces[n] for n in shown], masked, fresh))


def behind_end(trace: Trace, index: int, ends: Collection[int]) -> list[bool]:
    """Tell which positions of a state are no text, because a generated token before them ends it.

    A text with gaps goes on at its next given token, and a given token ends nothing.
    """
    given_N = ~trace.masked[0]
    behind, ended = [], False
    for token, masked, given in zip(trace.tokens[index].tolist(), trace.masked[index], given_N, strict=True):
        ended = ended and not given
        behind.append(ended)
        ended = ended or (not masked and not given and token in ends)
    return behind


def draft_text(draft: Draft, before: Draft | None, tokenizer: Reader, ends: Collection[int], block: int = 0) -> Text:
    """Return a state of a completion as styled text, up to the end of its block in progress or of the text.

    Args:
      draft: the state.
      before: the state before it, to highlight what is new; None: nothing is.
      tokenizer: the model's tokenizer.
      ends: the ids that end a text.
      block: the tokens of a block; 0: all.
    """
    shown = len(draft.tokens)
    if block and any(draft.masked):
        shown = min(shown, (draft.masked.index(True) // block + 1) * block)
    shown = next((n for n in range(shown) if not draft.masked[n] and draft.tokens[n] in ends), shown)
    pieces = token_texts(np.array(draft.tokens[:shown], np.int32), tokenizer)
    fresh = [before is not None and before.masked[n] and not draft.masked[n] for n in range(shown)]
    return _styled(pieces, draft.masked, fresh)


def _styled(pieces: Sequence[str], masked: Sequence[bool], fresh: Sequence[bool]) -> Text:
    """Return tokens as text: blocks in place of masks, each as wide as its piece, and fresh tokens highlighted."""
    text = Text(style="not bold")
    for piece, is_masked, is_fresh in zip(pieces, masked, fresh, strict=False):
        shown = printable(piece, KEPT)
        if is_masked:
            breaks = "\n" * shown.count("\n")
            width = 1 if piece == END else max(1, cell_len(shown.replace("\n", "")))
            text.append(BLOCK * width + breaks, style="not bold dim")
        else:
            text.append(shown, style="not bold black on green" if is_fresh else "not bold")
    return text


def tokens_to_come(trace: Trace) -> np.ndarray:
    """Return the token at each position of each frame; for a mask, the next token to be there. (frames, length)."""
    tokens = np.array(trace.tokens)
    for i in range(len(tokens) - 2, -1, -1):
        tokens[i] = np.where(trace.masked[i], tokens[i + 1], tokens[i])
    return tokens


def token_texts(tokens_N: np.ndarray, tokenizer: Reader, ends: Collection[int] = ()) -> list[str]:
    """Return the text that each token adds, with its leading space, which a decoder drops at the start of a text.

    A character that several tokens share belongs to the first of them; what ends a text is a mark.
    """
    texts = single_texts(tokens_N, tokenizer)
    pieces = [END if token in ends else text for token, text in zip(tokens_N.tolist(), texts, strict=True)]
    for first, count, character in characters(tokens_N, tokenizer):
        pieces[first : first + count] = [character] + [""] * (count - 1)
    return pieces


def single_texts(tokens_N: np.ndarray, tokenizer: Reader) -> list[str]:
    """Return the text that each token adds by itself: `UNREADABLE` where it is only a part of a character."""
    texts = {token: tokenizer.decode([token], inside=True) for token in set(tokens_N.tolist())}
    return [texts[token] for token in tokens_N.tolist()]


def characters(tokens_N: np.ndarray, tokenizer: Reader) -> list[tuple[int, int, str]]:
    """Return the characters that several tokens share, as (first position, number of tokens, text)."""
    tokens = tokens_N.tolist()
    partial = [UNREADABLE in text for text in single_texts(tokens_N, tokenizer)]
    shared, n = [], 0
    while n < len(tokens):
        count = 1
        while partial[n] and count < LONGEST and n + count < len(tokens) and partial[n + count]:
            count += 1
            text = tokenizer.decode(tokens[n : n + count], inside=True)
            if UNREADABLE not in text:
                shared.append((n, count, text))
                break
        else:
            count = 1
        n += count
    return shared
