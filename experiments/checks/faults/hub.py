"""A hub of one model that refuses, hangs or sends half a file."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from experiments.checks.faults.workshop import Ended, sha


class Hub:
    """A hub of one model on this machine, in a process of its own, that behaves as its mode says."""

    def __init__(self, model: Path, mode: str):
        context = multiprocessing.get_context("fork")
        self.mode = context.Array("c", 16, lock=False)
        self.mode.value = mode.encode()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(model, self.mode))
        self.port = self.server.server_address[1]
        self.process = context.Process(target=self.server.serve_forever, daemon=True)
        self.process.start()
        self.server.socket.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.join()

    def tspin(self, place: Path, *arguments: str) -> Ended:
        """A command in a fresh interpreter, since the hub's library reads its settings once."""
        environment = {
            **{
                key: value
                for key, value in os.environ.items()
                if key != "HF_HUB_OFFLINE" and "proxy" not in key.lower()
            },
            **{"HF_ENDPOINT": f"http://127.0.0.1:{self.port}", "HF_HOME": str(place / "hf"), "HF_HUB_OFFLINE": "0"},
            **{"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_XET": "1"},
        }
        command = [sys.executable, "-c", "from tspin.cli import main; main()", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        return Ended(done.returncode, done.stdout + done.stderr)


def handler(model: Path, mode) -> type[BaseHTTPRequestHandler]:
    """Answers the two questions that a snapshot download asks: what is there, and a file."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            behaviour, path = mode.value.decode(), self.path.split("?")[0]
            if behaviour == "hangs":
                time.sleep(5)
                return
            if behaviour == "refuses":
                self.send(503, b"", {}, body)
                return
            commit = "0" * 40
            if path.startswith("/api/"):
                names = [{"rfilename": file.name} for file in sorted(model.iterdir())]
                entries = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": sha(file)[:40]}
                    for file in sorted(model.iterdir())
                ]
                told = entries if "/tree/" in path else {"id": "nobody/tiny", "sha": commit, "siblings": names}
                self.send(200, json.dumps(told).encode(), {"Content-Type": "application/json"}, body)
                return
            file = model / Path(path).name
            if not file.is_file():
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                return
            content = file.read_bytes()
            known = {"ETag": f'"{sha(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "none"}
            half = behaviour == "sends half" and file.suffix == ".safetensors" and body
            self.send(200, content, known, body, len(content) // 2 if half else None)

        def send(self, code: int, content: bytes, headers: dict, body: bool, only: int | None = None) -> None:
            self.send_response(code)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content[:only])
            if only is not None:
                self.close_connection = True

    return Handler
