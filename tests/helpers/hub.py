"""A stand-in of the Hub's API on 127.0.0.1, with repositories in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


class StandIn:
    """Repositories: id -> path -> bytes. Every change gives a new commit.

    Attributes:
        requests: method and path of every request.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []

    def commit_of(self, repo: str) -> str:
        content = self.repositories[repo]
        digest = hashlib.sha1(b"".join(name.encode() + content[name] for name in sorted(content)))
        return digest.hexdigest()


def _handler(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            pass

        def _answer(self, status: int, body: object = b"", headers: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _missing(self, code: str) -> None:
            self._answer(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

        def do_POST(self) -> None:
            path, body = unquote(urlsplit(self.path).path), self._body()
            hub.requests.append(f"POST {path}")
            if path == "/api/repos/create":
                values = json.loads(body)
                repo = f"{values.get('organization') or 'me'}/{values['name']}"
                hub.repositories.setdefault(repo, {})
                return self._answer(200, {"url": f"http://{self.headers['Host']}/{repo}", "name": repo, "id": repo})
            if path == "/api/validate-yaml":
                return self._answer(200, {"errors": [], "warnings": []})
            if match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                return self._answer(200, {"files": files})
            if match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
                repo = match[1]
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        hub.repositories[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                commit = hub.commit_of(repo)
                url = f"http://{self.headers['Host']}/{repo}/commit/{commit}"
                return self._answer(200, {"commitUrl": url, "commitOid": commit, "success": True})
            return self._missing("EntryNotFound")

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if path == "/api/whoami-v2":
                return self._answer(200, {"name": "me", "type": "user", "orgs": []})
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path):
                repo = match[1]
                if repo not in hub.repositories:
                    return self._missing("RepoNotFound")
                content, commit = hub.repositories[repo], hub.commit_of(repo)
                if match[3] not in (None, "main", commit):
                    return self._missing("RevisionNotFound")
                if match[2] == "tree":
                    files = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in content.items()]
                    return self._answer(200, files)
                siblings = [{"rfilename": name} for name in content]
                return self._answer(200, {"_id": "1", "id": repo, "modelId": repo, "sha": commit, "siblings": siblings})
            if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                repo, revision, name = match.groups()
                if repo not in hub.repositories:
                    return self._missing("RepoNotFound")
                commit = hub.commit_of(repo)
                if revision not in ("main", commit):
                    return self._missing("RevisionNotFound")
                if name not in hub.repositories[repo]:
                    return self._missing("EntryNotFound")
                data = hub.repositories[repo][name]
                etag = hashlib.sha1(data).hexdigest()
                return self._answer(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
            return self._missing("EntryNotFound")

        do_HEAD = do_GET

    return Handler


@contextmanager
def standing_in() -> Iterator[tuple[str, StandIn]]:
    """Address of a running stand-in, and what it holds."""
    hub = StandIn()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", hub
        finally:
            server.shutdown()
            thread.join()
