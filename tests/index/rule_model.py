"""A chat model by rule, behind a real server as labels ask it."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hubsae.index import explain
from hubsae.index.chat import ServerChat


class RuleModel:
    """It names the most frequent marked word, and looks for it again."""

    def __init__(self) -> None:
        self.questions: list[str] = []
        self.fail_after: int | None = None

    def answer(self, messages: list[dict[str, str]]) -> str:
        system, text = messages[0]["content"], messages[1]["content"]
        self.questions.append(system)
        if system == explain.EXPLAIN:
            marked = [word.strip() for part in re.findall(r"«(.*?)»", text) for word in part.split()]
            word = max(sorted(set(marked)) or ["nothing"], key=marked.count)
            return f"Sure.\nLabel: says {word}"
        word = text.split("\n")[0].removeprefix("Property: says ")
        lines = [line.split(". ", 1)[1] for line in text.split("\n")[2:]]
        if system == explain.FUZZ:
            lines = [" ".join(re.findall(r"«(.*?)»", line)) for line in lines]
        return f"Here: {json.dumps([int(word in line.split()) for line in lines])}"


@contextlib.contextmanager
def served(model: RuleModel) -> Iterator[ServerChat]:
    """The model at an address of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            failing = model.fail_after is not None and len(model.questions) >= model.fail_after
            answer = {"choices": [{"message": {"content": "" if failing else model.answer(body["messages"])}}]}
            data = json.dumps(answer).encode()
            self.send_response(503 if failing else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield ServerChat(f"http://127.0.0.1:{server.server_address[1]}/v1", "rules", tries=1)
    finally:
        server.shutdown()
        server.server_close()
