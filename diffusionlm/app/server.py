"""The web server of the page. It talks to the browser alone: nothing is reported to or loaded from elsewhere."""

import ipaddress
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

from diffusionlm.console import write
from diffusionlm.errors import UserError, missing_package
from diffusionlm.pretrained.model import LoadedModel
from diffusionlm.pretrained.webpage import player

# The browser refuses whatever the page might want from another server; Gradio runs scripts from texts.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)
FIRST_PORT = 7860


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


def require_gradio() -> None:
    """Keep Gradio from reporting to its makers, and raise `UserError` where a package of the app is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio  # noqa: F401  # pyright: ignore[reportMissingImports]
        import PIL  # noqa: F401
    except ImportError as error:
        package = "pillow" if error.name == "PIL" else error.name or "gradio"
        raise missing_package("app", package, "app") from error


def start(model: LoadedModel, given: dict[str, Any], host: str, port: int | None, directory: Path) -> Any:
    """Start the server in threads of its own, and return the Gradio page, whose `local_url` is its address.

    Args:
      model: the model.
      given: the settings that the page begins with, where they are not the defaults.
      host: the address to listen on.
      port: the port; None: the first free one from `FIRST_PORT` on.
      directory: for files to download.

    Raises:
      UserError: a setting has no meaning for the model, or the address cannot be had.
    """
    require_gradio()
    os.environ["GRADIO_TEMP_DIR"] = str(directory / "served")
    from gradio.themes import Default  # pyright: ignore[reportMissingImports]
    from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]

    from diffusionlm.app.page import STYLE, Page

    blocks = Page(model, given, directory).build()
    blocks.queue(api_open=False)
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inbrowser=False,
            ssr_mode=False,
            footer_links=[],
            allowed_paths=[str(directory)],
            theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            head=f"<style>{player()['style']}{STYLE}</style>",
            app_kwargs={"middleware": [Middleware(LocalOnly)]},
        )
    except OSError as error:
        wanted = f"port={port}" if port else f"host={host!r}"
        raise UserError(f"{wanted} cannot be had: it is in use or not ours; choose another --port or --host") from error
    return blocks


def serve(model: LoadedModel, given: dict[str, Any], host: str, port: int | None) -> None:
    """Serve the page until the process is interrupted."""
    with tempfile.TemporaryDirectory(prefix="diffusionlm-app-") as directory:
        blocks = start(model, given, host, port, Path(directory))
        try:
            write(f"The app is at {blocks.local_url} (Ctrl-C ends it)", flush=True)
            if not _is_loopback(host):
                write(f"host={host!r} lets anyone who reaches this machine use the model", error=True)
            threading.Event().wait()
        finally:
            blocks.close(verbose=False)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
