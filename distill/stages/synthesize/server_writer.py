"""An OpenAI-compatible server that writes: ``POST /chat/completions``, one prompt per request.

Servers differ in what they do without saying so (research of their behaviour, llama.cpp 0.3.36 and others): ``n`` and
several prompts are ignored or fail, an unknown model is answered by another one, a missing ``max_tokens`` fills the
context, and a prompt that is too long is cut silently. Therefore each request has one prompt, ``max_tokens`` and a seed
of its own; the name of the model is read from ``/models`` and one that is not there is refused; and a server that
counts fewer tokens in a prompt than the prompt has words has cut it.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from distill.core import stop
from distill.core.artifact import hash_of
from distill.core.errors import InputError, MachineError
from distill.core.source import suggest
from distill.stages.synthesize.requests import REFUSED, Likelihood, LikelihoodRequest, Reply, Request
from distill.stages.synthesize.writer_spec import ServerSpec

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""HTTP codes of a server that may answer later."""
REFUSED_CODES = (400, 413, 422)
"""HTTP codes of a server that does not take one request, such as a prompt that is too long; others may be fine."""
MOST_REFUSED = 16
"""First requests of a phase which may all be refused; then something else is wrong than a single prompt."""
CUT = "prompt cut by the server"
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
LARGEST_ANSWER = 1 << 26


class _Refused(InputError):
    """The server does not take one request."""


class ServerWriter:
    """Writes through a server, which is probed at once.

    Args:
        spec: which server.
        seed: of the run.
        say: prints one line for people.

    Raises:
        InputError: the address, the model or the key are wrong.
        MachineError: the server does not answer.
    """

    def __init__(self, spec: ServerSpec, seed: int, say: Callable[[str], object] = print):
        self._spec, self._seed, self._say = spec, seed, say
        self._is_away = False
        self._address = urlsplit(spec.server.rstrip("/"))
        self._stopped = threading.Event()
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if (key := spec.key()) is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self.model = self._model()
        self._probe()

    def identity(self) -> str:
        """The address is not part of it: a server may move."""
        return f"server, model {self.model}"

    def write(self, requests: Sequence[Request], needed: set[str]) -> Iterator[list[tuple[str, Reply]]]:
        """See :class:`~distill.stages.synthesize.requests.Writer`. What is finished is yielded before an error.

        A request that the server refuses has an empty reply, unless the first ones of a phase are all refused.
        """
        is_fresh = len(needed) == len(requests)  # no reply of this phase has succeeded yet
        refused = list[tuple[str, Reply]]()
        waiting = [request for request in requests if request.id in needed]
        most = min(MOST_REFUSED, len(waiting))
        pool = ThreadPoolExecutor(self._spec.parallel, thread_name_prefix="writer")
        failed: BaseException | None = None
        open_: dict[Future[Reply], str] = {}
        try:
            while waiting or open_:
                while waiting and len(open_) < self._spec.parallel and failed is None:
                    request = waiting.pop(0)
                    open_[pool.submit(self._reply, request)] = request.id
                done, _ = wait(open_, timeout=0.2, return_when="FIRST_COMPLETED")
                made = []
                for future in done:
                    id = open_.pop(future)
                    error = future.exception()
                    if error is None:
                        made.append((id, future.result()))
                        is_fresh = False
                    elif isinstance(error, _Refused) and not (is_fresh and len(refused) + 1 >= most):
                        refused.append((id, Reply("", REFUSED)))
                    elif failed is None:
                        failed = error
                        self._stopped.set()  # the others give up waiting for the server, and finish what they read
                if refused and not is_fresh:
                    made += refused
                    refused = []
                if made:
                    yield made
                if failed is not None and not open_:
                    raise failed
                stop.check()
        finally:
            self._stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            self._stopped = threading.Event()

    def likelihoods(self, given: Sequence[LikelihoodRequest], needed: set[str]) -> Iterator[dict[str, Likelihood]]:
        """Refuse: chat endpoints do not tell the probability of a given text."""
        raise InputError("writer: a server does not tell the probability of a text; name a model as writer")

    def _reply(self, request: Request) -> Reply:
        body = {
            "model": self.model,
            "messages": list(request.messages),
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "seed": int(hash_of(self._seed, request.id), 16) % 2**31,
        }
        answer = self._ask("POST", "/chat/completions", body)
        try:
            choice, usage = answer["choices"][0], answer.get("usage") or {}
            text, finish = choice["message"]["content"] or "", str(choice.get("finish_reason"))
            counted, new = usage.get("prompt_tokens"), usage.get("completion_tokens")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise MachineError(f"{self._spec.server}: answered {_short(answer)}, which is no chat completion") from None
        words = sum(len(str(message["content"]).split()) for message in request.messages)
        if isinstance(counted, int) and 0 < counted < words:
            finish = CUT
        return Reply(str(text).strip(), finish, _count(counted), _count(new))

    def _model(self) -> str:
        """The name of the model, as the server lists it.

        Raises:
            InputError: it lists no such model, or several of which the recipe names none.
        """
        found = self._ask("GET", "/models", None)
        rows = found.get("data") if isinstance(found, dict) else None
        names = [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row] if rows else []
        wanted = self._spec.model
        if wanted is None and len(names) == 1:
            return names[0]
        if wanted is None:
            raise InputError(
                f"writer.model: {self._spec.server} has {', '.join(names) or 'no model'}; name one of them"
            )
        if wanted not in names:
            raise InputError(
                f"writer.model: {self._spec.server} has no model {wanted!r} (it has {', '.join(names) or 'none'})"
                + suggest(wanted, names)
            )
        return wanted

    def _probe(self) -> None:
        """Ask for two tokens, so that a wrong key or address is found before anything is planned."""
        reply = self._reply(Request(({"role": "user", "content": "Say yes."},), 2))
        if reply.new_tokens is not None and reply.new_tokens > 2:
            raise InputError(
                f"{self._spec.server}: wrote {reply.new_tokens} tokens where max_tokens was 2, so it ignores "
                "the limit; use a server that keeps to it"
            )

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The answer to one request, after as many tries as ``max_wait_s`` allows.

        Raises:
            InputError: the server refuses it.
            MachineError: the server does not answer.
        """
        until, pause, why = time.monotonic() + self._spec.max_wait_s, FIRST_WAIT_S, ""
        while True:
            try:
                status, answer, after = self._once(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                status, answer, after, why = 0, None, None, f"{type(error).__name__}: {error}"
            if status == 200:
                self._is_away = False
                return answer
            if status and status not in RETRIED:
                kind = _Refused if status in REFUSED_CODES else InputError
                raise kind(f"{self._spec.server}{path}: HTTP {status}: {_short(answer)}; see the server's log")
            why = f"HTTP {status}: {_short(answer)}" if status else why
            left = until - time.monotonic()
            if left > pause and not self._is_away:
                self._is_away = True  # the others that wait say nothing
                self._say(f"{self._spec.server} does not answer ({why}); waiting for it, {left:,.0f} s at most")
            if left < pause or self._stopped.wait(min(after or pause, left)):
                raise MachineError(
                    f"{self._spec.server}: does not answer ({why}); what was written is kept, the same command goes on"
                )
            pause = min(2 * pause, LONGEST_WAIT_S)

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any, float | None]:
        """(HTTP code, parsed answer, seconds that the server asks to wait)."""
        kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._address.hostname or "", self._address.port, timeout=self._spec.timeout_s)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, f"{self._address.path}{path}", data, self._headers)
            response = connection.getresponse()
            content = response.read(LARGEST_ANSWER)
            after = response.getheader("Retry-After")
        finally:
            connection.close()
        try:
            answer = json.loads(content)
        except ValueError:
            answer = content.decode("utf-8", "replace")
            if response.status == 200:  # cut off, or no server of this kind
                raise http.client.IncompleteRead(content) from None
        return response.status, answer, float(after) if after is not None and after.isdigit() else None


def _count(found: Any) -> int | None:
    return found if isinstance(found, int) else None


def _short(answer: Any) -> str:
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return " ".join(text.split())[:200]
