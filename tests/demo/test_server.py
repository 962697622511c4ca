"""The server of the page: its own names only, no other addresses, clear errors."""

from __future__ import annotations

import asyncio
import importlib.util
import socket

import pytest
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.demo import server
from frozenprefix.demo.server import POLICY, Guarded, listen
from frozenprefix.errors import ConfigError


def ask(hosts: frozenset[str] | None, host: str) -> list[dict]:
    """The messages that a guarded application sends to a browser which calls it by a name."""
    sent: list[dict] = []

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"page"})

    async def send(message):
        sent.append(message)

    asyncio.run(Guarded(inner, hosts)({"type": "http", "headers": [(b"host", host.encode())]}, None, send))
    return sent


LOOPBACK = server._hosts("127.0.0.1")


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "LOCALHOST:80", "[::1]:7860"])
def test_its_own_names_get_the_page_with_a_policy(host):
    begun, body = ask(LOOPBACK, host)
    assert (begun["status"], body["body"]) == (200, b"page")
    headers = dict(begun["headers"])
    assert headers[b"a"] == b"b"
    policy = headers[b"content-security-policy"].decode()
    assert policy == POLICY
    assert "http" not in policy, "no other address is allowed"


@pytest.mark.parametrize("host", ["evil.example:7860", "127.0.0.1.evil.example", ""])
def test_other_names_do_not(host):
    begun, body = ask(LOOPBACK, host)
    assert begun["status"] == 421
    assert body["body"] != b"page"


def test_an_open_address_answers_to_every_name():
    assert server._hosts("0.0.0.0") is None
    assert ask(None, "farm:7860")[0]["status"] == 200


def test_a_port_that_is_taken():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: cannot listen there"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"--host 203\.0\.113\.1 .*: cannot listen there"):
        listen("203.0.113.1", None)


def test_the_next_free_port_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        first = taken.getsockname()[1]
        monkeypatch.setattr(server, "PORTS", [first, 0])
        with listen("127.0.0.1", None) as listening:
            assert listening.getsockname()[1] != first


# ── the command ──


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_wrong_arguments(tmp_path, tiny_checkpoint, shapes):
    assert "expected a checkpoint folder" in run(str(tmp_path / "nowhere"))
    assert "got 5, expected at most 4 side by side" in run(*[str(tiny_checkpoint)] * 5)


def test_without_gradio(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'frozenprefix[demo]'" in run(str(tiny_checkpoint))
