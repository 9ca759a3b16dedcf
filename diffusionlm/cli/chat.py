"""The verb `chat`, over `diffusionlm.pretrained.conversation`."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from rich.live import Live
from rich.text import Text

from diffusionlm.cli.output import fail, load_model, summary
from diffusionlm.console import Console, write
from diffusionlm.errors import UserError, naming, suggest
from diffusionlm.options import SETTINGS, parse
from diffusionlm.sampling.config import CHAT, SamplingConfig
from diffusionlm.storage import run_path

if TYPE_CHECKING:
    from diffusionlm.pretrained.completion import Draft
    from diffusionlm.pretrained.conversation import Conversation, Saved

PROMPT, CONTINUED = "> ", ". "


def chat(args: list[str], prog: str) -> int:
    """Talk to a fine-tuned model in the terminal: chat CHECKPOINT [--system TEXT] [--length N] [--load FILE]."""
    arguments = parse(_arguments, args, prog)()
    given = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in args if word.startswith("--")}
    return _chat(arguments, given)


@dataclass(frozen=True)
class _Arguments:
    checkpoint: str
    system: str | None
    load: str | None
    sampling: SamplingConfig


def _arguments(
    checkpoint: str,
    /,
    system: str | None = None,
    load: str | None = None,
    sampling: Annotated[SamplingConfig, *SETTINGS] = CHAT,
) -> _Arguments:
    """Talk to a fine-tuned model in the terminal.

    Messages are read line by line; a line that ends with a backslash continues on the next line. A line that begins
    with a slash is a command, and /help lists them. Ctrl-C stops an answer, and Ctrl-D ends the dialogue. Where the
    input or the output is not a terminal, each line is a message, and the first mistake ends the command.

    Args:
      checkpoint: a run directory (its latest step), a step directory, or a params-only model.
      system: the system message.
      load: continue the dialogue of a file that /save wrote, with its settings, but for those given here.
      sampling: the settings of the answers. Without a strategy, masked diffusion models use low_confidence.
    """
    return _Arguments(checkpoint, system, load, sampling)


def _chat(arguments: _Arguments, given: Set[str]) -> int:
    """Talk to a model.

    Args:
      arguments: those of the command.
      given: the names of the options that were given.
    """
    load, sampling = arguments.load, arguments.sampling
    if load is not None and arguments.system is not None:
        raise UserError(f"load={load!r} brings its own system message, and excludes --system; drop one")
    sampling.validate()
    from diffusionlm.pretrained import conversation

    saved = None if load is None else conversation.read(os.path.expanduser(load))
    if saved is not None:
        changes = {name: value for name, value in vars(sampling).items() if name in given}
        sampling = dataclasses.replace(conversation.sampling_of(saved), **changes)
    model = load_model(arguments.checkpoint)
    terminal = Terminal(conversation.Conversation(model, sampling, system=arguments.system or None))
    if load is not None and saved is not None:
        terminal.resume(saved, os.path.expanduser(load))
        terminal.dialogue.sampling = sampling
    return terminal.run()


class Terminal:
    """A dialogue in a terminal, or in a pipe: one line is a message or a command.

    Args:
      dialogue: the dialogue.
      console: the output; None: stdout.
      interactive: whether a person reads and writes, so that mistakes are shown and the dialogue goes on; None: True if
        stdin and the console are terminals.
    """

    def __init__(self, dialogue: "Conversation", console: Console | None = None, *, interactive: bool | None = None):
        self.dialogue, self.console = dialogue, console or Console()
        self.interactive = sys.stdin.isatty() and self.console.is_terminal if interactive is None else interactive
        self._file: str | None = None  # the file that this dialogue was saved to or loaded from
        self._ended = False

    def run(self) -> int:
        """Read lines until the input or the dialogue ends; return the exit code."""
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  input() then edits lines and remembers them
            self._print("Write a message, or /help.")
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
        """Run a command, or send a message; a message that begins with a slash is written with two."""
        line = line.strip()
        if line.startswith("/") and not line.startswith("//"):
            self._run_command(line[1:])
        elif line:
            text = line[1:] if line.startswith("//") else line
            self._answer(lambda: self.dialogue.ask(text), lambda: self.dialogue.stream(text))

    def _run_command(self, line: str) -> None:
        name, *arguments = line.split(maxsplit=1) or [""]
        if name not in COMMANDS:
            hint = suggest(name, COMMANDS)
            raise UserError(
                f"unknown command {'/' + name!r}{hint}; to send a message that begins with a slash, type two"
            )
        argument = arguments[0].strip() if arguments else ""
        if argument and name not in WITH_ARGUMENT:
            raise UserError(f"/{name} takes no argument, and {argument!r} is one; leave it out")
        COMMANDS[name](self, argument)

    def _answer(self, generate: Callable[[], str], stream: "Callable[[], Iterator[Draft]]") -> None:
        """Print an answer, which a terminal shows while it is denoised; Ctrl-C drops it."""
        forgotten = self.dialogue.forgotten
        try:
            if self.console.is_terminal:
                self._watch(stream())
                answer = self.dialogue.turns[-1].content
            else:
                answer = generate()
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            write("(stopped; the dialogue is as it was before)", error=True)
            return
        self._print(answer)
        if not answer.strip():
            write("(the answer is empty)", error=True)
        if self.dialogue.forgotten > forgotten:
            write(f"(the oldest {self.dialogue.forgotten} turns no longer fit into the context)", error=True)

    def _watch(self, drafts: "Iterator[Draft]") -> None:
        from diffusionlm.pretrained.terminal import draft_text

        model, block = self.dialogue.model, self.dialogue.sampling.block_length
        previous = None
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            for draft in drafts:
                text = draft_text(draft, previous, model.reader, model.config.eos_ids, block)
                lines = text.wrap(self.console, self.console.width)[-max(1, self.console.height - 1) :]
                live.update(Text("\n").join(lines), refresh=True)
                previous = draft

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)

    def _read(self) -> str | None:
        """Return the next message or command, or None at the end of the input."""
        lines: list[str] = []
        while True:
            prompt = "" if not self.interactive else CONTINUED if lines else PROMPT
            try:
                with naming("standard input"):
                    line = input(prompt)
            except EOFError:
                if self.interactive:
                    self._print("")  # the shell's prompt begins on a line of its own
                    return None
                return "\n".join(lines) if lines else None
            except UnicodeDecodeError as error:
                raise UserError(f"standard input is not UTF-8: {error.reason} at byte {error.start}") from error
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def help(self, argument: str) -> None:
        """List the commands."""
        width = max(map(len, COMMANDS))
        self._print("\n".join(f"/{name:{width}}  {summary(function)}" for name, function in COMMANDS.items()))

    def reset(self, argument: str) -> None:
        """Forget all messages; the system message and the settings stay."""
        self.dialogue.reset()
        self._file = None

    def system(self, argument: str) -> None:
        """Replace the system message: /system TEXT; without a text there is none."""
        self.dialogue.system = argument or None

    def regenerate(self, argument: str) -> None:
        """Replace the last answer by another one."""
        old_turns = self.dialogue.turns
        self._answer(self.dialogue.regenerate, self.dialogue.stream_again)
        if self.dialogue.turns is not old_turns and self.dialogue.turns == old_turns:
            greedy = "; with temperature=0 little is drawn: /set temperature 0.7"
            write(f"(the same answer{greedy if self.dialogue.sampling.temperature == 0 else ''})", error=True)

    def set(self, argument: str) -> None:
        """Change settings of the answers: /set NAME VALUE [NAME VALUE ...]; None is a value of some."""
        words = argument.split()
        if not words or len(words) % 2:
            raise UserError("/set needs names and values, as in /set temperature 0.7; /settings lists the names")
        known = [field.name for field in dataclasses.fields(SamplingConfig)]
        for name in words[::2]:
            if name not in known:
                raise UserError(f"unknown setting {name!r}{suggest(name, known)}")

        def with_settings(sampling: Annotated[SamplingConfig, *SETTINGS] = self.dialogue.sampling) -> SamplingConfig:
            """Change settings."""
            return sampling

        options = [f"--{word}" if i % 2 == 0 else word for i, word in enumerate(words)]
        self.dialogue.sampling = parse(with_settings, options, "/set")()

    def settings(self, argument: str) -> None:
        """Show the settings of the answers."""
        values = dataclasses.asdict(self.dialogue.sampling)
        self._print("\n".join(f"{name} {value}" for name, value in values.items()))

    def save(self, argument: str) -> None:
        """Write the dialogue to a file: /save FILE; without a name, to the one it was last saved to or loaded from."""
        path = os.path.expanduser(argument) or self._file
        if path is None:
            raise UserError("/save needs the name of a file, as in /save dialogue.json")
        if path != self._file and (os.path.lexists(path) or run_path(path).exists()):
            raise UserError(f"{path!r} exists; give another name")
        with _refusing(path):
            self.dialogue.save(path)
        self._file = path
        write(f"saved {len(self.dialogue.messages)} messages to {path}", error=True)

    def load(self, argument: str) -> None:
        """Continue the dialogue of a file, with its settings: /load FILE."""
        if not argument:
            raise UserError("/load needs the name of a file that /save wrote")
        from diffusionlm.pretrained import conversation

        path = os.path.expanduser(argument)
        with _refusing(path):
            saved = conversation.read(path)
        self.resume(saved, path)

    def resume(self, saved: "Saved", path: str) -> None:
        """Continue a dialogue that was read from a file, to which /save will write it."""
        self.dialogue.resume(saved, path)
        self._file = path
        write(f"loaded {len(self.dialogue.messages)} messages from {path}", error=True)

    def quit(self, argument: str) -> None:
        """End the dialogue, as Ctrl-D does."""
        self._ended = True


@contextlib.contextmanager
def _refusing(path: str) -> Iterator[None]:
    """Raise `UserError` for a file that cannot be read or written, so that the dialogue goes on."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.strerror or error}: {path}") from error


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
WITH_ARGUMENT = ("system", "set", "save", "load")
