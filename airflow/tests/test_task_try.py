"""Every supported version tells which try runs, from what Airflow wrote before DAG code could."""

from __future__ import annotations

import types
import uuid
from types import SimpleNamespace

import airflow
import pytest

from airflow_ringfence import task_try
from airflow_ringfence.client import TaskTry
from airflow_ringfence.task_try import FactsMissing, of_component, of_trigger

TI = "01a20359-e6c5-7c3e-8c3a-0d2b8f5f2a10"
RUN = "scheduled__2026-11-24T00:00:00+00:00"
AIRFLOW_3 = not airflow.__version__.startswith("2.")
BOUND = {"ti_id": TI, "dag_id": "payroll", "task_id": "load", "run_id": RUN, "try_number": 2, "map_index": 3, "logger": "x"}


class TaskRunnerMarker:
    """As the Task SDK names it."""


class TaskCommandMarker:
    """As Airflow 2 names it."""


@pytest.fixture
def process(monkeypatch):
    """A process with a logging context, a title and a command line of the test's choice."""

    def become(context=None, title="python", argv=("airflow",)):
        monkeypatch.setattr(task_try, "_logging_context", lambda: dict(context or {}))
        monkeypatch.setattr(task_try, "_title", lambda: title)
        monkeypatch.setattr(task_try.sys, "argv", list(argv))

    return become


def test_the_logging_context_of_3_2_2_and_later_tells_everything(process):
    process(BOUND)
    assert of_component(TaskRunnerMarker()) == TaskTry(airflow.__version__, TI, "payroll", "load", RUN, 2, 3, "task")


def test_a_task_that_is_not_mapped_has_index_minus_one(process):
    process({**BOUND, "map_index": None})
    assert of_component(TaskRunnerMarker()).map_index == -1


def test_the_startup_message_tells_everything_before_3_2_2(process):
    process(title=f"airflow worker -- {TI}")
    ti = SimpleNamespace(id=uuid.UUID(TI), dag_id="payroll", task_id="load", run_id=RUN, try_number=1, map_index=-1)
    namespace = {"__name__": "airflow.sdk.execution_time.task_runner", "listener": lambda: of_component(TaskRunnerMarker())}
    found = types.FunctionType(_startup.__code__, namespace, "startup")(SimpleNamespace(ti=ti))
    assert found == TaskTry(airflow.__version__, TI, "payroll", "load", RUN, 1, -1, "task")


def _startup(msg):
    return listener()  # noqa: F821 (of the namespace that the test gives it)


_startup.__code__ = _startup.__code__.replace(co_name="startup")


def test_a_startup_of_other_code_is_not_read(process):
    process(title=f"airflow worker -- {TI}")
    namespace = {"__name__": "dags.payroll", "listener": lambda: of_component(TaskRunnerMarker())}
    with pytest.raises(FactsMissing):
        types.FunctionType(_startup.__code__, namespace, "startup")(SimpleNamespace(ti=None))


def test_a_title_alone_is_named_with_what_lacks_and_the_remedy(process):
    process(title=f"airflow worker -- {TI}")
    with pytest.raises(FactsMissing, match=rf"only its title \('airflow worker -- {TI}'\).*use Airflow 3\.2\.2 or later"):
        of_component(TaskRunnerMarker())


def supervisor(*words: str) -> str:
    return f"airflow task supervisor: {['airflow', 'tasks', 'run', *words]}"


@pytest.mark.parametrize(
    ("words", "map_index"),
    [
        (("payroll", "load", RUN, "--local", "--subdir", "DAGS_FOLDER/payroll.py"), -1),
        (("payroll", "load", RUN, "--local", "--map-index", "7"), 7),
        (("payroll", "load", RUN, "--map-index=7"), 7),
    ],
)
def test_the_supervisors_title_tells_the_try_in_airflow_2(process, words, map_index):
    process(title=supervisor(*words), argv=("celery", "worker"))
    assert of_component(TaskCommandMarker()) == TaskTry(airflow.__version__, "", "payroll", "load", RUN, 0, map_index, "self")


def test_a_run_id_with_spaces_and_quotes_is_read_whole(process):
    process(title=supervisor("payroll", "load", 'it\'s a "manual" run', "--local"))
    assert of_component(TaskCommandMarker()).run == 'it\'s a "manual" run'


def test_a_new_interpreter_is_told_by_its_command_line(process):
    process(
        title="/usr/bin/python /bin/airflow tasks run", argv=("/bin/airflow", "tasks", "run", "payroll", "load", RUN, "--raw")
    )
    assert of_component(TaskCommandMarker()) == TaskTry(airflow.__version__, "", "payroll", "load", RUN, 0, -1, "self")


def test_the_forked_runner_of_airflow_2_stands_under_its_supervisor(process):
    process(title=f"airflow task runner: payroll load {RUN} 17")
    assert of_component(TaskCommandMarker()) is None


@pytest.mark.parametrize(
    "title", ["python", "airflow task supervisor: ['airflow', 'tasks', 'run', 'pay", "airflow task supervisor: 7"]
)
def test_a_title_that_tells_nothing_is_named(process, title):
    process(title=title)
    with pytest.raises(FactsMissing, match="neither the title"):
        of_component(TaskCommandMarker())


@pytest.mark.parametrize("component", [object(), SimpleNamespace(job_type="SchedulerJob"), None, "TaskRunnerMarker"])
def test_other_components_are_no_tasks(process, component):
    process(BOUND)
    assert of_component(component) is None


def test_a_trigger_is_told_by_its_id_and_its_tasks(process, monkeypatch):
    monkeypatch.setitem(task_try.sys.modules, "structlog", task_try)
    process({**BOUND, "trigger_id": 7})
    assert of_trigger() == TaskTry(airflow.__version__, TI, "payroll", "load", RUN, 2, 3, "task")
    process({**BOUND, "trigger_id": 7, "map_index": None})
    assert of_trigger().map_index == -1


@pytest.mark.parametrize(
    "context",
    [
        {},
        BOUND,  # a task's process
        {"trigger_id": 7},  # a trigger before Airflow 3.2
        {**dict.fromkeys(BOUND), "trigger_id": 7},  # a trigger of no task, as of an asset
    ],
)
def test_what_is_no_tasks_trigger_is_told_apart(process, monkeypatch, context):
    monkeypatch.setitem(task_try.sys.modules, "structlog", task_try)
    process(context)
    assert of_trigger() is None


def test_without_structlog_there_is_no_trigger(monkeypatch):
    monkeypatch.delitem(task_try.sys.modules, "structlog", raising=False)
    assert of_trigger() is None


@pytest.mark.skipif(not AIRFLOW_3, reason="structlog is Airflow 3's")
def test_the_logging_context_is_really_structlogs():
    import structlog

    with structlog.contextvars.bound_contextvars(**BOUND):
        assert of_component(TaskRunnerMarker()).dag == "payroll"
