"""The page: its fields and buttons, and what they do. The work is in `diffusionlm.app.session`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]

from diffusionlm.app import session as work
from diffusionlm.app.session import Session, View
from diffusionlm.app.settings import SHOWN, first_settings, other_settings, strategies, with_shown
from diffusionlm.errors import UserError
from diffusionlm.pretrained.conversation import Conversation
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.pretrained.webpage import player
from diffusionlm.sampling.config import SamplingConfig

# The tokens show the progress; what Gradio would add moves all the time, and costs more than the tokens.
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "hidden"}
STYLE = """
.dark .denoising { color-scheme: dark; } body:not(.dark) .denoising { color-scheme: light; }
.denoising { padding: .5rem 1rem 1rem; border-radius: 8px; }
.denoising:has(.sections:empty) { display: none; }
#turns { max-height: 24rem; overflow-y: auto; }
.turns { display: flex; flex-direction: column; gap: .5rem; } .turn b { display: block; }
.turns:empty::before { content: "No messages yet."; opacity: .7; }
.turn { margin: 0; padding: .5rem .8rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--background-fill-secondary); color: var(--body-text-color); }
.turn.user { margin-left: 2rem; } .turn.assistant { margin-right: 2rem; }
@media (max-width: 768px) {  /* what is generated is below the buttons, and the settings are last */
  #left { display: contents; } #left > * { flex: 1 1 100%; } #output { order: 1; } #settings { order: 2; }
}
.message { margin: 0; padding: .5rem .8rem; border-radius: 6px; overflow-wrap: anywhere; }
.message.status { background: #e6eefc; color: #10274f; } .dark .message.status { background: #10274f; color: #e6eefc; }
.message.alert { background: #fde8e8; color: #6b1010; border-left: 4px solid currentColor; }
.dark .message.alert { background: #4d1414; color: #fde8e8; }
"""
START_PLAYER = """
const player = denoisingPlayer(element);
const show = () => { if (props.value) player.load(props.value); };
watch("value", show);
show();
"""
DOWNLOAD = "() => setTimeout(() => document.querySelector('#file').click(), 100)"
PINS = "Positions in tokens, from 0, and words: 0: Once, 5: upon"


@dataclass(frozen=True)
class _Settings:
    """The components with the settings of a generation."""

    pins: gr.Textbox
    first: list[Any]
    second: list[Any]
    compare: gr.Checkbox

    @property
    def shown(self) -> list[Any]:
        """The components whose values `Page._settings` reads, in its order."""
        return [self.compare, *self.first, *self.second]


@dataclass(frozen=True)
class _Output:
    """The components that a `View` fills."""

    viewer: gr.HTML
    texts: list[gr.Textbox]
    message: gr.HTML

    @property
    def views(self) -> list[Any]:
        """The components that the values of `Page._filled` are for, in its order."""
        return [self.viewer, *self.texts, self.message]


@dataclass(frozen=True)
class _Parts:
    """The components that several events share."""

    session: gr.State
    settings: _Settings
    output: _Output


@dataclass(frozen=True)
class _ChatParts:
    """The components of dialogues."""

    turns: gr.HTML
    text: gr.Textbox
    system: gr.Textbox


class Page:
    """The page of a model.

    Args:
      model: the model.
      given: the settings that the user gave, by name; they replace those that the page begins with.
      directory: for files to download.
    """

    def __init__(self, model: LoadedModel, given: dict[str, Any], directory: Path):
        self.model, self.directory = model, directory
        self.base = first_settings(model.config, model.has_chat_template, given)
        model.sampling_config(self.base)

    def build(self) -> gr.Blocks:
        """Return the page."""
        with gr.Blocks(title="diffusionlm", analytics_enabled=False) as blocks:
            gr.Markdown(f"## diffusionlm\n{self._describe()}", elem_id="about")
            session = gr.State(Session())
            with gr.Row():
                with gr.Column(min_width=300, scale=2, elem_id="left"):
                    with gr.Tabs(selected="chat" if self.model.has_chat_template else "complete"):
                        prompt, complete = self._complete_tab()
                        chat = self._chat_tab()
                        gaps, fill = self._fill_tab()
                    gr.Button("Stop", variant="stop", size="md", elem_id="stop").click(_stop, session, queue=False)
                    settings = self._settings_column()
                with gr.Column(min_width=300, scale=3, elem_id="output"):
                    parts = _Parts(session, settings, self._output(session))
            buttons = [complete, fill, *(chat[1] if chat else [])]
            self._generating(parts, complete, [prompt, settings.pins], self._complete, buttons)
            self._generating(parts, fill, [gaps], self._fill, buttons)
            if chat is not None:
                self._chat_events(parts, *chat, buttons)
        return blocks

    def _describe(self) -> str:
        kind = "autoregressive" if self.model.config.autoregressive else "masked diffusion"
        return f"A {kind} model with a context of {self.model.config.max_length} tokens."

    def _complete_tab(self) -> tuple[gr.Textbox, gr.Button]:
        with gr.Tab("Continue", id="complete"):
            prompt = gr.Textbox(label="Prompt", lines=3, value="", placeholder="Once upon a time", elem_id="prompt")
            button = gr.Button("Generate", variant="primary", elem_id="complete")
        return prompt, button

    def _fill_tab(self) -> tuple[gr.Textbox, gr.Button]:
        with gr.Tab("Fill in", id="fill"):
            gaps = gr.Textbox(
                label="Text with gaps",
                lines=3,
                elem_id="gaps",
                placeholder="Tom was sad.{mask:8} Then he was happy.",
                info="{mask:8} is 8 tokens, {mask:3-8} 3 to 8 of them; all other words stay. "
                "Most tokenizers want no space before a gap.",
            )
            button = gr.Button("Fill the gaps", variant="primary", elem_id="fill")
        return gaps, button

    def _chat_tab(self) -> tuple[_ChatParts, list[gr.Button]] | None:
        with gr.Tab("Chat", id="chat"):
            try:
                Conversation(self.model, self.base)
            except UserError as error:
                gr.HTML(View(message=work.one_line(error)).message_html(), elem_id="no-chat")
                return None
            turns = gr.HTML(work.turns_html([]), elem_id="turns", apply_default_css=False, autoscroll=True)
            text = gr.Textbox(label="Message", lines=2, elem_id="chat-text")
            with gr.Row():
                buttons = [
                    gr.Button("Send", variant="primary", size="md", min_width=80, elem_id="send"),
                    gr.Button("Answer again", size="md", min_width=80, elem_id="again"),
                    gr.Button("New dialogue", size="md", min_width=80, elem_id="reset"),
                ]
            system = gr.Textbox(label="System message", lines=1, elem_id="system")
        return _ChatParts(turns, text, system), buttons

    def _settings_column(self) -> _Settings:
        with gr.Column(elem_id="settings"):
            first = self._fields("", self.base)
            pins = gr.Textbox(label="Pinned words of a new text", info=PINS, elem_id="pins")
            compare = gr.Checkbox(label="Compare with other settings, side by side", elem_id="compare")
            with gr.Group(visible=False) as group:
                second = self._fields("other-", other_settings(self.model.config, self.base))
        compare.change(lambda on: gr.update(visible=on), compare, group, queue=False)
        return _Settings(pins, first, second, compare)

    def _fields(self, prefix: str, values: SamplingConfig) -> list[Any]:
        """Return a field for each of `SHOWN`."""
        other = "Other " if prefix else ""
        info = {"steps": "0: one a token", "block_length": "0: one block", "temperature": "0: greedy"}
        fields: list[Any] = []
        with gr.Row():
            for name in SHOWN:
                label, elem_id = (other + name.replace("_", " ")).capitalize(), f"{prefix}{name}"
                if name == "strategy":
                    names, value = strategies(self.model.config), values.strategy
                    fields.append(gr.Dropdown(names, value=value, label=label, elem_id=elem_id, min_width=220))
                else:
                    value = getattr(values, name)
                    fields.append(gr.Number(value, label=label, info=info.get(name), elem_id=elem_id, min_width=140))
        return fields

    def _output(self, session: gr.State) -> _Output:
        message = gr.HTML("", elem_id="message", apply_default_css=False)
        pieces = player()
        viewer = gr.HTML(
            None,
            html_template=f'<div class="denoising">{pieces["controls"]}<div class="sections"></div></div>',
            js_on_load=pieces["script"] + START_PLAYER,
            apply_default_css=False,
            elem_id="viewer",
        )
        texts = [
            gr.Textbox(label="Text", lines=4, interactive=False, buttons=["copy"], elem_id="text"),
            gr.Textbox(
                label="Text of the other settings", lines=4, visible=False, buttons=["copy"], elem_id="other-text"
            ),
        ]
        with gr.Row():
            html, gif = (
                gr.Button(f"Save as {kind}", size="sm", min_width=120, elem_id=f"save-{kind.lower()}")
                for kind in ("HTML", "GIF")
            )
        file = gr.DownloadButton("File", visible="hidden", elem_id="file")
        for kind, button in (("html", html), ("gif", gif)):
            saved = button.click(self._exporting(kind), session, [file, message])
            saved.success(lambda: None, None, None, js=DOWNLOAD, queue=False)
        return _Output(viewer, texts, message)

    def _generating(
        self, parts: _Parts, button: gr.Button, inputs: list[Any], generate: Callable, buttons: list[gr.Button]
    ) -> None:
        """Let a button generate; meanwhile nothing else can be generated in the same tab."""
        began = button.click(_begin(buttons), parts.session, [parts.output.message, *buttons], queue=False)
        done = began.then(
            generate, [parts.session, *inputs, *parts.settings.shown], parts.output.views, **ONE_AT_A_TIME
        )
        done.then(_end(buttons), None, buttons, queue=False)

    def _chat_events(self, parts: _Parts, chat: _ChatParts, own: list[gr.Button], buttons: list[gr.Button]) -> None:
        outputs = [chat.turns, chat.text, *parts.output.views]
        for button, function in ((own[0], self._send), (own[1], self._again)):
            began = button.click(_begin(buttons), parts.session, [parts.output.message, *buttons], queue=False)
            inputs = [parts.session, chat.text, chat.system, parts.settings.pins, *parts.settings.shown]
            done = began.then(function, inputs, outputs, **ONE_AT_A_TIME)
            done.then(_end(buttons), None, buttons, queue=False)
        own[2].click(_reset, parts.session, [chat.turns, parts.output.message], queue=False)

    def _complete(self, session: Session, prompt: str, pins: str, *shown: Any) -> Iterator[list[Any]]:
        yield from self._shown(lambda: work.complete(self.model, session, prompt, pins, self._settings(shown)))

    def _fill(self, session: Session, text: str, *shown: Any) -> Iterator[list[Any]]:
        yield from self._shown(lambda: work.fill(self.model, session, text, self._settings(shown)))

    def _send(self, session: Session, text: str, system: str, pins: str, *shown: Any) -> Iterator[list[Any]]:
        yield from self._talk(session, text, text, system, pins, shown)

    def _again(self, session: Session, text: str, system: str, pins: str, *shown: Any) -> Iterator[list[Any]]:
        yield from self._talk(session, None, text, system, pins, shown)

    def _talk(
        self, session: Session, text: str | None, kept: str, system: str, pins: str, shown: Sequence[Any]
    ) -> Iterator[list[Any]]:
        """Answer, and empty the field of the message unless the answer fails or is stopped."""

        def views() -> Iterator[View]:
            yield from work.talk(self.model, session, text, system, pins, self._settings(shown))

        for view in _with_mistakes(views):
            turns = view.turns if view.turns is not None else work.turns_of(session.dialogue)
            refused = text is None or view.mistake or view.stopped
            yield [work.turns_html(turns), kept if refused else "", *self._filled(view)]

    def _settings(self, shown: Sequence[Any]) -> list[SamplingConfig]:
        compare, *values = shown
        n = len(SHOWN)
        return [with_shown(self.base, values[i : i + n]) for i in (range(0, 2 * n, n) if compare else [0])]

    def _shown(self, generate: Callable[[], Iterator[View]]) -> Iterator[list[Any]]:
        for view in _with_mistakes(generate):
            yield self._filled(view)

    def _filled(self, view: View) -> list[Any]:
        """Return values for `_Output.views`; without runs, what is shown stays."""
        data = work.page_data(self.model, view.runs)
        if data is None:
            return [gr.skip(), gr.skip(), gr.skip(), view.message_html()]
        other = gr.update(value=view.runs[1].text, visible=True) if len(view.runs) > 1 else gr.update(visible=False)
        return [data, view.runs[0].text, other, view.message_html()]

    def _exporting(self, kind: str) -> Callable[[Session], list[Any]]:
        def save(session: Session) -> list[Any]:
            try:
                return [str(work.export(self.model, session, kind, self.directory)), ""]
            except UserError as error:
                raise gr.Error(work.one_line(error), print_exception=False) from error

        return save


def _with_mistakes(generate: Callable[[], Iterator[View]]) -> Iterator[View]:
    """Yield views; a user's mistake is the last of them."""
    try:
        yield from generate()
    except UserError as error:
        yield View(message=work.one_line(error), mistake=True)


def _begin(buttons: Sequence[gr.Button]) -> Callable[[Session], list[Any]]:
    def begin(session: Session) -> list[Any]:
        session.stopped = False
        waiting = View(message="Waiting for the model, which compiles a program when it sees new shapes.")
        return [waiting.message_html(), *(gr.update(interactive=False) for _ in buttons)]

    return begin


def _end(buttons: Sequence[gr.Button]) -> Callable[[], list[Any]]:
    return lambda: [gr.update(interactive=True) for _ in buttons]


def _stop(session: Session) -> None:
    session.stopped = True


def _reset(session: Session) -> list[Any]:
    session.dialogue = None
    return [work.turns_html([]), ""]
