"""A server on this machine that stands in for W&B: it answers what a client of 0.31 asks, takes everything and keeps what it was sent.

It says nothing of how W&B stores or shows it, least of all what becomes of a run that comes again under its id.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ME = {"id": "me", "entity": "team", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
BUCKET = {"id": "bucket", "displayName": "", "config": "{}", "historyLineCount": 0,
          "project": {"id": "project", "name": "grpo_routing", "entity": {"id": "team", "name": "team"}}}
SEQUENCE = {"id": "sequence", "latestArtifact": {"id": "artifact", "versionIndex": 0}}
ARTIFACT = {"id": "artifact", "state": "COMMITTED", "artifactSequence": SEQUENCE}


class StandIn(ThreadingHTTPServer):
    """`asked` holds (operation, variables) of every GraphQL question, `history` the rows that were streamed, `files` what was put."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, dict]] = []
        self.history: list[dict] = []
        self.files: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def run(self, module: str, *words: str) -> str:
        """Output of a command that talks to this server; in a process of its own, since W&B keeps one address and login for a process."""
        environment = os.environ | {"WANDB_BASE_URL": self.address, "WANDB_API_KEY": "k" * 40}
        command = [sys.executable, "-m", f"grpo_routing.{module}", *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def variables(self, operation: str) -> list[dict]:
        return [variables for name, variables in self.asked if name == operation]

    def answer(self, operation: str, variables: dict) -> dict:
        self.asked.append((operation, variables))
        uploads = [{"name": name, "uploadUrl": f"{self.address}/put/{name}"} for name in variables.get("files", ())]
        return {"Viewer": {"viewer": ME}, "GetDefaultEntity": {"viewer": ME},
                "UpsertBucket": {"upsertBucket": {"bucket": BUCKET | {"name": variables.get("name")}}},
                "CreateRunFiles": {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": uploads}},
                "ArtifactType": {"project": {"artifact": None}}, "CreateArtifact": {"createArtifact": {"artifact": ARTIFACT}},
                "UpsertView2": {"upsertView": {"view": {"id": "view-1", "name": variables.get("name")}, "inserted": True}},
                "ServerFeaturesQuery": {"serverInfo": {"features": []}}}[operation]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        said: dict = {}
        if self.path.endswith("/graphql"):
            question = json.loads(body)
            operation = question["query"].split("(")[0].split("{")[0].split()[1]
            said = {"data": self.server.answer(operation, question.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            rows = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"content": []})["content"]
            self.server.history += [json.loads(row) for row in rows]
        elif self.path.startswith("/put/"):
            self.server.files[self.path.removeprefix("/put/")] = body
        words = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(words)))
        self.end_headers()
        self.wfile.write(words)

    do_PUT = do_GET = do_POST

    def log_message(self, *words: object) -> None:
        pass


@contextmanager
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
