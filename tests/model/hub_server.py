"""HTTP server of a hub with one model, on the loopback interface: answers the requests of a download."""

from __future__ import annotations

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "bank/tiny"


def describe(folder, path, damaged):
    """Return a file's entry in the hub's list: large files with SHA-256, small ones with git's blob id."""
    content = path.read_bytes()
    listed = {
        "rfilename": path.relative_to(folder).as_posix(),
        "size": len(content),
        "blobId": hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest(),
    }
    if path.suffix == ".safetensors":
        digest = "0" * 64 if path.name == damaged else hashlib.sha256(content).hexdigest()
        listed["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 134}
    return listed


def describe_entry(listed):
    """Return a file's entry in the hub's list of a commit, which a download by hub id requests."""
    lfs = listed.get("lfs")
    large = {"lfs": {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": 134}} if lfs else {}
    return {"type": "file", "path": listed["rfilename"], "size": listed["size"], "oid": listed["blobId"], **large}


def serve(folder, damaged):
    """Serve until killed; prints the port once the socket listens."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            asked, files = f"/{NAME}/resolve/{COMMIT}/", f"/api/models/{NAME}"
            path = folder / self.path.partition("?")[0].removeprefix(asked)
            there = sorted(file for file in folder.rglob("*") if file.is_file())
            if self.path.startswith(f"{files}/tree/"):
                body = json.dumps([describe_entry(describe(folder, file, damaged)) for file in there]).encode()
            elif self.path.startswith(files):
                siblings = [describe(folder, file, damaged) for file in there]
                body = json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()
            elif self.path.startswith(asked) and path.is_file():
                body = path.read_bytes()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Type", "application/json")
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
