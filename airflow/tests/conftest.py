"""A ringfence of the test's own at a real unix socket, and an Airflow home that belongs to this run."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before the first import of Airflow, which reads them.
AIRFLOW_HOME = tempfile.mkdtemp(prefix="ringfence-airflow-")
os.environ.update(
    AIRFLOW_HOME=AIRFLOW_HOME,
    AIRFLOW__CORE__LOAD_EXAMPLES="False",
    AIRFLOW__CORE__DAGS_FOLDER=f"{AIRFLOW_HOME}/dags",
    AIRFLOW__CORE__UNIT_TEST_MODE="False",
    AIRFLOW__DATABASE__SQL_ALCHEMY_CONN=f"sqlite:///{AIRFLOW_HOME}/airflow.db",
)
for name in ("RINGFENCE_AIRFLOW_SOCKET", "RINGFENCE_ADMIN", "AIRFLOW__SECRETS__BACKEND", "AIRFLOW__WORKERS__SECRETS_BACKEND"):
    os.environ.pop(name, None)

from airflow_ringfence import leases, routes  # noqa: E402

ROUTES = [
    {"service": "warehouse", "address": "127.0.0.1", "port": 25435},
    {"service": "Lake", "address": "127.0.0.1", "port": 25436},
    {"service": "ledger", "unix": "/run/mesh/ledger/.s.PGSQL.5432"},
    {"service": "queue", "unix": "/run/mesh/queue.sock"},
]


class Ringfence:
    """Answers from `answers`, by operation: a dict, or bytes as they are, or a function that takes the connection."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.requests: list[dict[str, Any]] = []
        self.answers: dict[str, Any] = {
            "register": {"ok": True, "identity": "airflow-payroll", "rule": "payroll", "tier": "cgroup"},
            "unregister": {"ok": True},
            "whoami": {
                "ok": True,
                "caller": {"who": "unidentified", "identity": None, "denied": "no rule", "tier": "unidentified"},
            },
            "routes": {"ok": True, "routes": ROUTES, "admin": "127.0.0.1:1"},
            "lease": {"ok": True, "address": "127.90.1.2", "port": 15006, "identity": "airflow-payroll", "rule": "payroll"},
        }
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen(16)
        threading.Thread(target=self._serve, daemon=True).start()

    def operations(self) -> list[str]:
        return [request["op"] for request in self.requests]

    def close(self) -> None:
        """Goes away, as a stopped ringfence does."""
        self.stop_listening()
        Path(self.path).unlink(missing_ok=True)

    def stop_listening(self) -> None:
        """Dies, and leaves its socket behind."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                request = json.loads(line)
                self.requests.append(request)
                answer = self.answers[request["op"]]
                with contextlib.suppress(OSError):
                    if callable(answer):
                        answer(connection)
                    else:
                        connection.sendall(answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\n")
                if not isinstance(answer, dict):
                    return


@pytest.fixture
def socket_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A path for the socket, short enough for a unix address; nobody is there."""
    directory = Path(tempfile.mkdtemp(prefix="rf-", dir="/tmp"))
    monkeypatch.setenv("RINGFENCE_AIRFLOW_SOCKET", str(directory / "s"))
    routes.forget()
    leases.forget()
    yield directory / "s"
    routes.forget()
    leases.forget()
    shutil.rmtree(directory)


@pytest.fixture
def ringfence(socket_path: Path) -> Iterator[Ringfence]:
    server = Ringfence(socket_path)
    yield server
    if Path(server.path).exists():
        server.close()


@pytest.fixture
def silent() -> Iterator[Callable[[socket.socket], None]]:
    """An answer that does not come until the test has ended."""
    over = threading.Event()
    yield lambda connection: over.wait(10) and None
    over.set()


def pytest_sessionfinish() -> None:
    shutil.rmtree(AIRFLOW_HOME, ignore_errors=True)
