"""The verb `app`, over `diffusionlm.app`."""

from dataclasses import dataclass
from typing import Annotated

from diffusionlm.cli.output import load_model
from diffusionlm.errors import UserError
from diffusionlm.options import SETTINGS, given, parse
from diffusionlm.sampling.config import SamplingConfig


def app(args: list[str], prog: str) -> int:
    """Watch a model generate in the browser: app CHECKPOINT [--port P]; needs the extra "app"."""
    return _app(parse(_arguments, args, prog)(), given(args))


@dataclass(frozen=True)
class _Arguments:
    checkpoint: str
    host: str
    port: int | None
    sampling: SamplingConfig


def _arguments(
    checkpoint: str,
    /,
    host: str = "127.0.0.1",
    port: int | None = None,
    sampling: Annotated[SamplingConfig, *SETTINGS] = SamplingConfig(),  # noqa: B008
) -> _Arguments:
    """Watch a model generate in the browser: continue texts, chat, fill gaps, compare two settings, save traces.

    Args:
      checkpoint: a run directory (its latest step), a step directory, or a params-only model.
      host: the address to listen on; the default is reached from this machine only.
      port: the port; None: the first free one from 7860 on.
      sampling: the settings that the page begins with; those that it does not show stay as they are given here. Without
        them a model that was fine-tuned on instructions begins as `chat` does, and any other as `sample` does.
    """
    return _Arguments(checkpoint, host, port, sampling)


def _app(arguments: _Arguments, names: set[str]) -> int:
    if arguments.port is not None and not 1 <= arguments.port < 2**16:
        raise UserError(f"port={arguments.port} must be an integer from 1 to {2**16 - 1}")
    arguments.sampling.validate()
    from diffusionlm.app import server

    settings = {name: value for name, value in vars(arguments.sampling).items() if name in names}
    with server.workplace() as directory:
        server.require_gradio()
        port = server.find_port(arguments.host, arguments.port)
        server.serve(load_model(arguments.checkpoint), settings, arguments.host, port, directory)
    return 0
