"""Generate, stop, talk and export, as a browser session asks for it. This module knows nothing of the page."""

import copy
import html
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusionlm.app import animation
from diffusionlm.app.runs import Run, infill_drafts, watch
from diffusionlm.app.settings import parse_pins
from diffusionlm.errors import UserError
from diffusionlm.pretrained import webpage
from diffusionlm.pretrained.conversation import Conversation
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.sampling.config import SamplingConfig

CHAT_TURN = tuple[str, str]  # a role and what it said
NAMES = ("A", "B")  # of two settings side by side


@dataclass(eq=False)
class Session:
    """Hold what belongs to one browser tab.

    Attributes:
      dialogue: the dialogue with the model, once it has begun.
      runs: the generations that are shown.
      stopped: whether the user wants the generation to end.
    """

    dialogue: Conversation | None = None
    runs: list[Run] = field(default_factory=list)
    stopped: bool = False


@dataclass(frozen=True)
class View:
    """Describe what the page shows at one moment.

    Attributes:
      runs: the generations, each with a state at least.
      turns: the dialogue, with the message that is being answered.
      message: said to the user.
      mistake: whether it says what the user has to do otherwise.
      stopped: whether the user ended the generation.
    """

    runs: Sequence[Run] = ()
    turns: Sequence[CHAT_TURN] | None = None
    message: str = ""
    mistake: bool = False
    stopped: bool = False

    def message_html(self) -> str:
        """Return the message as HTML."""
        role = "alert" if self.mistake else "status"
        return f'<p class="message {role}" role="{role}">{html.escape(self.message)}</p>' if self.message else ""


def turns_html(turns: Sequence[CHAT_TURN]) -> str:
    """Return a dialogue as HTML, in which all that was said is text."""
    names = {"user": "You", "assistant": "Model"}
    paragraphs = (f'<p class="turn {role}"><b>{names[role]}</b>{html.escape(text)}</p>' for role, text in turns)
    return f'<div class="turns" role="log" aria-label="Dialogue">{"".join(paragraphs)}</div>'


def complete(
    model: LoadedModel, session: Session, prompt: str, pins: str, settings: Sequence[SamplingConfig]
) -> Iterator[View]:
    """Continue a text; with several settings, once with each."""
    pinned = parse_pins(pins)
    runs = [
        Run(title, prompt, sampling, model.stream(prompt, sampling, raw=model.template is not None, pinned=pinned))
        for title, sampling in zip(_titles(settings), settings, strict=True)
    ]
    yield from _generate(session, runs)


def fill(model: LoadedModel, session: Session, text: str, settings: Sequence[SamplingConfig]) -> Iterator[View]:
    """Fill the gaps of a text; with several settings, once with each."""
    runs = [
        Run(title, "", sampling, iter(infill_drafts(model, text, sampling)))
        for title, sampling in zip(_titles(settings), settings, strict=True)
    ]
    yield from _generate(session, runs)


def talk(
    model: LoadedModel,
    session: Session,
    text: str | None,
    system: str,
    pins: str,
    settings: Sequence[SamplingConfig],
) -> Iterator[View]:
    """Answer a message, or the last one anew if there is no text; the answer of the first settings counts.

    A dialogue whose answer is stopped is what it was before.
    """
    pinned = parse_pins(pins)
    dialogue = session.dialogue or Conversation(model, settings[0])
    answered = [copy.copy(dialogue) for _ in settings]  # an answer changes its own, which the session gets at the end
    question = text if text is not None else dialogue.turns[-2].content if dialogue.turns else ""
    runs = []
    for title, sampling, conversation in zip(_titles(settings), settings, answered, strict=True):
        conversation.sampling, conversation.system = sampling, system or None
        stream = conversation.stream_again(pinned=pinned) if text is None else conversation.stream(text, pinned=pinned)
        runs.append(Run(title, f"{question}\n\n", conversation.sampling, stream))
    before = turns_of(dialogue)[: -2 if text is None else None]
    view = View()
    for view in _generate(session, runs):
        pending = [*before, ("user", question), ("assistant", runs[0].text)]
        yield replace(view, turns=turns_of(dialogue) if view.stopped else pending)
    if not view.stopped:
        session.dialogue = dialogue = answered[0]
        notes = [f"The oldest {dialogue.forgotten} turns no longer fit into the context."] if dialogue.forgotten else []
        notes += [] if runs[0].text.strip() else ["The answer is empty."]
        yield View(runs, turns_of(dialogue), " ".join(notes))


def turns_of(dialogue: Conversation | None) -> list[CHAT_TURN]:
    """Return what the user and the model said."""
    return [(turn.role, turn.content) for turn in dialogue.turns] if dialogue else []


def export(model: LoadedModel, session: Session, kind: str, directory: Path) -> Path:
    """Write the traces that are shown to a file of its own, of the kind "html" or "gif".

    Raises:
      UserError: nothing has been generated yet.
    """
    runs = [run for run in session.runs if run.states]
    if not runs:
        raise UserError("there is no trace to save yet; generate a text first")
    sections, ends = [run.section() for run in runs], model.config.eos_ids
    if kind == "html":
        content = webpage.page(sections, model.reader, ends=ends, beside=True).encode("ascii", "xmlcharrefreplace")
    else:
        content = animation.gif(sections, model.reader, ends=ends)
    path = Path(tempfile.mkdtemp(dir=directory)) / f"denoising.{kind}"
    path.write_bytes(content)
    return path


def page_data(model: LoadedModel, runs: Sequence[Run]) -> dict[str, Any] | None:
    """Return what the player shows of runs; None: nothing yet."""
    if not runs or not all(run.states for run in runs):
        return None
    sections = [run.section() for run in runs]
    return webpage.page_data(sections, model.reader, ends=model.config.eos_ids, beside=True)


def _generate(session: Session, runs: list[Run]) -> Iterator[View]:
    session.runs = runs
    for due in watch(runs):
        if session.stopped:
            steps = max(run.states[-1].step for run in runs if run.states)
            yield View(runs, message=f"Stopped after {steps} steps.", stopped=True)
            return
        if due:
            yield View(runs, message=f"Denoising: step {max(run.states[-1].step for run in runs)}")
    yield View(runs)


def _titles(settings: Sequence[SamplingConfig]) -> Sequence[str]:
    return ("Denoising",) if len(settings) == 1 else [f"Settings {name}" for name in NAMES[: len(settings)]]


def one_line(error: UserError) -> str:
    """Return the text of a mistake as one line."""
    return " ".join(str(error).split())
