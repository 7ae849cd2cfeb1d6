"""doctor names what is missing and its remedy, and one check that fails hides no other."""

from __future__ import annotations

import json

import pytest

from airflow_ringfence import doctor
from airflow_ringfence.command_line import main

BACKEND = "airflow_ringfence.secrets.RingfenceSecretsBackend"


def findings(check):
    return [(finding.result, finding.text) for finding in doctor.examine() if finding.check == check]


@pytest.fixture
def backend(monkeypatch):
    def configure(name=BACKEND, **kwargs):
        monkeypatch.setenv("AIRFLOW__SECRETS__BACKEND", name)
        monkeypatch.setenv("AIRFLOW__SECRETS__BACKEND_KWARGS", json.dumps(kwargs))

    return configure


def test_with_everything_in_place_nothing_fails(ringfence, backend, capsys):
    backend()
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "ok       socket: ringfence answers at" in printed
    assert "ok       plugin: Airflow has loaded the listener" in printed
    assert f"ok       secrets backend: [secrets] backend is {BACKEND}" in printed
    assert "ok       routes: warehouse at 127.0.0.1:25435" in printed
    assert "failed" not in printed


def test_the_same_as_json(ringfence, capsys):
    main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert {finding["check"] for finding in told} >= {"versions", "socket", "whoami", "plugin", "cgroup", "routes"}


def test_without_ringfence_it_fails_and_still_looks_at_the_rest(socket_path, capsys):
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert f"failed   socket: no socket at {socket_path}" in printed
    assert "ok       versions: Airflow" in printed
    assert "plugin: " in printed


def test_a_check_that_breaks_is_a_warning(ringfence, monkeypatch):
    def broken():
        raise KeyError("x")
        yield

    monkeypatch.setitem(doctor.CHECKS, "plugin", broken)
    assert findings("plugin") == [("warning", "could not be looked at: KeyError: 'x'")]


def test_another_backend_is_to_become_the_inner_one(ringfence, backend):
    backend("airflow.secrets.local_filesystem.LocalFilesystemBackend")
    ((result, text),) = findings("secrets backend")
    assert result == "warning"
    assert text.endswith(f"to {BACKEND}, and inner_backend to airflow.secrets.local_filesystem.LocalFilesystemBackend")


def test_fail_closed_off_is_a_warning(ringfence, backend):
    backend(fail_closed=False)
    assert [result for result, _ in findings("secrets backend")] == ["ok", "warning"]


@pytest.mark.parametrize(
    ("caller", "whoami", "cgroup"),
    [
        (
            {"who": "task", "dag": "d", "task": "t", "try": 1, "tier": "cgroup", "identity": "i", "rule": "r"},
            ("ok", "this process is task d.t, try 1 and speaks as i (rule r)"),
            ("ok", "this task has a cgroup of its own"),
        ),
        (
            {"who": "task", "dag": "d", "task": "t", "tier": "ancestor", "denied": "no rule"},
            ("hint", "this process is task d.t, try ? and has no identity (no rule); right in a shell"),
            ("warning", "this task is known by its ancestor only: see `cgroup` in ringfence's rules file"),
        ),
        (
            {"who": "component", "component": "airflow-worker", "identity": "airflow-worker", "rule": "airflow-worker"},
            ("ok", "this process is component airflow-worker and speaks as airflow-worker (rule airflow-worker)"),
            None,
        ),
    ],
)
def test_who_this_process_is_and_how_tasks_are_told_apart(ringfence, caller, whoami, cgroup):
    ringfence.answers["whoami"]["caller"] = caller
    assert findings("whoami") == [whoami]
    if cgroup:
        assert findings("cgroup") == [cgroup]


def test_a_host_without_cgroup_v2_is_a_warning(ringfence, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "CGROUPS", tmp_path / "absent")
    assert findings("cgroup")[0][0] == "warning"


def test_a_host_without_routes_is_a_warning(ringfence):
    ringfence.answers["routes"]["routes"] = []
    assert findings("routes")[0] == (
        "warning",
        "no mesh service is reachable from here: add upstreams to this host's sidecar registration in Consul",
    )


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("postgres://u@db.example.com/x", []),
        ("postgres://u@warehouse.virtual.consul/x", [("ok", "dw goes through the mesh to warehouse.virtual.consul")]),
        (
            "postgres://u@warehouse.virtual.consul/x?sslmode=verify-full",
            [("ok", "dw goes"), ("hint", "dw: sslmode=verify-full checks")],
        ),
        (
            "postgres://u@warehouse.virtual.consul/x?sslmode=require",
            [("ok", "dw goes"), ("hint", "dw: sslmode=require needs a second")],
        ),
        ("http://nowhere.virtual.consul", [("failed", "dw: ringfence has no route to it")]),
    ],
)
def test_mesh_connections_are_looked_at_one_by_one(ringfence, backend, monkeypatch, uri, told):
    backend()
    monkeypatch.setenv("AIRFLOW_CONN_DW", uri)
    found = [finding for finding in findings("connections") if finding[1].startswith("dw")]
    assert [result for result, _ in found] == [result for result, _ in told]
    assert all(text.startswith(expected) for (_, text), (_, expected) in zip(found, told, strict=True))


def test_a_database_that_does_not_answer_is_said(ringfence):
    assert findings("connections")[-1][1].startswith("the database's Connections were not looked at (OperationalError)")
