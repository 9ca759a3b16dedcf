"""The web server of the page. It talks to the browser alone: nothing is reported to or loaded from elsewhere."""

import contextlib
import errno
import ipaddress
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusionlm.console import write
from diffusionlm.errors import UserError, missing_package
from diffusionlm.parallel.signals import sigterm_interrupts
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.pretrained.webpage import player

# The browser refuses whatever the page might want from another server; Gradio runs scripts from texts.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
FIRST_PORT, PORTS = 7860, 100  # that are tried


class LocalOnly:
    """An ASGI application around another that adds `POLICY` to its answers."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, send_with_policy)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Yield a directory for the files of a server, and keep Gradio from reporting to its makers, until the end.

    Gradio reads the environment when it is imported, when it is launched and whenever it writes a file, so all of that
    has to be inside. At the end, also after SIGTERM, the directory is removed and the environment is as it was.
    """
    with sigterm_interrupts(), tempfile.TemporaryDirectory(prefix="diffusionlm-app-") as directory:
        values = {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "GRADIO_TEMP_DIR": str(Path(directory) / "served"),
        }
        before = {name: os.environ.get(name) for name in values}
        os.environ.update(values)
        try:
            yield Path(directory)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def require_gradio() -> None:
    """Raise `UserError` where a package of the app is not installed; to be called inside `workplace`."""
    try:
        import gradio  # noqa: F401  # pyright: ignore[reportMissingImports]
        import PIL  # noqa: F401
    except ImportError as error:
        package = "pillow" if error.name == "PIL" else error.name or "gradio"
        raise missing_package("app", package, "app") from error


def find_port(host: str, port: int | None) -> int:
    """Return a port to listen on: the one that is asked for, or the first free one from `FIRST_PORT` on.

    Raises:
      UserError: it is in use, or the host is no address of this machine.
    """
    reason = ""
    for candidate in [port] if port else range(FIRST_PORT, FIRST_PORT + PORTS):
        try:
            family, *_, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            with socket.socket(family) as listener:
                listener.setsockopt(
                    socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
                )  # a server that has just ended is no matter
                listener.bind(address)
            return candidate
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno != errno.EADDRINUSE:
                break
    where = f"port={port}" if port else f"any port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1}"
    raise UserError(f"cannot listen on host={host!r} with {where} ({reason}); choose another --host or --port")


def start(model: LoadedModel, given: dict[str, Any], host: str, port: int, directory: Path) -> Any:
    """Start the server in threads of its own, and return the Gradio page, whose `local_url` is its address.

    It is to be started and closed inside `workplace`.

    Args:
      model: the model.
      given: the settings that the page begins with, where they are not the defaults.
      host: the address to listen on.
      port: the port, from `find_port`.
      directory: for files to download, from `workplace`.

    Raises:
      UserError: a setting has no meaning for the model.
    """
    from gradio.themes import Default  # pyright: ignore[reportMissingImports]
    from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]

    from diffusionlm.app.page import STYLE, Page

    blocks = Page(model, given, directory).build()
    blocks.queue(api_open=False)
    blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        inbrowser=False,
        ssr_mode=False,
        footer_links=[],
        theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        head=f"<style>{player()['style']}{STYLE}</style>",
        app_kwargs={"middleware": [Middleware(LocalOnly)]},
    )
    return blocks


def serve(model: LoadedModel, given: dict[str, Any], host: str, port: int, directory: Path) -> None:
    """Serve the page until the process is interrupted; the arguments are those of `start`."""
    blocks = start(model, given, host, port, directory)
    try:
        write(f"The app is at {blocks.local_url} (Ctrl-C ends it)", flush=True)
        if not _is_loopback(host):
            write(f"host={host!r} lets anyone who reaches this machine use the model", error=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
    finally:
        blocks.close(verbose=False)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
