"""Looks at each row of the metrics for own sequences that have become degenerate: endless, repeated, nearly certain.

What is normal depends on the text - a book has no end within a hundred tokens, a table repeats itself - so length and
repetition are held against the passages that stand in the text where the student wrote.
"""

from __future__ import annotations

from collections.abc import Callable

from distill.core.errors import DistillError
from distill.training.spec import OnPolicySpec


class Alarms:
    """Warns in one line when something new is wrong; stops the run where the spec says so.

    Args:
        spec: limits, and what to do.
        name: of the stage, for people.
        say: prints a line.
    """

    def __init__(self, spec: OnPolicySpec, name: str, say: Callable[[str], None]):
        self.spec, self.name, self.say = spec, name, say
        self._in_a_row = 0
        self._known: set[str] = set()

    def look(self, row: dict[str, float], step: int) -> None:
        """Take in a row of the metrics; rows without own sequences change nothing.

        Raises:
            DistillError: too many rows in a row gave an alarm, and ``on_alarm`` is stop.
        """
        if not row.get("on_policy/length"):
            return
        found = self._found(row)
        self._in_a_row = self._in_a_row + 1 if found else 0
        line = f"{self.name} step {step}: own sequences " + " and ".join(found.values())
        if self.spec.on_alarm == "stop" and self._in_a_row >= self.spec.num_alarms:
            raise DistillError(
                f"{line}, {self._in_a_row} rows of metrics in a row; lower on_policy.share or optimizer.lr, train "
                "off-policy first, or set on_alarm: warn"
            )
        if found.keys() - self._known:
            self.say(f"  warning: {line}")
        self._known = set(found)

    def _found(self, row: dict[str, float]) -> dict[str, str]:
        """What is wrong: name -> words."""
        limits, found = self.spec.alarms, {}
        for name, limit, words in (
            ("at_limit", limits.at_limit, f"reach max_new_tokens ({self.spec.max_new_tokens}) without an end"),
            ("repetition", limits.repetition, "repeat their own 4-grams"),
        ):
            own, text = row[f"on_policy/{name}"], row[f"on_policy/text_{name}"]
            if limit is not None and own - text > limit:
                found[name] = f"{words} ({own:.0%}, the text {text:.0%})"
        entropy = row["on_policy/entropy"]
        if limits.min_entropy is not None and entropy < limits.min_entropy:
            found["entropy"] = f"are nearly certain (entropy {entropy:.3f} nats a token)"
        return found
