"""Asks a writer what has not been asked before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from distill.data.base import Message
from distill.stages.progress_lines import ProgressLines
from distill.stages.session import StageContext
from distill.stages.synthesize.replies import Replies
from distill.stages.synthesize.requests import FINAL, Reply, Request, Writer

TRIES = 3
"""Times that a reply is asked for which the writer neither ended nor cut at its limit."""


class Asker:
    """What makers and filters ask.

    Args:
        context: of the stage.
        writer: who writes.
        replies: what was written before.
    """

    def __init__(self, context: StageContext, writer: Writer, replies: Replies):
        self._context, self._writer, self._replies = context, writer, replies

    def ask(self, what: str, requests: Sequence[Request]) -> list[Reply]:
        """The reply to each request, in the order of the requests.

        Args:
            what: is written, such as "questions", for lines about the progress.
            requests: equal ones are asked once.
        """
        unique = list({request.id: request for request in requests}.values())
        needed = {request.id for request in unique if request.id not in self._replies}
        before = len(unique) - len(needed)
        if unique:
            self._context.say(f"{what}: {len(unique):,} to write" + (f", {before:,} are there" if before else ""))
        progress = ProgressLines(self._context, len(needed), (what, "written"))
        failed: dict[str, Reply] = {}  # id of a request -> its reply, which is not kept
        for _ in range(TRIES):
            failed = {}
            for made in self._writer.write(unique, needed) if needed else ():
                kept = [(id, reply) for id, reply in made if reply.finish in FINAL]
                failed |= {id: reply for id, reply in made if reply.finish not in FINAL}
                self._replies.add(kept)
                for _ in kept:
                    progress.count(None)
            needed = set(failed)
        if failed:
            why = Counter(reply.finish for reply in failed.values())
            ended = ", ".join(f"{finish} {count:,}" for finish, count in why.items())
            self._context.say(f"{what}: {len(failed):,} are missing after {TRIES} tries, they ended by: {ended}")
        return [failed.get(request.id) or self._replies[request.id] for request in requests]

    def log_probabilities(self, pairs: Sequence[tuple[tuple[Message, ...], str]]) -> list[float]:
        """See :meth:`Writer.log_probabilities`."""
        return self._writer.log_probabilities(pairs)

    def say(self, line: str) -> None:
        """Print one line for people."""
        self._context.say(line)
