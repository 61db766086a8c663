"""A server that writes: what is sent, what is refused, and that neither a kill nor a dead server loses a row."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distill.core.errors import InputError, MachineError
from distill.core.forked import can_fork
from distill.stages.synthesize.asker import Asker
from distill.stages.synthesize.replies import Replies
from distill.stages.synthesize.requests import REFUSED, asked
from distill.stages.synthesize.server_writer import CUT, ServerWriter
from distill.stages.synthesize.writer_spec import ServerSpec
from tests.stages.chat_server import ChatServer, echo


def spec(server: ChatServer, **more: object) -> ServerSpec:
    return ServerSpec.model_validate({"server": server.address, "max_wait_s": 0.2, **more})


def written(writer: ServerWriter, count: int) -> dict[str, str]:
    requests = [asked(f"number {n}", 8) for n in range(count)]
    return {id: r.text for made in writer.write(requests, {one.id for one in requests}) for id, r in made}


def test_each_request_has_a_seed_a_limit_and_one_prompt() -> None:
    with ChatServer() as server:
        writer = ServerWriter(spec(server, parallel=3), seed=1)
        first = written(writer, 7)
        again = written(ServerWriter(spec(server, parallel=1), seed=1), 7)
        other = written(ServerWriter(spec(server), seed=2), 7)
        bodies = [body for body in server.bodies if "number" in body["messages"][0]["content"]]
    assert first == again
    assert {*first.values()} & {*other.values()} == set()
    assert all(body["max_tokens"] == 8 and body["model"] == "tiny" for body in bodies)
    assert len({body["seed"] for body in bodies[:7]}) == 7
    assert all(len(body["messages"]) == 1 and "n" not in body for body in bodies)


def test_a_busy_server_is_waited_for_and_a_wrong_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatServer(busy=2) as server:
        assert len(written(ServerWriter(spec(server, max_wait_s=20), seed=0), 2)) == 2
    with ChatServer(models=("a", "b")) as server:
        with pytest.raises(InputError, match="has a, b; name one"):
            ServerWriter(spec(server), seed=0)
        with pytest.raises(InputError, match="no model 'c'"):
            ServerWriter(spec(server, model="c"), seed=0)
    with pytest.raises(MachineError, match="does not answer"):
        ServerWriter(spec(server), seed=0)
    with ChatServer(lambda body: ("one two three", "stop")) as server:
        server.http.RequestHandlerClass.send, send = _without_limit, server.http.RequestHandlerClass.send  # type: ignore[attr-defined]
        try:
            with pytest.raises(InputError, match="ignores the limit"):
                ServerWriter(spec(server), seed=0)
        finally:
            server.http.RequestHandlerClass.send = send  # type: ignore[attr-defined]
    with ChatServer(key="right") as server:
        with pytest.raises(InputError, match="the environment has no A_KEY"):
            ServerWriter(spec(server, key_variable="A_KEY"), seed=0)
        monkeypatch.setenv("A_KEY", "wrong")
        with pytest.raises(InputError, match="HTTP 401"):
            ServerWriter(spec(server, key_variable="A_KEY"), seed=0)
        monkeypatch.setenv("A_KEY", "right")
        assert ServerWriter(spec(server, key_variable="A_KEY"), seed=0).model == "tiny"


def _without_limit(self: object, status: int, content: dict[str, object]) -> None:
    """As a server that counts more tokens than it may write."""
    if "usage" in content:
        content["usage"]["completion_tokens"] = 3  # type: ignore[index]
    data = json.dumps(content).encode()
    self.send_response(status)  # type: ignore[attr-defined]
    self.send_header("Content-Length", str(len(data)))  # type: ignore[attr-defined]
    self.end_headers()  # type: ignore[attr-defined]
    self.wfile.write(data)  # type: ignore[attr-defined]


def test_a_prompt_that_was_cut_and_an_answer_at_the_limit_are_told() -> None:
    with ChatServer(prompt_tokens=lambda body: 5) as server:
        (made,) = ServerWriter(spec(server), 0).write([one := asked("many " * 40, 8)], {one.id})
        assert made[0][1].finish == CUT
    with ChatServer(lambda body: ("half", "length")) as server:
        (made,) = ServerWriter(spec(server), 0).write([one := asked("few", 8)], {one.id})
        assert made[0][1].finish == "length"


def test_a_refused_prompt_is_one_dropped_reply() -> None:
    requests = [asked(("long " * 9 if n % 3 == 0 else "short ") + str(n), 8) for n in range(12)]
    with ChatServer(refuses=lambda body: 400 * body["messages"][0]["content"].startswith("long")) as server:
        writer = ServerWriter(spec(server, parallel=2), 0)
        made = dict(pair for some in writer.write(requests, {one.id for one in requests}) for pair in some)
        assert [made[one.id].finish == REFUSED for one in requests] == [n % 3 == 0 for n in range(12)]
        # what is left of a phase after a kill may be the long prompts alone
        left = {one.id for one in requests[::3]}
        again = dict(pair for some in writer.write(requests, left) for pair in some)
        assert {*again} == left
        with pytest.raises(InputError, match="HTTP 400"):  # none of a phase is taken
            list(writer.write(requests[::3], left))
        many = [asked(f"long {n}", 8) for n in range(40)]
        with pytest.raises(InputError, match="HTTP 400"):
            list(writer.write(many, {one.id for one in many}))
        assert sum(body["messages"][0]["content"].startswith("long ") for body in server.bodies) < 12 + 20


class Phase:
    """What an asker needs of a stage."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


def test_a_reply_that_failed_is_asked_for_again(tmp_path: Path) -> None:
    tries: dict[str, int] = {}

    def answer(body: dict[str, Any]) -> tuple[str, str]:
        said = body["messages"][0]["content"]
        tries[said] = tries.get(said, 0) + 1
        if said == "a" and tries[said] == 1:
            return "", "abort"
        return ("x", "content_filter") if said == "b" else ("yes", "length" if said == "c" else "stop")

    requests = [asked(said, 8) for said in "abcd"]
    for run in (1, 2):
        with ChatServer(answer) as server:
            phase, replies = Phase(), Replies(tmp_path, "w")
            asker = Asker(phase, ServerWriter(spec(server), 0), replies)  # type: ignore[arg-type]
            found = asker.ask("answers", requests)
        assert [one.finish for one in found] == ["stop", "content_filter", "length", "stop"]
        assert [one.id in replies for one in requests] == [True, False, True, True]
        assert tries["b"] == 3 * run
        assert any("1 are missing after 3 tries, they ended by: content_filter 1" in line for line in phase.said)
    assert (tries["a"], tries["c"], tries["d"]) == (2, 1, 1)


def test_waiting_is_told_and_has_an_end() -> None:
    with ChatServer(busy=1, retry_after=86400) as server:
        said: list[str] = []
        assert ServerWriter(spec(server, max_wait_s=0.8), 0, said.append).model == "tiny"
        assert len(said) == 1
        assert "does not answer (HTTP 503" in said[0]
        server.busy = 99
        with pytest.raises(MachineError, match="does not answer"):
            written(ServerWriter(spec(server, max_wait_s=0.7), 0, said.append), 1)


@pytest.mark.parametrize("address", ["http://localhost:80x/v1", "http://localhost:99999/v1", "http://a:0/v1",
                                     "http://a b/v1", "http://a/v\n1"])  # fmt: skip
def test_a_wrong_address_is_no_traceback(address: str) -> None:
    with pytest.raises(ValidationError, match="server"):
        ServerSpec(server=address)


def test_a_key_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatServer() as server:
        for key in ("sk-secret\nmore", "sk-secr\u00e9t"):
            monkeypatch.setenv("A_KEY", key)
            with pytest.raises(InputError, match="A_KEY holds a line break or a character beyond ASCII") as error:
                ServerWriter(spec(server, key_variable="A_KEY"), 0)
            assert "sk-" not in str(error.value)


def test_rows_survive_kills_of_the_server_and_of_the_run(tmp_path: Path) -> None:
    survive(tmp_path, num_rows=120, num_kills=5)


def survive(folder: Path, num_rows: int, num_kills: int) -> None:
    """The server dies so often in the middle, and each second time a line of the file is left half written."""
    requests = [asked(f"number {n}", 8) for n in range(num_rows)]
    deaths, each = 0, num_rows // (num_kills + 2)
    while True:
        replies = Replies(folder, "server, model tiny")
        needed = {one.id for one in requests if one.id not in replies}
        if not needed:
            break
        with ChatServer(fails=each + 1 if deaths < num_kills else None) as server:
            writer = ServerWriter(spec(server, parallel=8, max_wait_s=0), seed=3)
            before = len(replies)
            with pytest.raises(MachineError, match="what was written is kept") if deaths < num_kills else nullcontext():
                for made in writer.write(requests, needed):
                    replies.add(made)
            if deaths < num_kills:
                deaths += 1
                assert len(replies) >= before + each
        if deaths % 2 and needed:
            newest = sorted((folder / "replies").glob("*.jsonl"))[-1]
            with newest.open("ab") as stream:
                stream.write(b'{"id": "half a li')
    assert deaths == num_kills
    with ChatServer() as server:
        whole = written(ServerWriter(spec(server, parallel=8), seed=3), num_rows)
    assert {one.id: replies[one.id].text for one in requests} == whole
    lines = [line for file in (folder / "replies").glob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(lines) == len({json.loads(line)["id"] for line in lines}) == num_rows


@pytest.mark.skipif(not can_fork(), reason="needs forks")
def test_rows_survive_sigkill_of_the_run(tmp_path: Path) -> None:
    sigkilled(tmp_path, num_rows=60, num_kills=3)


def sigkilled(folder: Path, num_rows: int, num_kills: int) -> None:
    """The process that asks and stores is killed so often, each time after some more requests."""
    requests = [asked(f"number {n}", 8) for n in range(num_rows)]
    each = num_rows // (num_kills + 2)
    with ChatServer() as server:
        for _ in range(num_kills):
            before = len(server.bodies)
            child = os.fork()
            if child == 0:
                try:
                    replies = Replies(folder, "server, model tiny")
                    needed = {one.id for one in requests if one.id not in replies}
                    for made in ServerWriter(spec(server, parallel=4), seed=3).write(requests, needed):
                        replies.add(made)
                finally:
                    os._exit(0)
            until = time.monotonic() + 60
            while len(server.bodies) < before + each and time.monotonic() < until:
                time.sleep(0.002)
            os.kill(child, signal.SIGKILL)
            assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        replies = Replies(folder, "server, model tiny")
        assert 0 < len(replies) < num_rows
        needed = {one.id for one in requests if one.id not in replies}
        for made in ServerWriter(spec(server, parallel=4), seed=3).write(requests, needed):
            replies.add(made)
        whole = written(ServerWriter(spec(server, parallel=8), seed=3), num_rows)
    assert {one.id: Replies(folder, "server, model tiny")[one.id].text for one in requests} == whole
    lines = [line for file in (folder / "replies").glob("replies-*") for line in file.read_text().splitlines()]
    assert len(lines) == len({json.loads(line)["id"] for line in lines}) == num_rows


def test_replies_of_another_writer_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    with ChatServer(echo) as server:
        replies = Replies(tmp_path, "a")
        for made in ServerWriter(spec(server), 0).write([one := asked("hello", 4)], {one.id}):
            replies.add(made)
    with pytest.raises(InputError, match="holds replies of a, and the writer is now b"):
        Replies(tmp_path, "b")
    file = tmp_path / "replies" / "replies-00000.jsonl"
    file.write_bytes(file.read_bytes() + b'{"id": 3}\n')
    with pytest.raises(InputError, match=r"replies-00000\.jsonl:2: "):
        Replies(tmp_path, "a")


if __name__ == "__main__":  # the long form, with more rows and kills than a test has time for
    for name, long in (("server", survive), ("run", sigkilled)):
        with tempfile.TemporaryDirectory() as place:
            long(Path(place), num_rows=1000, num_kills=20)
        print(f"1,000 rows survived 20 kills of the {name}")
