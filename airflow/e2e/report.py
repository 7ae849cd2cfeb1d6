"""What was checked: a line at once, a table at the end."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was checked, in one deployment."""

    deployment: str
    what: str
    ok: bool
    detail: str
    seconds: float


class Report:
    """Collects checks and tells progress."""

    def __init__(self, is_json: bool) -> None:
        self.is_json = is_json
        self.checks: list[Check] = []
        self.deployment = "machine"
        self.notes: list[str] = []
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """A line of progress, on standard error when the result is JSON."""
        print(f"{self.seconds():6.1f} s  {text}", file=sys.stderr if self.is_json else sys.stdout, flush=True)

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def check(self, what: str, ok: bool, detail: str = "") -> bool:
        """Notes one result."""
        self.checks.append(Check(self.deployment, what, bool(ok), detail, round(self.seconds(), 1)))
        self.say(f"{'ok    ' if ok else 'FAILED'}  {what}{': ' + detail if detail else ''}")
        return bool(ok)

    def note(self, text: str) -> None:
        """Something to know that is neither right nor wrong."""
        self.notes.append(f"{self.deployment}: {text}")
        self.say(f"note    {text}")

    def passed(self) -> bool:
        """Whether all is well."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    def finish(self, ran: str) -> None:
        """Prints the table, or the JSON."""
        if self.is_json:
            print(
                json.dumps(
                    {
                        "ran": ran,
                        "passed": self.passed(),
                        "seconds": round(self.seconds(), 1),
                        "notes": self.notes,
                        "checks": [asdict(check) for check in self.checks],
                    }
                )
            )
            return
        print(f"\n== what ran: {ran}")
        for check in self.checks:
            result, detail = "ok    " if check.ok else "FAILED", f": {check.detail}" if check.detail else ""
            print(f"{result}  {check.deployment:<14} {check.what}{detail}")
        for note in self.notes:
            print(f"note    {note}")
        failed = sum(not check.ok for check in self.checks)
        print(f"== {len(self.checks)} checks in {self.seconds():.0f} s: {'all ok' if self.passed() else f'{failed} FAILED'}")
