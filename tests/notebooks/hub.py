"""As much of the Hugging Face hub, on this machine, as takes a pushed folder."""

import base64
import contextlib
import http.server
import json
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def serve() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """Starts it; yields its address, and what it was given by repository and path."""
    repositories: dict[str, dict[str, bytes]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"sha": "0" * 40, "type": "user", "name": "someone"})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/api/repos/create":
                name = "/".join(
                    filter(None, map(json.loads(body).get, ("organization", "name")))
                )
                repositories[name] = {}
                self.answer({"url": name, "name": name})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                paths = [file["path"] for file in files]
                # Not by LFS, so that the commit has them all.
                modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                self.answer({"files": [{"path": path} | modes for path in paths]})
            elif "/commit/" in self.path:
                name = self.path.removeprefix("/api/models/").split("/commit/")[0]
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        repositories[name][line["value"]["path"]] = content
                self.answer({"commitOid": "0" * 40, "commitUrl": self.path})
            else:
                self.answer({"error": self.path}, 404)

        def answer(self, values: dict[str, object], code: int = 200) -> None:
            body = json.dumps(values).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", repositories
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
