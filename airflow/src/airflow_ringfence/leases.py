"""Addresses of a task's own, for the triggerer: one process that runs many tasks, which no socket tells apart.

Invariant: an answer is used for at most `FRESH_SECONDS`, and after one that failed ringfence is not asked again within
`RETRY_SECONDS`: for the same task and upstream when it refused, for any when it did not answer. One question at a time is under
way. What is kept belongs to the process that asked: a forked child asks for itself.

Trust: whoever knows an address speaks as its task. All triggers of a triggerer share its memory, so this separates honest code
only.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass

from airflow_ringfence.client import Client, Lease, RingfenceError, Route, TaskTry, Unreachable, socket_path

log = logging.getLogger(__name__)

FRESH_SECONDS = 30.0
RETRY_SECONDS = 1.0
# Texts that were said; each names a setting, or one task that has no identity.
SAID_MAX = 1024

# The socket, the task try and the upstream; the socket alone while nobody answers there.
Key = tuple[str, TaskTry, str] | tuple[str]


@dataclass(frozen=True)
class Kept:
    """An answer, or why there was none, and until when it holds."""

    outcome: Lease | RingfenceError
    until_seconds: float


_lock = threading.Lock()
_kept: dict[Key, Kept] = {}
_said: set[str] = set()


def own_route(task: TaskTry, common: Route) -> Route:
    """Where `task` reaches the service of `common` as itself; `common`, where it speaks as its component, if leases are not set
    up. Raises `Unreachable` if ringfence does not answer.
    """
    try:
        lease = leased(task, common.service)
    except Unreachable:
        raise
    except RingfenceError as error:
        _say_once(
            f"ringfence gives this process no addresses for its tasks, so triggers speak as the triggerer: {error}. "
            "README of airflow-provider-ringfence, `Triggers`, has the settings."
        )
        return common
    if lease.identity is None:
        _say_once(
            f"ringfence: the rules give the trigger of {task.dag}.{task.task} no mesh identity: "
            f"{lease.denied or 'no reason was told'}: {lease.remedy or 'see `airflow mesh explain`'}"
        )
    return lease.route


def leased(task: TaskTry, upstream: str) -> Lease:
    """The lease of `task` for `upstream`, at most `FRESH_SECONDS` old. Raises `RingfenceError` if there is none."""
    path = socket_path()
    key = (path, task, upstream)
    with _lock:
        now = time.monotonic()
        kept = _fresh(key, now) or _fresh((path,), now)
        outcome = kept.outcome if kept else _asked(key)
    if isinstance(outcome, RingfenceError):
        raise outcome
    return outcome


def forget() -> None:
    """Lets the next look-up ask ringfence, and everything be said again."""
    global _lock
    _lock = threading.Lock()
    _kept.clear()
    _said.clear()


# A lock that another thread held at a fork is nobody's in the child.
os.register_at_fork(after_in_child=forget)


def _fresh(key: Key, now: float) -> Kept | None:
    kept = _kept.get(key)
    return kept if kept and now < kept.until_seconds else None


def _asked(key: tuple[str, TaskTry, str]) -> Lease | RingfenceError:
    """ringfence's answer, which is kept. What is old goes, so that tasks of long ago take no memory."""
    path, task, upstream = key
    try:
        outcome: Lease | RingfenceError = Client(path).lease(upstream, task)
    except RingfenceError as error:
        outcome = error
    now = time.monotonic()
    for old in [old for old, kept in _kept.items() if now >= kept.until_seconds]:
        del _kept[old]
    seconds = RETRY_SECONDS if isinstance(outcome, RingfenceError) else FRESH_SECONDS
    _kept[(path,) if isinstance(outcome, Unreachable) else key] = Kept(outcome, now + seconds)
    return outcome


def _say_once(text: str) -> None:
    if text in _said:
        return
    if len(_said) >= SAID_MAX:
        _said.clear()
    _said.add(text)
    log.warning("%s", text)
