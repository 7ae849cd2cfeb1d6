"""Which task try this process runs, told from what Airflow put there before any DAG code ran.

Where the facts are depends on the version:

    3.2.2 and later   the logging context of structlog
    3.0 to 3.2.1      the startup message in the frame that calls the listener; these releases are closed, so it stays there
    2.x               the command in the supervisor's title, or the command line where the executor started a new interpreter

Invariant: nothing is read that DAG code could have written by then. ringfence checks what it can against the kernel. A trigger
runs DAG code already when it is asked about, see `of_trigger`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import airflow

from airflow_ringfence.client import TaskTry

MARKER_3 = "TaskRunnerMarker"
MARKER_2 = "TaskCommandMarker"
# What Airflow binds of a task instance, in the order of `_runner_try`.
CONTEXT = ("ti_id", "dag_id", "task_id", "run_id", "try_number", "map_index")
TITLE_3 = "airflow worker -- "
TITLE_SUPERVISOR_2 = "airflow task supervisor: "
TITLE_RUNNER_2 = "airflow task runner: "
UNMAPPED = -1
TRY_UNKNOWN = 0
FRAMES_MAX = 64


class FactsMissing(Exception):
    """The process runs a task, but not all that identifies its try can be told. The text says what and why."""


def of_component(component: object) -> TaskTry | None:
    """The try that is about to start in this process, or None if `component` is no task or its parent is registered for it."""
    marker = type(component).__name__
    if marker == MARKER_3:
        return _of_runner(_logging_context(), _startup_message(sys._getframe()), _title())
    if marker == MARKER_2:
        return _of_command(_title(), sys.argv)
    return None


def of_trigger() -> TaskTry | None:
    """The try whose trigger calls this, or None outside of triggers and where Airflow does not tell (before 3.2).

    Airflow's triggerer binds the id of the trigger and what names its task to the context of each trigger's coroutine, which
    threads that work for it inherit; nothing else of Airflow binds a `trigger_id`, in a task's process neither. DAG code could
    write here. It gains nothing by that: ringfence leases to the triggerer only, whose triggers share a process anyway.
    """
    if "structlog" not in sys.modules:
        return None
    context = _logging_context()
    instance, dag, task, run, try_number, map_index = (context.get(name) for name in CONTEXT)
    if None in (context.get("trigger_id"), instance, dag, task, run, try_number):
        return None
    return _runner_try(instance, dag, task, run, try_number, map_index)


def _of_runner(context: dict[str, Any], message: Any, title: str) -> TaskTry:
    """Airflow 3: the task process."""
    if "ti_id" in context and "dag_id" in context:
        return _runner_try(*(context.get(name) for name in CONTEXT))
    if message is not None:
        ti = message.ti
        return _runner_try(ti.id, ti.dag_id, ti.task_id, ti.run_id, ti.try_number, getattr(ti, "map_index", None))
    raise FactsMissing(
        f"Airflow {airflow.__version__} tells this process only its title ({title!r}), not its DAG, task and run: "
        "use Airflow 3.2.2 or later, or 2.10 and 2.11"
    )


def _runner_try(instance: Any, dag: Any, task: Any, run: Any, try_number: Any, map_index: Any) -> TaskTry:
    return TaskTry(
        airflow=airflow.__version__,
        instance=str(instance),
        dag=str(dag),
        task=str(task),
        run=str(run),
        try_number=int(try_number),
        map_index=UNMAPPED if map_index is None else int(map_index),
        supervisor="task",
    )


def _of_command(title: str, argv: Sequence[str]) -> TaskTry | None:
    """Airflow 2: the supervisor of a task. The runner that it forks is its child and needs no registration of its own."""
    if title.startswith(TITLE_RUNNER_2):
        return None
    command = _command_in_title(title) if title.startswith(TITLE_SUPERVISOR_2) else list(argv)
    arguments = _arguments_of_run(command)
    if arguments is None:
        raise FactsMissing(
            f"neither the title of the task's supervisor ({title!r}) nor its command line holds `tasks run DAG TASK RUN`: "
            "use an executor that starts tasks by that command (Local, Sequential or Celery)"
        )
    dag, task, run = arguments[:3]
    return TaskTry(
        airflow=airflow.__version__,
        instance="",
        dag=dag,
        task=task,
        run=run,
        try_number=TRY_UNKNOWN,
        map_index=_map_index(arguments[3:]),
        supervisor="self",
    )


def _command_in_title(title: str) -> list[str]:
    """The list that the executor printed into the title; empty if the title was cut."""
    try:
        command = ast.literal_eval(title.removeprefix(TITLE_SUPERVISOR_2))
    except (ValueError, SyntaxError):
        return []
    return [str(word) for word in command] if isinstance(command, list) else []


def _arguments_of_run(command: Sequence[str]) -> list[str] | None:
    """What follows `tasks run`, if that is DAG, task and run at least."""
    for at in range(len(command) - 4):
        if list(command[at : at + 2]) == ["tasks", "run"]:
            return list(command[at + 2 :])
    return None


def _map_index(options: Sequence[str]) -> int:
    for at, option in enumerate(options):
        name, _, value = option.partition("=")
        if name == "--map-index":
            return int(value or options[at + 1])
    return UNMAPPED


def _logging_context() -> dict[str, Any]:
    import structlog.contextvars

    return dict(structlog.contextvars.get_contextvars())


def _startup_message(frame: FrameType | None) -> Any:
    """The local `msg` of Airflow's `startup`, up the stack from the listener; None where there is none."""
    for _ in range(FRAMES_MAX):
        if frame is None:
            return None
        if frame.f_code.co_name == "startup" and frame.f_globals.get("__name__", "").endswith("execution_time.task_runner"):
            return frame.f_locals.get("msg")
        frame = frame.f_back
    return None


def _title() -> str:
    import setproctitle

    return str(setproctitle.getproctitle())
