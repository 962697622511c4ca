"""The web server of the page: on this machine alone unless asked, without analytics, and without other addresses."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from frozenprefix.demo.studio import Studio
from frozenprefix.errors import ConfigError

PORTS = range(7860, 7880)
MAX_FILE_SIZE = "500mb"
GRACE = 3  # seconds for open connections when the server stops
# Gradio's own scripts are in the page; nothing may be fetched from, or sent to, another address
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self'; frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)


def check_gradio() -> None:
    """Check that Gradio is installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the page is made with Gradio, which is not installed: pip install 'frozenprefix[demo]'")


def serve(
    studio: Studio, *, host: str = "127.0.0.1", port: int | None = None, ready: Callable[[str], None] | None = None
) -> None:
    """Serve the page until the process is told to stop (Ctrl-C, SIGTERM).

    Files that users drop are kept in a temporary folder, which is removed at the end.

    Args:
        host: address to listen on; the default one is reached from this machine alone.
        port: 0 for any free one; by default the first free one of 7860 to 7879.
        ready: called with the page's address when it listens.

    Raises:
        ConfigError: Gradio is not installed, or the address cannot be listened on.

    Example:
        >>> serve(studio)  # doctest: +SKIP
    """
    check_gradio()
    listening = listen(host, port)
    with TemporaryDirectory(prefix="frozenprefix-demo-") as folder, listening:
        os.environ |= {
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": folder,
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        import uvicorn

        app = Guarded(_app(studio, Path(folder)), hosts=_hosts(host))
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE, access_log=False)
        server = uvicorn.Server(config)
        # pages that are still open are cut off at the end, which is no error to report
        logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)
        if ready is not None:
            ready(f"http://{_shown(host)}:{listening.getsockname()[1]}")
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:  # raised again by uvicorn, once everything is closed
            pass
        finally:
            studio.stop()


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens on an address.

    Raises:
        ConfigError: the address is not one of this machine, or its ports are in use.

    Example:
        >>> with listen("127.0.0.1", 0) as listening:
        ...     listening.getsockname()[1] > 0
        True
    """
    problem: OSError | None = None
    for number in PORTS if port is None else [port]:
        try:
            return socket.create_server((host, number), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as error:
            problem = error
    asked = f"--port {port}" if port is not None else f"--host {host} (ports {PORTS[0]} to {PORTS[-1]})"
    raise ConfigError(f"{asked}: cannot listen there ({problem and problem.strerror}); choose another one") from problem


class Guarded:
    """An ASGI application whose pages may use this server alone, and which answers to its own names only.

    A page of another site that names this machine (DNS rebinding) gets no answer.

    Args:
        hosts: names that a browser may call this server by; None for all.
    """

    def __init__(self, app: Any, hosts: frozenset[str] | None):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        named = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = named.rpartition(":")[0] if named.rpartition(":")[2].isdigit() else named
        if self.hosts is not None and name.strip("[]").lower() not in self.hosts:
            await send({"type": "http.response.start", "status": 421, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this page is for the machine that it runs on"})
            return

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                message["headers"] = [*message.get("headers", []), *extra, (b"referrer-policy", b"no-referrer")]
            await send(message)

        await self.app(scope, receive, with_policy)


def _app(studio: Studio, folder: Path) -> Any:
    import gradio as gr
    from fastapi import FastAPI

    from frozenprefix.demo.page import CSS, build_page, theme

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    options: dict[str, Any] = {"theme": theme(), "css": CSS, "ssr_mode": False, "footer_links": []}
    return gr.mount_gradio_app(app, build_page(studio), path="/", max_file_size=MAX_FILE_SIZE, **options)


def _hosts(host: str) -> frozenset[str] | None:
    """Names of this server for a loopback address; other addresses have names that are not known here."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    return frozenset({"localhost", "127.0.0.1", "::1", host}) if loopback else None


def _shown(host: str) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{name}]" if ":" in name else name
