"""A Hugging Face hub small enough to read: repositories in memory, behind the HTTP paths that huggingface_hub calls.

It takes a commit whose files come along in base64 (the hub's "regular" upload) and serves them again, so that a model
can be uploaded and loaded with the real client libraries and without a network. A download can be asked for in parts,
and can be made to break off. The paths are those of huggingface_hub 2.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 40


@dataclass
class FakeHub:
    """What the hub holds, and what it was asked."""

    url: str = ""  # for HF_ENDPOINT
    token: str = "hf_good"  # the one that it accepts
    private: dict[str, bool] = field(default_factory=dict)  # repository -> only its owner sees it
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # repository -> path -> bytes
    asked: list[tuple[str, str]] = field(default_factory=list)  # (method, path) of every request
    ranges: list[str] = field(default_factory=list)  # of every download, empty for a whole file
    licence: str = "apache-2.0"  # of every repository, as its card states it
    # bytes after which the next downloads break off, one number for each; later ones are let through
    breaks: list[int] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        hub, body = self.hub, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.asked.append(("POST", self.path))
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.answer(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            hub.private[repo] = asked.get("visibility") == "private" or asked.get("private") is True
            hub.files[repo] = {}
            return self.answer(
                200, {"url": f"{hub.url}/{repo}", "name": repo, "private": hub.private[repo]}
            )
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if found := re.fullmatch("/api/models/(.+)/preupload/main", self.path):
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if found := re.fullmatch("/api/models/(.+)/commit/main", self.path):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    hub.files[found[1]][line["value"]["path"]] = base64.b64decode(
                        line["value"]["content"]
                    )
            return self.answer(
                200, {"commitUrl": f"{hub.url}/{found[1]}/commit/{COMMIT}", "commitOid": COMMIT}
            )
        return self.answer(404, {"error": f"this fake hub has no {self.path}"})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        hub.asked.append((self.command, self.path))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/?]+)(/revision/main)?(\?.*)?", self.path):
            if found[1] not in hub.private:
                return self.answer(
                    404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
                )
            siblings = [
                {"rfilename": name, "size": len(data)} for name, data in hub.files[found[1]].items()
            ]
            facts = {"id": found[1], "private": hub.private[found[1]], "sha": COMMIT}
            card = {"cardData": {"license": hub.licence}, "tags": [f"license:{hub.licence}"]}
            return self.answer(
                200, {**facts, **card, "siblings": siblings, "downloads": 0, "likes": 0}
            )
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
            data = hub.files.get(found[1], {}).get(found[2])
            if data is None:
                return self.answer(
                    404,
                    {"error": "Entry not found"},
                    {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT},
                )
            headers = {
                "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            if self.command == "GET":
                hub.ranges.append(self.headers.get("Range", ""))
            part = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if part is None:
                return self.answer(200, data, headers)
            start = int(part[1])
            return self.answer(
                206,
                data[start:],
                {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"},
            )
        return self.answer(404, {"error": f"this fake hub has no {self.path}"})

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = (
            self.hub.breaks.pop(0) if "/resolve/" in self.path and self.hub.breaks else len(data)
        )
        self.wfile.write(data[:limit])
        self.close_connection = limit < len(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on the screen."""


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub on a free port of this computer, for as long as the block lasts."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
