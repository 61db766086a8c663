"""Detects degenerate on-policy samples: without an end, repetitive, or with very low entropy.

Normal values of length and repetition depend on the text: a book has no end within a hundred tokens, and a table
repeats itself. So both are compared with the passages of the text that follow the same prompts.
"""

from __future__ import annotations

from collections.abc import Callable

from distill.core.errors import DistillError
from distill.training.spec import OnPolicySpec


class Alarms:
    """Prints one line when a new limit is exceeded, and stops the run if the spec says so.

    Args:
        spec: limits, and what to do if they are exceeded.
        name: name of the stage, for messages.
        say: function that prints a line.
    """

    def __init__(self, spec: OnPolicySpec, name: str, say: Callable[[str], None]):
        self.spec, self.name, self.say = spec, name, say
        self._in_a_row = 0
        self._known: set[str] = set()

    def look(self, row: dict[str, float], step: int) -> None:
        """Check a row of the metrics. Rows without on-policy samples are ignored.

        Raises:
            DistillError: ``num_alarms`` rows in a row exceeded a limit, and ``on_alarm`` is stop.
        """
        if not row.get("on_policy/length"):
            return
        found = self._found(row)
        self._in_a_row = self._in_a_row + 1 if found else 0
        line = f"{self.name} step {step}: on-policy samples " + " and ".join(found.values())
        if self.spec.on_alarm == "stop" and self._in_a_row >= self.spec.num_alarms:
            raise DistillError(
                f"{line}, {self._in_a_row} rows of metrics in a row; lower on_policy.share or optimizer.lr, train "
                "off-policy first, or set on_alarm: warn"
            )
        if found.keys() - self._known:
            self.say(f"  warning: {line}")
        self._known = set(found)

    def _found(self, row: dict[str, float]) -> dict[str, str]:
        """The limits that the row exceeds: name -> words for the message."""
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
            found["entropy"] = f"are nearly certain (entropy {entropy:.3f} nats per token)"
        return found
