"""Looks at what this host and this Airflow have set up for the mesh, and names the remedy of what is missing.

Invariant: it reads only, and one check that fails never hides another. (Within a trigger it asks for the address that the
trigger's own Connections would get; the address goes with the process.)
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import airflow
from airflow.configuration import conf

from airflow_ringfence import __version__, leases, listener
from airflow_ringfence.client import Client, Refused, RingfenceError
from airflow_ringfence.rewriting import POSTGRES_TYPES, SSLMODES_VERIFYING, NoRoute, mesh_name
from airflow_ringfence.routes import route_table
from airflow_ringfence.secrets import AccessDenied, RingfenceSecretsBackend, fields_of
from airflow_ringfence.task_try import of_trigger

OK, HINT, WARNING, FAILED = "ok", "hint", "warning", "failed"
BACKEND = f"{RingfenceSecretsBackend.__module__}.{RingfenceSecretsBackend.__name__}"
CONN_ENVIRONMENT = "AIRFLOW_CONN_"
CGROUPS = Path("/sys/fs/cgroup/cgroup.controllers")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    result: str
    text: str


def examine() -> list[Finding]:
    """Every check, in the order in which a person would mend things."""
    findings = []
    for name, check in CHECKS.items():
        try:
            findings += [Finding(name, result, text) for result, text in check()]
        except RingfenceError as error:
            findings.append(Finding(name, FAILED, str(error)))
        except Exception as error:
            findings.append(Finding(name, WARNING, f"could not be looked at: {type(error).__name__}: {error}"))
    return findings


def _versions() -> Iterator[tuple[str, str]]:
    yield OK, f"Airflow {airflow.__version__}, airflow-provider-ringfence {__version__}, Python {platform.python_version()}"
    if AccessDenied is None:
        yield HINT, "before Airflow 3.2.2 a refused Connection leads to a host in .invalid; the log tells why"


def _socket() -> Iterator[tuple[str, str]]:
    client = Client()
    client.routes()
    yield OK, f"ringfence answers at {client.path}"


def _whoami() -> Iterator[tuple[str, str]]:
    caller = Client().whoami()
    who = {"task": "task {dag}.{task}, try {try}", "component": "component {component}"}.get(str(caller.get("who")))
    name = who.format_map(_Blank(caller)) if who else "nobody known"
    if identity := caller.get("identity"):
        yield OK, f"this process is {name} and speaks as {identity} (rule {caller.get('rule')})"
    else:
        yield HINT, f"this process is {name} and has no identity ({caller.get('denied') or 'no reason told'}); right in a shell"


def _plugin() -> Iterator[tuple[str, str]]:
    from airflow.listeners.listener import get_listener_manager

    if get_listener_manager().pm.is_registered(listener):
        yield OK, "Airflow has loaded the listener that registers tasks"
    else:
        yield FAILED, "Airflow has not loaded the listener: install the package where Airflow is; `airflow plugins` lists it"


def _secrets_backend() -> Iterator[tuple[str, str]]:
    section, key = _backend_setting()
    name = conf.get(section, key, fallback="")
    if name != BACKEND:
        inner = f", and inner_backend to {name}" if name else ""
        yield WARNING, f"Connections are not rewritten: set [{section}] {key} to {BACKEND}{inner}"
        return
    yield OK, f"[{section}] {key} is {BACKEND}"
    if not _backend().fail_closed:
        yield WARNING, "fail_closed is off: without a route a mesh Connection goes to its original address, outside the mesh"


def _cgroup() -> Iterator[tuple[str, str]]:
    caller = Client().whoami()
    if caller.get("who") == "task":
        if caller.get("tier") == "cgroup":
            yield OK, "this task has a cgroup of its own"
        else:
            yield WARNING, f"this task is known by its {caller.get('tier')} only: see `cgroup` in ringfence's rules file"
    elif CGROUPS.exists():
        yield HINT, "the host has cgroup v2; whether tasks get a cgroup of their own is told by `doctor` inside a task"
    else:
        yield WARNING, f"no cgroup v2 ({CGROUPS}): tasks are told apart by their parents, which a detached child escapes"


def _routes() -> Iterator[tuple[str, str]]:
    table = route_table()
    if not table.services():
        yield WARNING, "no mesh service is reachable from here: add upstreams to this host's sidecar registration in Consul"
    for service in table.services():
        yield OK, f"{service} at {', '.join(map(str, table.of(service)))}"


def _leases() -> Iterator[tuple[str, str]]:
    """Only the triggerer may lease, so only within a trigger this tells anything."""
    task = of_trigger()
    if task is None:
        return
    table = route_table()
    route = next((route for service in table.services() for route in table.of(service) if not route.unix), None)
    if route is None:
        yield HINT, "no service has a TCP route here, so triggers lease no addresses"
        return
    try:
        lease = leases.leased(task, route.service)
    except Refused as error:
        yield WARNING, f"triggers have no addresses of their own and speak as the triggerer: {error}"
        return
    who = f"this trigger of {task.dag}.{task.task}"
    if lease.identity:
        yield OK, f"{who} speaks as {lease.identity} (rule {lease.rule}) at {lease.route}"
    else:
        yield HINT, f"{who} has an address of its own and no identity ({lease.denied or 'no reason told'})"


def _connections() -> Iterator[tuple[str, str]]:
    backend = _backend()
    connections, note = _known_connections()
    for connection in connections:
        yield from _of_connection(backend, connection)
    if note:
        yield HINT, note


def _of_connection(backend: RingfenceSecretsBackend, connection: Any) -> Iterator[tuple[str, str]]:
    fields = fields_of(connection)
    try:
        name = mesh_name(fields.host, backend.routes)
        if name is None:
            return
        backend.rewritten(fields, name)
    except NoRoute as error:
        yield FAILED, f"{connection.conn_id}: {error}"
        return
    yield OK, f"{connection.conn_id} goes through the mesh to {name}"
    sslmode = fields.extra.get("sslmode")
    if fields.conn_type in POSTGRES_TYPES and sslmode in SSLMODES_VERIFYING:
        yield HINT, f"{connection.conn_id}: sslmode={sslmode} checks the database's own certificate, inside the mesh's TLS"
    elif fields.conn_type in POSTGRES_TYPES and sslmode == "require":
        yield HINT, f"{connection.conn_id}: sslmode=require needs a second TLS inside the mesh's and hides the text of a denial"


def _known_connections() -> tuple[list[Any], str | None]:
    """Those of the environment and of the database, with their original addresses."""
    from airflow.models.connection import Connection
    from airflow.secrets.environment_variables import EnvironmentVariablesBackend
    from airflow.utils.session import create_session

    names = [name.removeprefix(CONN_ENVIRONMENT).lower() for name in os.environ if name.startswith(CONN_ENVIRONMENT)]
    found = list(filter(None, map(EnvironmentVariablesBackend().get_connection, names)))
    try:
        with create_session() as session:
            found += session.query(Connection).order_by(Connection.conn_id).all()
            session.expunge_all()
    except Exception as error:
        return found, f"the database's Connections were not looked at ({type(error).__name__}); the scheduler's doctor can"
    return found, None


def _backend_setting() -> tuple[str, str]:
    """Airflow 3 has a setting for workers, which comes first there."""
    workers = ("workers", "secrets_backend")
    return workers if conf.get(*workers, fallback="") else ("secrets", "backend")


def _backend() -> RingfenceSecretsBackend:
    """The backend as it is configured, or one without settings."""
    section, key = _backend_setting()
    if conf.get(section, key, fallback="") != BACKEND:
        return RingfenceSecretsBackend()
    return RingfenceSecretsBackend(**conf.getjson(section, f"{key}_kwargs", fallback={}))


class _Blank(dict[str, Any]):
    """For texts with fields that an answer may lack."""

    def __missing__(self, name: str) -> str:
        return "?"


CHECKS: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "versions": _versions,
    "socket": _socket,
    "whoami": _whoami,
    "plugin": _plugin,
    "secrets backend": _secrets_backend,
    "cgroup": _cgroup,
    "routes": _routes,
    "leases": _leases,
    "connections": _connections,
}
