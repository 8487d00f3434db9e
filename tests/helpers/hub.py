"""A Hugging Face hub on this machine that serves one model from a folder, for tests without a network."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A running hub: its address, and how often each file was sent."""

    url: str
    sent: Counter[str] = field(default_factory=Counter)

    def env(self, home: Path, offline: bool = False) -> dict[str, str]:
        """Variables for a process that uses this hub, with its cache in ``home``."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline))}


@contextlib.contextmanager
def serve(name: str, folder: Path) -> Iterator[Hub]:
    """Serve the files of ``folder`` as the model ``name``; every other name is unknown."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            found = re.fullmatch(rf"/{name}/resolve/[^/]+/(.+)", path)
            if found and (folder / found[1]).is_file():
                content = (folder / found[1]).read_bytes()
                if body:
                    hub.sent[found[1]] += 1
                etag = hashlib.sha256(content).hexdigest()
                self.reply(200, content, body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            elif re.fullmatch(rf"/api/models/{name}(/revision/[^/]+)?", path):
                files = [{"rfilename": str(p.relative_to(folder))} for p in folder.rglob("*") if p.is_file()]
                info = {
                    "id": name,
                    "modelId": name,
                    "sha": COMMIT,
                    "siblings": files,
                    "tags": [],
                    "private": False,
                }
                self.reply(200, json.dumps(info).encode(), body, {"Content-Type": "application/json"})
            else:
                known = path.startswith((f"/{name}/", f"/api/models/{name}"))
                self.reply(404, b"", body, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"})

        def reply(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Stay silent."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub = Hub(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
