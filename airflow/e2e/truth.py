"""What tasks said of themselves in the warehouse, beside what ringfence logged of their connections.

A task writes its DAG, task, run, try, map index and local port over the connection that is being looked at. The log's line
for that port must say the same. Airflow 2 tells no try, which the log writes as 0.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from e2e.servers import Postgres

# How the log calls connections that never reached the warehouse, so that the task could say nothing over them.
DENIED = ("caller_denied", "denied_by_peer")


@dataclass(frozen=True)
class Statement:
    """One connection, as the task that opened it says."""

    dag: str
    task: str
    run: str
    number: int
    map_index: int
    how: str
    port: int


def statements(postgres: Postgres) -> list[Statement]:
    """All of them, in the order in which they were made."""
    rows = postgres.query("select dag, task, run, try, map_index, how, port from truth order by at", "warehouse")
    return [
        Statement(dag, task, run, int(number), int(index), how, int(port)) for dag, task, run, number, index, how, port in rows
    ]


def differences(said: list[Statement], lines: list[dict[str, Any]], knows_try: bool) -> list[str]:
    """Where the log and the tasks do not agree, connection by connection."""
    wrong = []
    by_port: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        by_port.setdefault(int(line["downstream"].rsplit(":", 1)[1]), []).append(line)
    for one in (one for one in said if one.port):
        want = (one.dag, one.task, one.run, one.number if knows_try else 0, one.map_index)
        have = [_who(line) for line in by_port.get(one.port, [])]
        if want not in have:
            wrong.append(f"{one.how}: the task says {want}, the log {have or 'nothing'}")
    return wrong + _counted(said, lines)


def _who(line: dict[str, Any]) -> tuple[Any, ...]:
    caller = line.get("caller") or {}
    return tuple(caller.get(key) for key in ("dag", "task", "run", "try", "map_index"))


def _counted(said: list[Statement], lines: list[dict[str, Any]]) -> list[str]:
    """No task has a connection more, or less, in the log than it says. psql tells no port, but counts."""
    want = Counter((one.dag, one.task, one.run, one.map_index) for one in said)
    have = Counter(
        tuple(line["caller"].get(key) for key in ("dag", "task", "run", "map_index"))
        for line in lines
        if line["reason"] not in DENIED
    )
    return [
        f"{who}: {want[who]} connections by the task's word, {have[who]} in the log"
        for who in {*want, *have}
        if want[who] != have[who]
    ]
