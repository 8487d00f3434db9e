"""An HTTP endpoint: python examples/serve.py MODEL [PORT]. For this machine only; no authentication, no batching.

POST /score takes {"image": BASE64, "title": ..., "description": ..., "features": ..., "main_category": ...}.
"""

from __future__ import annotations

import base64
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from rating_train import load
from rating_train.errors import UserError

MODEL, LOCK, MAX_BYTES = load(sys.argv[1]), Lock(), 32 * 2**20


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.path != "/score" or not 0 < length <= MAX_BYTES:
            return self.answer(404, {"error": "POST /score, with a body of at most 32 MiB"})
        try:
            listing = json.loads(self.rfile.read(length))
            image = base64.b64decode(listing.pop("image"), validate=True)
            with LOCK:  # one forward pass at a time: two would only share the device
                return self.answer(200, {"score": MODEL.score(image, listing)})
        except (UserError, ValueError, KeyError, TypeError, AttributeError) as e:
            return self.answer(400, {"error": str(e)})

    def answer(self, code: int, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2]) if len(sys.argv) > 2 else 8080), Handler)
    print(f"{MODEL.name} on {MODEL.device}: http://127.0.0.1:{server.server_port}/score", flush=True)
    server.serve_forever()
