"""The registration socket of ringfence: one JSON object a line in, one line out.

Invariant: a call ends within its timeout, reads a bounded answer, and returns a typed value or raises a `RingfenceError`.
Each call opens a connection of its own, because ringfence takes the caller's process from the connection: a connection that
outlived a fork would speak for the wrong process. Knows nothing of Airflow.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

PROTOCOL_VERSION = 1
SOCKET_ENVIRONMENT = "RINGFENCE_AIRFLOW_SOCKET"
SOCKET_DEFAULT = "/run/ringfence/airflow.sock"
TIMEOUT_SECONDS = 1.0
REQUEST_BYTES_MAX = 16 * 1024
ANSWER_BYTES_MAX = 1024 * 1024
READ_BYTES = 64 * 1024
# A unix socket whose backlog is full refuses at once instead of waiting, as when hundreds of tasks start together.
BACKLOG_PAUSE_SECONDS = 0.01


T = TypeVar("T")


class RingfenceError(Exception):
    """ringfence could not be asked, or said no. The text names the thing, the reason and the remedy."""


class Unreachable(RingfenceError):
    """Nothing answers at the socket, or not in time, or not in ringfence's language."""


class Refused(RingfenceError):
    """ringfence answered that it will not do this."""


@dataclass(frozen=True)
class TaskTry:
    """One try of a task instance, as it is registered. In Airflow 2 `instance` is empty and `try_number` 0: unknown."""

    airflow: str
    instance: str
    dag: str
    task: str
    run: str
    try_number: int
    map_index: int
    supervisor: str

    def as_request(self) -> dict[str, Any]:
        """The fields of the request `register`."""
        fields = dict(vars(self))
        fields["try"] = fields.pop("try_number")
        return fields


@dataclass(frozen=True)
class Registration:
    """What a registered task try may speak as; `identity` is None when the rules give it none."""

    identity: str | None
    rule: str | None
    tier: str | None
    denied: str | None
    remedy: str | None


@dataclass(frozen=True)
class Route:
    """A mesh service and where this host reaches it: `address` and `port`, or the path of a unix socket."""

    service: str
    address: str | None = None
    port: int | None = None
    unix: str | None = None

    def __str__(self) -> str:
        return f"unix:{self.unix}" if self.unix else f"{self.address}:{self.port}"


@dataclass(frozen=True)
class Lease:
    """A route of one task's own, for a process that runs many; `identity` is None when the rules give that task none."""

    route: Route
    identity: str | None
    rule: str | None
    denied: str | None
    remedy: str | None


@dataclass(frozen=True)
class RouteList:
    """Every route of this host, in ringfence's order, and the address of its admin port."""

    routes: tuple[Route, ...]
    admin: str | None


class Client:
    """Asks the ringfence of this host."""

    def __init__(self, path: str | None = None, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self.path = path or socket_path()
        self.timeout_seconds = timeout_seconds

    def register(self, task_try: TaskTry) -> Registration:
        """Tells that the calling process runs `task_try`."""
        answer = self._ask("register", task_try.as_request())
        names = ("identity", "rule", "tier", "denied", "remedy")
        return Registration(**{name: _optional(answer, name, str) for name in names})

    def unregister(self) -> None:
        """Tells that the calling process runs its task no more."""
        self._ask("unregister", {})

    def whoami(self) -> dict[str, Any]:
        """Who ringfence takes the calling process for."""
        return _required(self._ask("whoami", {}), "caller", dict)

    def routes(self) -> RouteList:
        """The mesh services that this host reaches."""
        answer = self._ask("routes", {})
        return RouteList(tuple(map(_route, _required(answer, "routes", list))), _optional(answer, "admin", str))

    def lease(self, upstream: str, task_try: TaskTry) -> Lease:
        """An address at which the calling process reaches `upstream` as `task_try`, until it ends."""
        fields = task_try.as_request()
        del fields["supervisor"]
        answer = self._ask("lease", {"upstream": upstream, **fields})
        route = Route(upstream, address=_required(answer, "address", str), port=_required(answer, "port", int))
        names = ("identity", "rule", "denied", "remedy")
        return Lease(route, **{name: _optional(answer, name, str) for name in names})

    def explain(self, dag: str, task: str, to: str) -> dict[str, Any]:
        """What the rules would give to a task that calls the service `to`, and why."""
        return _required(self._ask("explain", {"dag": dag, "task": task, "to": to}), "explanation", dict)

    def _ask(self, operation: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        request = json.dumps({"version": PROTOCOL_VERSION, "op": operation, **fields}).encode() + b"\n"
        if len(request) > REQUEST_BYTES_MAX:
            raise RingfenceError(
                f"the request `{operation}` has {len(request)} bytes, and ringfence reads at most {REQUEST_BYTES_MAX}: "
                "shorten the ids of the DAG, the task or the run"
            )
        answer = _decoded(_exchange(self.path, request, self.timeout_seconds), self.path)
        if answer.get("ok") is not True:
            raise Refused(_refusal(operation, answer))
        return answer


def socket_path() -> str:
    """Where ringfence listens, unless it is told otherwise."""
    return os.environ.get(SOCKET_ENVIRONMENT) or SOCKET_DEFAULT


def _exchange(path: str, request: bytes, timeout_seconds: float) -> bytes:
    """One request, one answer line, one deadline for both."""
    deadline = time.monotonic() + timeout_seconds
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            _connect(stream, path, deadline)
            stream.settimeout(_left(deadline))
            stream.sendall(request)
            return _line(stream, path, deadline)
    except FileNotFoundError:
        raise Unreachable(
            f"no socket at {path}: start `ringfence connect -airflow FILE` here, or set {SOCKET_ENVIRONMENT} to its `socket`"
        ) from None
    except PermissionError as error:
        raise Unreachable(f"{path}: {error.strerror}: let this user write by `socket_mode` in ringfence's rules file") from None
    except TimeoutError:
        raise Unreachable(f"{path}: no answer within {timeout_seconds:g} s: see ringfence's log and /healthz") from None
    except ConnectionRefusedError:
        raise Unreachable(f"{path}: a socket is there, but nobody listens: start ringfence on this host") from None
    except OSError as error:
        raise Unreachable(f"{path}: {error}: see ringfence's log on this host") from None


def _connect(stream: socket.socket, path: str, deadline: float) -> None:
    """Connects, and tries again for as long as the backlog is full."""
    while True:
        stream.settimeout(_left(deadline))
        try:
            return stream.connect(path)
        except BlockingIOError:
            time.sleep(min(BACKLOG_PAUSE_SECONDS, _left(deadline)))


def _line(stream: socket.socket, path: str, deadline: float) -> bytes:
    """Reads up to the first newline."""
    received = bytearray()
    while b"\n" not in received:
        stream.settimeout(_left(deadline))
        part = stream.recv(READ_BYTES)
        if not part:
            raise Unreachable(f"{path}: the connection was closed before an answer: see ringfence's log on this host")
        received += part
        if len(received) > ANSWER_BYTES_MAX:
            raise Unreachable(f"{path}: the answer is longer than {ANSWER_BYTES_MAX} bytes: is this ringfence's socket?")
    return bytes(received.partition(b"\n")[0])


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _decoded(line: bytes, path: str) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise Unreachable(f"{path}: the answer is not a JSON object ({line[:60]!r}): is this ringfence's socket?")
    return answer


def _refusal(operation: str, answer: Mapping[str, Any]) -> str:
    """ringfence's own words, with the remedy if it names one."""
    error, remedy = answer.get("error"), answer.get("remedy")
    text = str(error) if error else f"ringfence refused `{operation}` and gave no reason: see its log"
    return f"{text}: {remedy}" if remedy else text


def _route(entry: object) -> Route:
    if not isinstance(entry, dict):
        raise Unreachable(f"a route is {entry!r} instead of an object: use a ringfence of this package's version")
    service = _required(entry, "service", str)
    if unix := _optional(entry, "unix", str):
        return Route(service, unix=unix)
    return Route(service, address=_required(entry, "address", str), port=_required(entry, "port", int))


def _required(answer: Mapping[str, Any], name: str, kind: type[T]) -> T:
    value = _optional(answer, name, kind)
    if value is None:
        raise Unreachable(f"the answer lacks `{name}`: use a ringfence of this package's version")
    return value


def _optional(answer: Mapping[str, Any], name: str, kind: type[T]) -> T | None:
    value = answer.get(name)
    if value is not None and not isinstance(value, kind):
        raise Unreachable(f"`{name}` is {value!r} instead of a {kind.__name__}: use a ringfence of this package's version")
    return value
