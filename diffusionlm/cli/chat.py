"""The verb `chat`, over `diffusionlm.pretrained.conversation`."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

from rich.live import Live
from rich.text import Text

from diffusionlm.cli.output import fail, load_model, summary
from diffusionlm.console import Console, write
from diffusionlm.errors import UserError, naming, suggest
from diffusionlm.options import SETTINGS, parse
from diffusionlm.sampling.config import CHAT, SamplingConfig

if TYPE_CHECKING:
    from diffusionlm.pretrained.completion import Draft
    from diffusionlm.pretrained.conversation import Conversation

PROMPT = "> "


def chat(args: list[str], prog: str) -> int:
    """Talk to a fine-tuned model in the terminal: chat CHECKPOINT [--system TEXT] [--length N] [--load FILE]."""
    return parse(_chat, args, prog)()


def _chat(
    checkpoint: str,
    /,
    system: str | None = None,
    load: str | None = None,
    sampling: Annotated[SamplingConfig, *SETTINGS] = CHAT,
) -> int:
    """Talk to a fine-tuned model in the terminal.

    Messages are read line by line; a line that ends with a backslash continues in the next. A line that begins with a
    slash is a command, and /help lists them. Ctrl-C stops an answer, and Ctrl-D ends the dialogue. Where the input is
    no terminal, each line is a message, and the first mistake ends the command.

    Args:
      checkpoint: a run directory (its latest step), a step directory, or a params-only model.
      system: the system message.
      load: continue the dialogue of a file that /save wrote, with its settings.
      sampling: the settings of the answers. Without a strategy, masked diffusion models use low_confidence.
    """
    if load is not None and system is not None:
        raise UserError(f"load={load!r} brings its own system message, and excludes --system; drop one")
    sampling.validate()
    from diffusionlm.pretrained.conversation import Conversation

    terminal = Terminal(Conversation(load_model(checkpoint), sampling, system=system))
    if load is not None:
        terminal.command(f"/load {load}")
    return terminal.run()


class Terminal:
    """A dialogue in a terminal, or in a pipe: one line is a message or a command.

    Args:
      dialogue: the dialogue.
      console: the output; None: stdout.
      interactive: whether a person reads and writes: mistakes are shown, and the dialogue goes on. None: if both
        streams are terminals.
    """

    def __init__(self, dialogue: "Conversation", console: Console | None = None, *, interactive: bool | None = None):
        self.dialogue, self.console = dialogue, console or Console()
        self.interactive = sys.stdin.isatty() and self.console.is_terminal if interactive is None else interactive
        self._file: str | None = None  # that this dialogue was saved to or loaded from
        self._ended = False

    def run(self) -> int:
        """Read lines until the input or the dialogue ends; return the exit code."""
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  input() then edits lines and remembers them
            write("Write a message, or /help.")
        while not self._ended:
            try:
                line = self._read()
                if line is None:
                    break
                self.line(line)
            except UserError as error:
                if not self.interactive:
                    raise
                fail(str(error), 2)
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                write("\n(Ctrl-D or /quit ends the dialogue)", error=True)
        return 0

    def line(self, line: str) -> None:
        """Carry out a line: a command, or a message, which two slashes let begin with one."""
        if line.startswith("/") and not line.startswith("//"):
            self.command(line)
        elif line.strip():
            self.show(self.dialogue.stream(line[1:] if line.startswith("//") else line))

    def command(self, line: str) -> None:
        """Carry out a command such as "/set temperature 0.7"; raise `UserError` if there is none of its name."""
        name, _, rest = line[1:].partition(" ")
        if name not in COMMANDS:
            hint = suggest(name, COMMANDS)
            raise UserError(f"unknown command {'/' + name!r}{hint}; a message may begin with two slashes")
        COMMANDS[name](self, rest.strip())

    def show(self, drafts: "Iterator[Draft]") -> None:
        """Show an answer while it is denoised, and then as it is; Ctrl-C drops it."""
        try:
            if self.console.is_terminal:
                self._watch(drafts)
            else:
                for _ in drafts:
                    pass
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            write("(stopped; the message and the answer are not part of the dialogue)", error=True)
            return
        write(self.dialogue.turns[-1].content, flush=True)
        if self.dialogue.forgotten:
            write(f"(the oldest {self.dialogue.forgotten} turns no longer fit into the context)", error=True)

    def _watch(self, drafts: "Iterator[Draft]") -> None:
        from diffusionlm.pretrained.terminal import draft_text

        model, block = self.dialogue.model, self.dialogue.sampling.block_length
        before = None
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            for draft in drafts:
                text = draft_text(draft, before, model.reader, model.config.eos_ids, block)
                lines = text.wrap(self.console, self.console.width)[-max(1, self.console.height - 1) :]
                live.update(Text("\n").join(lines), refresh=True)
                before = draft

    def _read(self) -> str | None:
        """Return the next message or command, or None at the end of the input."""
        lines: list[str] = []
        while True:
            try:
                with naming("standard input"):
                    line = input(PROMPT if self.interactive else "")
            except EOFError:
                return "\n".join(lines) if lines else None
            except UnicodeDecodeError as error:
                raise UserError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from error
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def help(self, rest: str) -> None:
        """List the commands."""
        width = max(map(len, COMMANDS))
        write("\n".join(f"/{name:{width}}  {summary(function)}" for name, function in COMMANDS.items()))

    def reset(self, rest: str) -> None:
        """Forget all messages; the system message and the settings stay."""
        self.dialogue.reset()

    def system(self, rest: str) -> None:
        """Replace the system message: /system TEXT; without a text there is none."""
        self.dialogue.system = rest or None

    def regenerate(self, rest: str) -> None:
        """Replace the last answer by another one."""
        old = self.dialogue.turns[-1:]
        self.show(self.dialogue.regenerate())
        if self.dialogue.turns[-1:] == old:
            write("(the same answer; with temperature=0 nothing is drawn: /set temperature 0.7)", error=True)

    def set(self, rest: str) -> None:
        """Change a setting of the answers: /set NAME VALUE."""
        name, _, value = rest.partition(" ")
        if not name or not value:
            raise UserError("/set needs a name and a value, as in /set temperature 0.7; /settings lists the names")

        def changed(sampling: Annotated[SamplingConfig, *SETTINGS] = self.dialogue.sampling) -> SamplingConfig:
            """Change settings."""
            return sampling

        sampling = parse(changed, [f"--{name}", value.strip()], "/set")()
        self.dialogue.model.sampling_config(sampling)
        self.dialogue.sampling = sampling

    def settings(self, rest: str) -> None:
        """Show the settings of the answers."""
        write("\n".join(f"{name} {value}" for name, value in dataclasses.asdict(self.dialogue.sampling).items()))

    def save(self, rest: str) -> None:
        """Write the dialogue and the settings to a file: /save FILE; without a name, to the file of before."""
        path = rest or self._file
        if path is None:
            raise UserError("/save needs the name of a file, as in /save dialogue.json")
        if os.path.exists(path) and path != self._file:
            raise UserError(f"{path!r} exists; give another name")
        self.dialogue.save(path)
        self._file = path
        write(f"saved {len(self.dialogue.turns)} messages to {path}", error=True)

    def load(self, rest: str) -> None:
        """Continue the dialogue of a file, with its settings: /load FILE."""
        if not rest:
            raise UserError("/load needs the name of a file that /save wrote")
        self.dialogue.load(rest)
        self._file = rest
        write(f"loaded {len(self.dialogue.turns)} messages from {rest}", error=True)

    def quit(self, rest: str) -> None:
        """End the dialogue, as Ctrl-D does."""
        self._ended = True


COMMANDS: dict[str, Callable[[Terminal, str], None]] = {
    "help": Terminal.help,
    "reset": Terminal.reset,
    "system": Terminal.system,
    "regenerate": Terminal.regenerate,
    "set": Terminal.set,
    "settings": Terminal.settings,
    "save": Terminal.save,
    "load": Terminal.load,
    "quit": Terminal.quit,
}
