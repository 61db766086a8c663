"""A chat server on this machine, over real HTTP, with the faults of real ones."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any]], tuple[str, str]]


def echo(body: dict[str, Any]) -> tuple[str, str]:
    """A reply that depends on the messages and the seed alone."""
    said = body["messages"][-1]["content"]
    mark = hashlib.sha256(f"{said} {body['seed']}".encode()).hexdigest()[:6]
    return f"Reply {mark} to {said.split()[-1]}", "stop"


class ChatServer:
    """Listens until it is closed.

    Args:
        answer: makes (text, finish_reason) from the body of a request.
        port: 0 for a free one.
        models: names that ``/models`` lists.
        fails: number of requests after which each further one is cut off; None never.
        busy: requests that are answered by 503 first, with ``Retry-After`` if ``retry_after`` is given.
        refuses: HTTP code by which a request is refused, from its body; 0 for those that are answered.
        prompt_tokens: counts those of a request; None for its words and 4 more.
    """

    def __init__(
        self,
        answer: Answer = echo,
        *,
        port: int = 0,
        models: tuple[str, ...] = ("tiny",),
        fails: int | None = None,
        key: str | None = None,
        busy: int = 0,
        retry_after: int | None = None,
        refuses: Callable[[dict[str, Any]], int] = lambda body: 0,
        prompt_tokens: Callable[[dict[str, Any]], int] | None = None,
    ):
        self.bodies: list[dict[str, Any]] = []
        self.lock, server = threading.Lock(), self
        self.busy = busy

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.send(200, {"data": [{"id": name} for name in models]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if key is not None and self.headers["Authorization"] != f"Bearer {key}":
                    self.send(401, {"error": "wrong key"})
                    return
                with server.lock:
                    server.bodies.append(body)
                    number = len(server.bodies)
                    if server.busy > 0:
                        server.busy -= 1
                        self.send(503, {"error": "loading"})
                        return
                if code := refuses(body):
                    self.send(code, {"error": "context length exceeded"})
                    return
                if fails is not None and number > fails:
                    self.connection.close()  # as a process that is killed
                    return
                text, finish = answer(body)
                words = sum(len(message["content"].split()) for message in body["messages"])
                counted = words + 4 if prompt_tokens is None else prompt_tokens(body)
                usage = {"prompt_tokens": counted, "completion_tokens": min(len(text.split()), body["max_tokens"])}
                choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
                self.send(200, {"choices": [choice], "usage": usage})

            def send(self, status: int, content: Any) -> None:
                data = json.dumps(content).encode()
                try:
                    self.send_response(status)
                    if status == 503 and retry_after is not None:
                        self.send_header("Retry-After", str(retry_after))
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client has given up
                    pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()
