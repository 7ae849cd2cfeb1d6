"""Airflow's listener: registers the task try of this process before DAG code runs, and takes it back at the end.

Invariant: a task never fails by this and waits for it at most `client.TIMEOUT_SECONDS`. What could not be registered is said
in one line of the task's log; ringfence then denies its mesh connections, with the reason.
"""

from __future__ import annotations

import logging
import os

from airflow.listeners import hookimpl

from airflow_ringfence.client import Client, Registration
from airflow_ringfence.task_try import of_component

log = logging.getLogger(__name__)

# The process that registered: a forked child inherits the module, but must not take its parent's registration back.
_registered_pid: int | None = None


@hookimpl
def on_starting(component: object) -> None:
    """A component of Airflow starts; a task's process does it before the DAG file is parsed."""
    global _registered_pid
    try:
        task_try = of_component(component)
        if task_try is None:
            return
        registration = Client().register(task_try)
        _registered_pid = os.getpid()
        _tell(registration)
    except Exception as error:
        log.warning("ringfence: this task is not registered, and its mesh connections will be denied: %s", error)


@hookimpl
def before_stopping(component: object) -> None:
    """A component of Airflow stops. Only a hint to ringfence: the end of the process is what counts."""
    global _registered_pid
    if _registered_pid != os.getpid():
        return
    _registered_pid = None
    try:
        Client().unregister()
    except Exception as error:
        log.debug("ringfence: the task was not unregistered: %s", error)


def _tell(registration: Registration) -> None:
    if registration.identity is None:
        log.warning(
            "ringfence: the rules give this task no mesh identity: %s: %s",
            registration.denied or "no reason was told",
            registration.remedy or "see `airflow mesh explain --dag DAG --task TASK --to SERVICE`",
        )
    else:
        log.info("ringfence: this task speaks as %s (rule %s)", registration.identity, registration.rule)
