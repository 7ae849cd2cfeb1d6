"""The listener registers before DAG code, and never fails or delays a task."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import time
from types import SimpleNamespace

import airflow
import pytest

from airflow_ringfence import listener
from airflow_ringfence.client import TaskTry

AIRFLOW_3 = not airflow.__version__.startswith("2.")
RUN = "scheduled__2026-11-24T00:00:00+00:00"
TRY = TaskTry(airflow.__version__, "01a2", "payroll", "load", RUN, 1, -1, "task")


class BeforeDagCode(Exception):
    """Raised in the place where Airflow would parse the DAG file."""


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    monkeypatch.setattr(listener, "_registered_pid", None)


@pytest.fixture
def of_task(monkeypatch):
    monkeypatch.setattr(listener, "of_component", lambda component: TRY)


def lines(caplog, level=logging.WARNING):
    return [record.getMessage() for record in caplog.records if record.name == listener.__name__ and record.levelno >= level]


def test_a_task_is_registered_and_taken_back(ringfence, of_task, caplog):
    caplog.set_level(logging.INFO)
    listener.on_starting(component=object())
    listener.before_stopping(component=object())
    assert ringfence.operations() == ["register", "unregister"]
    assert lines(caplog, logging.INFO) == ["ringfence: this task speaks as airflow-payroll (rule payroll)"]


def test_a_component_that_is_no_task_asks_nothing(ringfence):
    listener.on_starting(component=object())
    listener.before_stopping(component=object())
    assert ringfence.requests == []


def test_an_absent_ringfence_costs_one_line_and_no_task(socket_path, of_task, caplog):
    listener.on_starting(component=object())
    listener.before_stopping(component=object())
    (line,) = lines(caplog, logging.INFO)
    assert line.startswith(
        f"ringfence: this task is not registered, and its mesh connections will be denied: no socket at {socket_path}"
    )


def test_a_refused_registration_is_told_with_its_remedy(ringfence, of_task, caplog):
    ringfence.answers["register"] = {"ok": False, "error": "no airflow-worker above pid 7", "remedy": "see [[component]]"}
    listener.on_starting(component=object())
    listener.before_stopping(component=object())
    assert lines(caplog)[0].endswith("no airflow-worker above pid 7: see [[component]]")
    assert ringfence.operations() == ["register"]


def test_a_task_without_identity_learns_why(ringfence, of_task, caplog):
    ringfence.answers["register"] = {"ok": True, "identity": None, "denied": "no rule matches", "remedy": "add a rule"}
    listener.on_starting(component=object())
    assert lines(caplog) == ["ringfence: the rules give this task no mesh identity: no rule matches: add a rule"]


def test_a_silent_ringfence_delays_a_task_by_one_second_at_most(ringfence, of_task, silent, caplog):
    ringfence.answers["register"] = silent
    started = time.monotonic()
    listener.on_starting(component=object())
    assert time.monotonic() - started < 1.3
    assert "no answer within 1 s" in lines(caplog)[0]


def test_facts_that_cannot_be_told_cost_one_line_and_no_task(ringfence, monkeypatch, caplog):
    def broken(component):
        raise RuntimeError("no title")

    monkeypatch.setattr(listener, "of_component", broken)
    listener.on_starting(component=object())
    assert len(lines(caplog)) == 1
    assert ringfence.requests == []


def test_a_forked_child_does_not_take_its_parents_registration_back(ringfence, of_task, monkeypatch):
    listener.on_starting(component=object())
    monkeypatch.setattr(listener.os, "getpid", lambda: -1)
    listener.before_stopping(component=object())
    assert ringfence.operations() == ["register"]


def test_a_ringfence_that_went_away_does_not_disturb_the_end_of_a_task(ringfence, of_task, caplog):
    listener.on_starting(component=object())
    ringfence.close()
    listener.before_stopping(component=object())
    assert lines(caplog) == []


@pytest.mark.skipif(not AIRFLOW_3, reason="the task runner of Airflow 3")
def test_airflow_3_registers_a_task_before_its_dag_file_is_parsed(ringfence, monkeypatch):
    from airflow.sdk.execution_time import task_runner

    def parse(*_):
        raise BeforeDagCode

    monkeypatch.setattr(task_runner, "parse", parse)
    ti = SimpleNamespace(id="01a2", dag_id="payroll", task_id="load", run_id=RUN, try_number=1, map_index=4)
    with pytest.raises(BeforeDagCode):
        start(task_runner, ti, monkeypatch)
    (request,) = ringfence.requests
    assert (request["op"], request["instance"], request["dag"], request["task"]) == ("register", "01a2", "payroll", "load")
    assert (request["run"], request["try"], request["map_index"], request["supervisor"]) == (RUN, 1, 4, "task")


def start(task_runner, ti, monkeypatch):
    """Airflow's own first step in a task's process; before 3.2 it fetches its message itself."""
    if "msg" in inspect.signature(task_runner.startup).parameters:
        task_runner.startup(msg=SimpleNamespace(ti=ti))
    message = task_runner.StartupDetails.model_construct(ti=ti)
    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", SimpleNamespace(_get_response=lambda: message), raising=False)
    task_runner.startup()


@pytest.mark.skipif(AIRFLOW_3, reason="`airflow tasks run` of Airflow 2")
def test_airflow_2_registers_a_supervisor_before_its_dag_file_is_parsed(ringfence, monkeypatch):
    import setproctitle
    from airflow.cli.commands import task_command

    def get_dag(*_):
        raise BeforeDagCode

    monkeypatch.setattr(task_command, "get_dag", get_dag)
    command = ["airflow", "tasks", "run", "payroll", "load", RUN, "--local", "--map-index", "4"]
    setproctitle.setproctitle(f"airflow task supervisor: {command}")
    names = ("raw", "pickle", "cfg_path", "subdir", "read_from_db")
    args = argparse.Namespace(local=True, dag_id="payroll", task_id="load", **dict.fromkeys(names))
    with pytest.raises(BeforeDagCode):
        task_command.task_run.__wrapped__(args)
    (request,) = ringfence.requests
    assert (request["op"], request["instance"], request["dag"], request["task"]) == ("register", "", "payroll", "load")
    assert (request["run"], request["try"], request["map_index"], request["supervisor"]) == (RUN, 0, 4, "self")


def test_the_process_that_registered_is_remembered(ringfence, of_task):
    listener.on_starting(component=object())
    assert listener._registered_pid == os.getpid()
