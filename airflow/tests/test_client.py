"""The client ends in time, reads bounded answers, and says in a sentence what is wrong."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

from airflow_ringfence import client
from airflow_ringfence.client import Client, Lease, Refused, Registration, RingfenceError, Route, TaskTry, Unreachable

TRY = TaskTry("3.3.2", "01a2", "payroll_daily", "load", "scheduled__2026-11-24T00:00:00+00:00", 1, -1, "task")


def test_a_registration_has_exactly_the_fields_of_the_contract(ringfence):
    assert Client().register(TRY) == Registration("airflow-payroll", "payroll", "cgroup", None, None)
    assert ringfence.requests == [
        {
            "version": 1,
            "op": "register",
            "airflow": "3.3.2",
            "instance": "01a2",
            "dag": "payroll_daily",
            "task": "load",
            "run": "scheduled__2026-11-24T00:00:00+00:00",
            "try": 1,
            "map_index": -1,
            "supervisor": "task",
        }
    ]


def test_a_task_without_identity_is_registered_and_told_why(ringfence):
    ringfence.answers["register"] = {"ok": True, "identity": None, "denied": "no rule matches", "remedy": "add a rule"}
    assert Client().register(TRY) == Registration(None, None, None, "no rule matches", "add a rule")


def test_routes_are_addresses_or_unix_sockets(ringfence):
    told = Client().routes()
    assert told.routes[0] == Route("warehouse", address="127.0.0.1", port=25435)
    assert told.routes[2] == Route("ledger", unix="/run/mesh/ledger/.s.PGSQL.5432")
    assert told.admin == "127.0.0.1:1"
    assert [str(route) for route in told.routes[1:3]] == ["127.0.0.1:25436", "unix:/run/mesh/ledger/.s.PGSQL.5432"]


def test_whoami_explain_and_unregister_ask_for_what_they_say(ringfence):
    ringfence.answers["explain"] = {"ok": True, "explanation": {"rule": "payroll"}}
    assert Client().whoami()["who"] == "unidentified"
    assert Client().explain("d", "t", "warehouse") == {"rule": "payroll"}
    assert Client().unregister() is None
    assert ringfence.requests[1] == {"version": 1, "op": "explain", "dag": "d", "task": "t", "to": "warehouse"}
    assert ringfence.operations() == ["whoami", "explain", "unregister"]


def test_a_lease_is_a_route_of_the_tasks_own(ringfence):
    route = Route("warehouse", address="127.90.1.2", port=15006)
    assert Client().lease("warehouse", TRY) == Lease(route, "airflow-payroll", "payroll", None, None)
    assert ringfence.requests == [
        {
            "version": 1,
            "op": "lease",
            "upstream": "warehouse",
            "airflow": "3.3.2",
            "instance": "01a2",
            "dag": "payroll_daily",
            "task": "load",
            "run": "scheduled__2026-11-24T00:00:00+00:00",
            "try": 1,
            "map_index": -1,
        }
    ]
    ringfence.answers["lease"] = {"ok": True, "port": 15006}
    with pytest.raises(Unreachable, match="the answer lacks `address`"):
        Client().lease("warehouse", TRY)


def test_a_refusal_carries_the_remedy(ringfence):
    ringfence.answers["register"] = {"ok": False, "error": "pid 7 is registered for d.other", "remedy": "restart the worker"}
    with pytest.raises(Refused, match=r"^pid 7 is registered for d\.other: restart the worker$"):
        Client().register(TRY)
    ringfence.answers["register"] = {"ok": False}
    with pytest.raises(Refused, match="refused `register` and gave no reason"):
        Client().register(TRY)


def test_an_absent_socket_is_named_with_the_remedy(socket_path):
    with pytest.raises(Unreachable, match=f"no socket at {socket_path}: start `ringfence connect -airflow FILE`"):
        Client().whoami()


def test_a_socket_without_a_listener_is_told_from_an_absent_one(ringfence):
    ringfence.stop_listening()
    with pytest.raises(Unreachable, match="a socket is there, but nobody listens"):
        Client().whoami()


def test_a_silent_ringfence_costs_no_more_than_the_timeout(ringfence, silent):
    ringfence.answers["whoami"] = silent
    started = time.monotonic()
    with pytest.raises(Unreachable, match=r"no answer within 0\.3 s"):
        Client(timeout_seconds=0.3).whoami()
    assert time.monotonic() - started < 0.6


def test_an_answer_that_drips_costs_no_more_than_the_timeout(ringfence):
    def drip(connection: socket.socket) -> None:
        for _ in range(100):
            connection.sendall(b" ")
            time.sleep(0.02)

    ringfence.answers["whoami"] = drip
    started = time.monotonic()
    with pytest.raises(Unreachable, match="no answer within"):
        Client(timeout_seconds=0.3).whoami()
    assert time.monotonic() - started < 0.6


def test_a_full_backlog_is_waited_for(socket_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(socket_path))
        listener.listen(0)
        waiting = _fill(str(socket_path))

        def serve_late() -> None:
            time.sleep(0.2)
            for _ in waiting:
                listener.accept()[0].close()
            connection, _ = listener.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(b'{"ok":true,"caller":{"who":"task"}}\n')

        server = threading.Thread(target=serve_late)
        server.start()
        assert Client(timeout_seconds=5).whoami() == {"who": "task"}
        server.join()
        for connection in waiting:
            connection.close()


def _fill(path: str) -> list[socket.socket]:
    waiting = []
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(path)
        except BlockingIOError:
            connection.close()
            return waiting
        waiting.append(connection)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"", "closed before an answer"),
        (b"hello\n", "not a JSON object"),
        (b"[1]\n", "not a JSON object"),
        (b'{"ok":true}\n', "lacks `caller`"),
        (b'{"ok":true,"caller":[]}\n', "`caller` is .* instead of a dict"),
    ],
)
def test_what_is_not_ringfences_language_is_unreachable(ringfence, answer, says):
    ringfence.answers["whoami"] = answer
    with pytest.raises(Unreachable, match=says):
        Client().whoami()


@pytest.mark.parametrize(
    "route", [7, {"service": "x"}, {"service": "x", "address": "127.0.0.1"}, {"address": "127.0.0.1", "port": 1}]
)
def test_a_malformed_route_is_unreachable_and_no_traceback(ringfence, route):
    ringfence.answers["routes"] = {"ok": True, "routes": [route]}
    with pytest.raises(Unreachable):
        Client().routes()


def test_an_endless_answer_is_cut(ringfence, monkeypatch):
    monkeypatch.setattr(client, "ANSWER_BYTES_MAX", 1024)
    ringfence.answers["whoami"] = b"x" * 4096
    with pytest.raises(Unreachable, match="longer than 1024 bytes"):
        Client().whoami()


def test_a_request_that_ringfence_would_not_read_is_not_sent(ringfence):
    with pytest.raises(RingfenceError, match="reads at most 16384"):
        Client().explain("d" * 20_000, "t", "s")
    assert ringfence.requests == []


def test_an_answer_is_read_whole_from_any_number_of_pieces(ringfence):
    def in_pieces(connection: socket.socket) -> None:
        for byte in json.dumps({"ok": True, "caller": {"who": "task"}}).encode() + b"\nmore":
            connection.sendall(bytes([byte]))

    ringfence.answers["whoami"] = in_pieces
    assert Client().whoami() == {"who": "task"}
