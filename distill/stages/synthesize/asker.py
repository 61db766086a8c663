"""Asks a writer what has not been asked before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from distill.stages.progress_lines import ProgressLines
from distill.stages.session import StageContext
from distill.stages.synthesize.replies import Replies
from distill.stages.synthesize.requests import FINAL, Likelihood, LikelihoodRequest, Reply, Request, Writer

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

    def likelihoods(self, given: Sequence[LikelihoodRequest]) -> list[Likelihood]:
        """How likely the writer finds each answer, in their order; equal ones are asked for once."""
        unique = list({one.id: one for one in given}.values())
        needed = {one.id for one in unique if self._replies.likelihood(one.id) is None}
        before = len(unique) - len(needed)
        if unique:
            self._context.say(
                f"likelihoods: {len(unique):,} to compute" + (f", {before:,} are there" if before else "")
            )
        progress = ProgressLines(self._context, len(needed), ("likelihoods", "computed"))
        for found in self._writer.likelihoods(unique, needed) if needed else ():
            self._replies.add_likelihoods(found)
            for _ in found:
                progress.count(None)
        known = [self._replies.likelihood(one.id) for one in given]
        return [one for one in known if one is not None]

    def say(self, line: str) -> None:
        """Print one line for people."""
        self._context.say(line)
