"""A secrets backend that sends the Connections which name a mesh service through ringfence, with no change to a DAG.

It looks a Connection up as the deployment does: in its own backend, if one is named, then where Airflow itself looks. Then it
rewrites the address.

Invariant: a Connection that names a mesh service leaves with an address inside the mesh, or it is refused; unless
`fail_closed` is off, never with its original address. How it is refused depends on the version. From 3.2.2 on Airflow stops at
`AirflowSecretsBackendAccessDenied`. Before, it takes every exception of a backend as "ask the next one", which would answer
with the original address: there the refusal is a Connection that leads nowhere, and an error in the log that says why.

This is routing and no enforcement: code that opens its own sockets is stopped by ringfence's rules and the host's firewall.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from airflow.secrets.base_secrets import BaseSecretsBackend

from airflow_ringfence import leases
from airflow_ringfence.client import RingfenceError, Route, Unreachable
from airflow_ringfence.rewriting import Fields, NoRoute, choose, dead_end, mesh_name, rewrite, service_of
from airflow_ringfence.routes import route_table
from airflow_ringfence.task_try import of_trigger

log = logging.getLogger(__name__)

# The exception at which Airflow stops, where it has one: 3.2.2 and later.
AccessDenied: Any = None
with contextlib.suppress(ImportError):
    from airflow.sdk.exceptions import AirflowSecretsBackendAccessDenied

    AccessDenied = AirflowSecretsBackendAccessDenied

ENVIRONMENT = "airflow.secrets.environment_variables.EnvironmentVariablesBackend"
METASTORE = "airflow.secrets.metastore.MetastoreBackend"
EXECUTION_API = "airflow.sdk.execution_time.secrets.execution_api.ExecutionAPISecretsBackend"
TASK_SDK = "apache-airflow-task-sdk"
COPIED = ("conn_id", "conn_type", "description", "login", "password", "schema")
PORTS = range(1, 65536)


class RingfenceSecretsBackend(BaseSecretsBackend):
    """Rewrites mesh Connections of the deployment's own backend and of Airflow's.

    :param inner_backend: the class of the deployment's own backend, as it stood in `[workers] secrets_backend` or
        `[secrets] backend`
    :param inner_kwargs: its arguments, as they stood in `..._kwargs`
    :param routes: further hosts that mean a mesh service: `{"db.example.com": "warehouse"}` for a service of ringfence's
        routes, or `{"db.example.com": "127.0.0.1:25432"}` and `"unix:/run/x/.s.PGSQL.5432"` for a fixed address
    :param fail_closed: refuse a mesh Connection that has no route; when false, use its original address with a warning
    """

    def __init__(
        self,
        inner_backend: str | None = None,
        inner_kwargs: Mapping[str, Any] | None = None,
        routes: Mapping[str, str] | None = None,
        fail_closed: bool = True,
    ) -> None:
        super().__init__()
        _refuse_airflow_3_0()
        if not isinstance(fail_closed, bool):
            raise ValueError(f"fail_closed of {type(self).__name__} is {fail_closed!r}: write true or false, without quotes")
        self.fail_closed = fail_closed
        self.inner = _instance(inner_backend, inner_kwargs or {}) if inner_backend else None
        self.routes = {_host_key(host): _route_or_service(host, value) for host, value in (routes or {}).items()}
        self._followers: dict[str, Any] = {}

    def get_connection(self, conn_id: str, team_name: str | None = None) -> Any:
        """The Connection with its address inside the mesh if it names a mesh service, as it is otherwise; None if unknown."""
        for backend in self._backends():
            connection = _tried(backend, backend.get_connection, conn_id, team_name)
            if connection:
                return self._into_the_mesh(connection)
        return None

    async def aget_connection(self, conn_id: str) -> Any:
        """The same for triggers."""
        for backend in self._backends():
            connection = await _tried_async(backend, conn_id)
            if connection:
                return await asyncio.to_thread(self._into_the_mesh, connection)
        return None

    def get_variable(self, key: str, team_name: str | None = None) -> Any:
        """The inner backend's value. Airflow asks its own places itself."""
        return _call(self.inner.get_variable, team_name, key=key) if self.inner else None

    def get_config(self, key: str) -> Any:
        """The inner backend's value."""
        return self.inner.get_config(key) if self.inner else None

    def rewritten(self, fields: Fields, name: str) -> Fields:
        """The address inside the mesh for a Connection that names the mesh host `name`; raises `NoRoute` if there is none."""
        target = self.routes.get(name) or service_of(name)
        if isinstance(target, Route):
            return rewrite(fields, choose(fields, name, [target]))
        try:
            table = route_table()
        except RingfenceError as error:
            raise NoRoute(f"ringfence does not tell its routes: {error}") from error
        if routes := table.of(target):
            return rewrite(fields, _of_this_task(choose(fields, target, routes)))
        raise NoRoute(
            f"ringfence has no route to it (it has: {', '.join(table.services()) or 'none'}): add {target!r} to the upstreams "
            "of this host's sidecar registration in Consul"
        )

    def _set_connection_class(self, conn_class: type) -> None:
        """Airflow 3 tells a backend which Connection class to make, the Task SDK's or the server's."""
        self._connection_class = conn_class
        for backend in filter(None, (self.inner, *self._followers.values())):
            _tell_connection_class(backend, conn_class)

    def _backends(self) -> list[Any]:
        followers = [self._follower(name) for name in _following(getattr(self, "_connection_class", None))]
        return [self.inner, *followers] if self.inner else followers

    def _follower(self, name: str) -> Any:
        if name not in self._followers:
            backend = _instance(name, {})
            _tell_connection_class(backend, getattr(self, "_connection_class", None))
            self._followers[name] = backend
        return self._followers[name]

    def _into_the_mesh(self, connection: Any) -> Any:
        host = str(connection.host or "")
        try:
            name = mesh_name(host, self.routes)
            if name is None:
                return connection
            host = name
            return _with(connection, self.rewritten(fields_of(connection), name))
        except Exception as error:
            return self._refused(connection, host, error)

    def _refused(self, connection: Any, host: str, error: Exception) -> Any:
        text = (
            f"ringfence: Connection {connection.conn_id!r} names the mesh host {host!r}, and {error}. "
            "`airflow mesh doctor` (`ringfence-airflow doctor`) on this host looks further."
        )
        if not self.fail_closed:
            log.warning("%s fail_closed is off: the original address is used, outside the mesh.", text)
            return connection
        if AccessDenied is not None:
            raise AccessDenied(text) from error
        log.error("%s The Connection is refused.", text)
        return _with(connection, dead_end(str(connection.conn_type or ""), host))


def _of_this_task(route: Route) -> Route:
    """In the triggerer, over TCP: the address of the trigger's own task. Elsewhere a process runs one task, and needs none."""
    task = None if route.unix else of_trigger()
    if task is None:
        return route
    try:
        return leases.own_route(task, route)
    except Unreachable as error:
        raise NoRoute(f"ringfence leases no address for the trigger: {error}") from error


def _refuse_airflow_3_0() -> None:
    """Airflow 3.0 has no backend for the execution API, so Connections kept in Airflow would go past the mesh unseen."""
    try:
        task_sdk = version(TASK_SDK)
    except PackageNotFoundError:
        return
    if task_sdk.startswith("1.0."):
        raise RuntimeError(
            f"RingfenceSecretsBackend cannot guard Connections in Airflow 3.0 ({TASK_SDK} {task_sdk}): use 3.1 or later"
        )


def _following(conn_class: type | None) -> list[str]:
    """Where Airflow itself looks after its custom backend, in this process."""
    if getattr(sys.modules.get("airflow.sdk.execution_time.task_runner"), "SUPERVISOR_COMMS", None) is not None:
        return [ENVIRONMENT, EXECUTION_API]
    of_task_sdk = conn_class is not None and conn_class.__module__.startswith("airflow.sdk.")
    if of_task_sdk and os.environ.get("_AIRFLOW_PROCESS_CONTEXT") != "server":
        return [ENVIRONMENT]
    return [ENVIRONMENT, METASTORE]


def _instance(path: str, kwargs: Mapping[str, Any]) -> Any:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ImportError(
            f"the secrets backend {path!r} cannot be imported ({error}): see inner_backend in secrets_backend_kwargs"
        ) from error
    return found(**kwargs)


def _tell_connection_class(backend: Any, conn_class: type | None) -> None:
    if conn_class is not None and hasattr(backend, "_set_connection_class"):
        backend._set_connection_class(conn_class)


def _tried(backend: Any, method: Callable[..., Any], conn_id: str, team_name: str | None) -> Any:
    """As Airflow does it: a backend that fails is passed over, unless it denies access."""
    try:
        return _call(method, team_name, conn_id=conn_id)
    except Exception as error:
        _pass_over(backend, conn_id, error)
        return None


async def _tried_async(backend: Any, conn_id: str) -> Any:
    try:
        if hasattr(backend, "aget_connection"):
            return await backend.aget_connection(conn_id)
        return await asyncio.to_thread(backend.get_connection, conn_id)
    except Exception as error:
        _pass_over(backend, conn_id, error)
        return None


def _pass_over(backend: Any, conn_id: str, error: Exception) -> None:
    if AccessDenied is not None and isinstance(error, AccessDenied):
        raise error
    log.debug(
        "%s did not answer for the Connection %s; the next backend is asked", type(backend).__name__, conn_id, exc_info=error
    )


def _call(method: Callable[..., Any], team_name: str | None, **arguments: Any) -> Any:
    """Backends from before Airflow 3.2 know no `team_name`."""
    if team_name is not None and "team_name" in inspect.signature(method).parameters:
        arguments["team_name"] = team_name
    return method(**arguments)


def fields_of(connection: Any) -> Fields:
    """What of `connection` makes its address."""
    return Fields(
        conn_type=str(connection.conn_type or "").lower(),
        host=str(connection.host or ""),
        port=connection.port,
        extra=_extra(connection.extra),
    )


def _extra(text: Any) -> dict[str, Any]:
    """The extras; none if they are no JSON object, as Airflow takes them."""
    try:
        extra = json.loads(text or "{}")
    except ValueError:
        return {}
    return extra if isinstance(extra, dict) else {}


def _with(connection: Any, fields: Fields) -> Any:
    """A new Connection of the same class: the old one may belong to the inner backend's cache or to a database session."""
    extra = json.dumps(dict(fields.extra)) if fields.extra else None
    kept = {name: getattr(connection, name) for name in COPIED}
    return type(connection)(**kept, host=fields.host, port=fields.port, extra=extra)


def _host_key(host: str) -> str:
    return host.strip().rstrip(".").lower()


def _route_or_service(host: str, value: str) -> Route | str:
    """What a value of `routes` means: a unix socket, an address with a port, or the name of a service."""
    path = value.removeprefix("unix:")
    if path.startswith("/"):
        return Route(host, unix=path)
    address, colon, port = value.rpartition(":")
    if not colon and value:
        return value
    if address and port.isdecimal() and int(port) in PORTS:
        return Route(host, address=address.strip("[]"), port=int(port))
    raise ValueError(f"routes[{host!r}] is {value!r}: write a service's name, ADDRESS:PORT or unix:/PATH")
