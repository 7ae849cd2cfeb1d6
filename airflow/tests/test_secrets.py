"""Mesh Connections go through the mesh or nowhere, through Airflow's own look-up; all others pass untouched."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from types import SimpleNamespace

import airflow
import pytest
from airflow.models.connection import Connection

from airflow_ringfence import routes, secrets
from airflow_ringfence.secrets import RingfenceSecretsBackend

AIRFLOW_3 = not airflow.__version__.startswith("2.")
BACKEND = "airflow_ringfence.secrets.RingfenceSecretsBackend"
URI = "postgres://etl:s3cret@warehouse.virtual.consul:5432/dw?sslmode=prefer"


class Vault:
    """A deployment's own backend, of before Airflow 3.2: it knows no team."""

    def __init__(self, **kwargs):
        self.kwargs = kwargs

    def get_connection(self, conn_id):
        if conn_id == "broken":
            raise RuntimeError("vault is sealed")
        uri = self.kwargs["connections"].get(conn_id)
        return Connection(conn_id=conn_id, uri=uri) if uri else None

    def get_variable(self, key):
        return self.kwargs["variables"].get(key)

    def get_config(self, key):
        return self.kwargs["configs"].get(key)


class TeamVault(Vault):
    def get_connection(self, conn_id, team_name=None):
        return Connection(conn_id=conn_id, uri=self.kwargs["connections"][team_name])


def vault(kind="Vault", **connections):
    kwargs = {"connections": connections, "variables": {"v": "1"}, "configs": {"c": "2"}}
    return {"inner_backend": f"{__name__}.{kind}", "inner_kwargs": kwargs}


def address(connection):
    return connection.host, connection.port


@pytest.fixture
def refusing_by_exception(monkeypatch):
    """As from Airflow 3.2.2 on, whatever the version that runs."""

    class Denied(PermissionError):
        pass

    monkeypatch.setattr(secrets, "AccessDenied", Denied)
    return Denied


@pytest.fixture
def refusing_by_dead_end(monkeypatch):
    """As before Airflow 3.2.2, whatever the version that runs."""
    monkeypatch.setattr(secrets, "AccessDenied", None)


def test_a_mesh_connection_is_rewritten_and_keeps_the_rest(ringfence, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_DW", URI)
    connection = RingfenceSecretsBackend().get_connection("dw")
    assert address(connection) == ("127.0.0.1", 25435)
    kept = (connection.conn_id, connection.conn_type, connection.login, connection.password, connection.schema)
    assert kept == ("dw", "postgres", "etl", "s3cret", "dw")
    assert connection.extra_dejson == {"sslmode": "prefer"}


def test_a_verified_certificate_keeps_its_name(ringfence, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_DW", URI.replace("prefer", "verify-full"))
    connection = RingfenceSecretsBackend().get_connection("dw")
    assert address(connection) == ("warehouse.virtual.consul", 25435)
    assert connection.extra_dejson == {"sslmode": "verify-full", "hostaddr": "127.0.0.1"}


def test_a_unix_route_reaches_libpq(ringfence, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER", "postgres://u@ledger.virtual.dc1.consul/db")
    assert address(RingfenceSecretsBackend().get_connection("ledger")) == ("/run/mesh/ledger", 5432)


def test_service_names_meet_without_regard_to_case(ringfence, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", "http://LAKE.virtual.consul/")
    assert address(RingfenceSecretsBackend().get_connection("lake")) == ("127.0.0.1", 25436)


@pytest.mark.parametrize("uri", ["postgres://u@db.example.com:5432/x", "http://", "fs:///?path=/data", "mysql://10.0.0.7"])
def test_a_connection_outside_the_mesh_passes_untouched_without_ringfence(socket_path, monkeypatch, uri):
    monkeypatch.setenv("AIRFLOW_CONN_PLAIN", uri)
    assert RingfenceSecretsBackend().get_connection("plain").get_uri() == Connection(conn_id="plain", uri=uri).get_uri()


def test_an_extra_that_is_no_json_counts_as_none(ringfence):
    fields = secrets.fields_of(SimpleNamespace(conn_type="HTTP", host=None, port=1, extra="not json"))
    assert (fields.conn_type, fields.host, fields.extra) == ("http", "", {})
    assert secrets.fields_of(SimpleNamespace(conn_type=None, host="h", port=None, extra="[1]")).extra == {}


def test_a_mesh_connection_that_cannot_be_read_is_refused(ringfence, monkeypatch, refusing_by_exception):
    class Sealed:
        conn_id, conn_type, host, port = "dw", "postgres", "warehouse.virtual.consul", 5432

        @property
        def extra(self):
            raise ValueError("cannot decrypt")

    monkeypatch.setattr(Vault, "get_connection", lambda self, conn_id: Sealed())
    with pytest.raises(refusing_by_exception, match="cannot decrypt"):
        RingfenceSecretsBackend(**vault()).get_connection("dw")


def test_the_inner_backend_comes_first_and_its_object_is_not_changed(ringfence, monkeypatch):
    inner = Connection(conn_id="dw", uri="postgres://inner@warehouse.virtual.consul/x")
    monkeypatch.setattr(Vault, "get_connection", lambda self, conn_id: inner)
    monkeypatch.setenv("AIRFLOW_CONN_DW", URI)
    connection = RingfenceSecretsBackend(**vault()).get_connection("dw")
    assert (connection.login, connection.port) == ("inner", 25435)
    assert address(inner) == ("warehouse.virtual.consul", None)


@pytest.mark.parametrize("conn_id", ["absent", "broken"])
def test_where_the_inner_backend_has_nothing_airflows_own_places_are_guarded(ringfence, monkeypatch, conn_id):
    monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", URI)
    assert address(RingfenceSecretsBackend(**vault()).get_connection(conn_id)) == ("127.0.0.1", 25435)


def test_a_denial_of_the_inner_backend_is_final(ringfence, monkeypatch, refusing_by_exception):
    def denied(self, conn_id):
        raise refusing_by_exception("not for you")

    monkeypatch.setattr(Vault, "get_connection", denied)
    monkeypatch.setenv("AIRFLOW_CONN_DW", URI)
    with pytest.raises(refusing_by_exception, match="not for you"):
        RingfenceSecretsBackend(**vault()).get_connection("dw")


def test_a_team_reaches_the_backends_that_know_teams(ringfence):
    backend = RingfenceSecretsBackend(**vault("TeamVault", finance=URI))
    assert backend.get_connection("dw", team_name="finance").port == 25435
    assert RingfenceSecretsBackend(**vault(dw=URI)).get_connection("dw", team_name="finance").port == 25435


def test_variables_and_config_are_the_inner_backends(ringfence):
    backend = RingfenceSecretsBackend(**vault())
    assert (backend.get_variable("v"), backend.get_variable("w"), backend.get_config("c")) == ("1", None, "2")
    assert (RingfenceSecretsBackend().get_variable("v"), RingfenceSecretsBackend().get_config("c")) == (None, None)
    assert ringfence.requests == []


def test_an_unknown_connection_is_unknown(ringfence, monkeypatch):
    monkeypatch.setattr(secrets, "_following", lambda conn_class: [secrets.ENVIRONMENT])
    assert RingfenceSecretsBackend().get_connection("nobody") is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("warehouse", ("127.0.0.1", 25435)),
        ("127.0.0.1:1234", ("127.0.0.1", 1234)),
        ("[::1]:1234", ("::1", 1234)),
        ("unix:/run/x/.s.PGSQL.6432", ("/run/x", 6432)),
        ("/run/x/.s.PGSQL.6432", ("/run/x", 6432)),
    ],
)
def test_further_hosts_mean_a_service_or_an_address(ringfence, monkeypatch, value, expected):
    monkeypatch.setenv("AIRFLOW_CONN_DW", "postgres://u@DB.example.com:5432/x")
    backend = RingfenceSecretsBackend(routes={"db.Example.com.": value})
    assert address(backend.get_connection("dw")) == expected


@pytest.mark.parametrize("value", ["127.0.0.1:x", ":5432", "127.0.0.1:0", "127.0.0.1:70000", ""])
def test_a_bad_route_is_named_when_airflow_starts(value):
    with pytest.raises(
        ValueError, match=r"routes\['db.example.com'\] is .*: write a service's name, ADDRESS:PORT or unix:/PATH"
    ):
        RingfenceSecretsBackend(routes={"db.example.com": value})


def test_other_bad_settings_are_named_when_airflow_starts(monkeypatch):
    with pytest.raises(ValueError, match="fail_closed of RingfenceSecretsBackend is 'false': write true or false"):
        RingfenceSecretsBackend(fail_closed="false")
    with pytest.raises(ImportError, match=r"the secrets backend 'no\.such\.Vault' cannot be imported .* see inner_backend"):
        RingfenceSecretsBackend(inner_backend="no.such.Vault")
    monkeypatch.setattr(secrets, "version", lambda name: "1.0.6")
    with pytest.raises(RuntimeError, match=r"cannot guard Connections in Airflow 3\.0 .*: use 3\.1 or later"):
        RingfenceSecretsBackend()


def test_the_socket_is_asked_once_for_many_connections(ringfence, monkeypatch):
    monkeypatch.setenv("AIRFLOW_CONN_DW", URI)
    for _ in range(5):
        RingfenceSecretsBackend().get_connection("dw")
    assert ringfence.operations() == ["routes"]


def test_a_table_of_thirty_seconds_ago_is_read_again_and_never_used_without_ringfence(
    ringfence, monkeypatch, refusing_by_exception
):
    clock = iter([100.0, 129.0, 131.0, 131.0, 162.0])
    monkeypatch.setattr(routes.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(routes, "Client", _client_with_its_own_clock(monkeypatch))
    monkeypatch.setenv("AIRFLOW_CONN_DW", URI)
    backend = RingfenceSecretsBackend()
    for _ in range(3):
        assert backend.get_connection("dw").port == 25435
    ringfence.close()
    with pytest.raises(refusing_by_exception, match="does not tell its routes: no socket"):
        backend.get_connection("dw")


def _client_with_its_own_clock(monkeypatch):
    """The client shares the module `time` with the table, so the test answers for it."""
    from pathlib import Path

    from airflow_ringfence.client import Route, RouteList, Unreachable

    class Client:
        def __init__(self, path):
            self.path = path

        def routes(self):
            if not Path(self.path).exists():
                raise Unreachable(f"no socket at {self.path}")
            return RouteList((Route("warehouse", address="127.0.0.1", port=25435),), None)

    return Client


CASES_WITHOUT_ROUTE = [
    ("postgres://u@nowhere.virtual.consul/x", r"no route to it \(it has: lake, ledger, queue, warehouse\): add 'nowhere'"),
    ("http://queue.virtual.consul/", "only unix sockets here"),
    ("postgres://u@a.b.virtual.consul/x", "form of the mesh host"),
    ("postgres://u@warehouse.virtual.consul%2Cdb.example.com/x", "give a Connection one mesh host"),
]


@pytest.mark.parametrize(("uri", "says"), CASES_WITHOUT_ROUTE)
def test_a_mesh_connection_without_a_route_is_refused_with_a_remedy(ringfence, monkeypatch, refusing_by_exception, uri, says):
    monkeypatch.setenv("AIRFLOW_CONN_DW", uri)
    with pytest.raises(refusing_by_exception, match=rf"^ringfence: Connection 'dw' names the mesh host .*{says}.*doctor"):
        RingfenceSecretsBackend().get_connection("dw")


@pytest.mark.parametrize(("uri", "says"), CASES_WITHOUT_ROUTE)
def test_before_3_2_2_it_leads_nowhere_and_the_log_says_why(ringfence, monkeypatch, refusing_by_dead_end, caplog, uri, says):
    monkeypatch.setenv("AIRFLOW_CONN_DW", uri)
    connection = RingfenceSecretsBackend().get_connection("dw")
    assert connection.host.endswith(".no-route.ringfence.invalid")
    assert [record.levelno for record in caplog.records if record.name == secrets.__name__] == [logging.ERROR]
    assert caplog.records[-1].getMessage().endswith("The Connection is refused.")


def test_without_ringfence_a_mesh_connection_is_refused(socket_path, monkeypatch, refusing_by_exception):
    monkeypatch.setenv("AIRFLOW_CONN_DW", URI)
    with pytest.raises(refusing_by_exception, match=f"ringfence does not tell its routes: no socket at {socket_path}"):
        RingfenceSecretsBackend().get_connection("dw")


def test_a_fault_of_ours_refuses_too(ringfence, monkeypatch, refusing_by_exception):
    def broken(*_):
        raise KeyError("a fault")

    monkeypatch.setattr(secrets, "rewrite", broken)
    monkeypatch.setenv("AIRFLOW_CONN_DW", URI)
    with pytest.raises(refusing_by_exception):
        RingfenceSecretsBackend().get_connection("dw")


def test_fail_closed_off_uses_the_original_address_with_a_warning(socket_path, monkeypatch, caplog):
    monkeypatch.setenv("AIRFLOW_CONN_DW", URI)
    connection = RingfenceSecretsBackend(fail_closed=False).get_connection("dw")
    assert address(connection) == ("warehouse.virtual.consul", 5432)
    assert "outside the mesh" in caplog.text


def test_triggers_are_guarded_alike(ringfence, monkeypatch, refusing_by_exception):
    monkeypatch.setenv("AIRFLOW_CONN_DW", URI)
    assert asyncio.run(RingfenceSecretsBackend().aget_connection("dw")).port == 25435
    assert asyncio.run(RingfenceSecretsBackend(**vault(dw=URI)).aget_connection("dw")).port == 25435
    monkeypatch.setenv("AIRFLOW_CONN_DW", CASES_WITHOUT_ROUTE[0][0])
    with pytest.raises(refusing_by_exception):
        asyncio.run(RingfenceSecretsBackend().aget_connection("dw"))


@pytest.fixture
def configured(monkeypatch):
    """As an administrator sets it, for workers and for everything else."""

    def configure(**kwargs):
        section = "WORKERS__SECRETS_BACKEND" if AIRFLOW_3 else "SECRETS__BACKEND"
        for name in {section, "SECRETS__BACKEND"}:
            monkeypatch.setenv(f"AIRFLOW__{name}", BACKEND)
            monkeypatch.setenv(f"AIRFLOW__{name}_KWARGS", json.dumps(kwargs))

    return configure


def test_the_servers_own_look_up_goes_through_the_mesh_or_nowhere(ringfence, monkeypatch, configured):
    configured()
    monkeypatch.setenv("AIRFLOW_CONN_DW", URI)
    monkeypatch.setenv("AIRFLOW_CONN_LOST", CASES_WITHOUT_ROUTE[0][0])
    assert address(Connection.get_connection_from_secrets("dw")) == ("127.0.0.1", 25435)
    if secrets.AccessDenied is None:
        assert Connection.get_connection_from_secrets("lost").host == "nowhere.no-route.ringfence.invalid"
    else:
        with pytest.raises(secrets.AccessDenied):
            Connection.get_connection_from_secrets("lost")


@pytest.fixture
def task_process(monkeypatch):
    """The look-up of a task in Airflow 3, with an execution API that knows two Connections."""
    from airflow.sdk.execution_time import comms, context, task_runner

    empty = dict.fromkeys(("schema", "login", "password", "extra"))
    hosts = {"api_dw": "warehouse.virtual.consul", "api_lost": "nowhere.virtual.consul"}
    known = {
        conn_id: comms.ConnectionResult(conn_id=conn_id, conn_type="postgres", host=host, port=5432, **empty)
        for conn_id, host in hosts.items()
    }

    class Supervisor:
        def send(self, msg):
            missing = comms.ErrorResponse(error="CONNECTION_NOT_FOUND", detail={})
            return known.get(msg.conn_id, missing) if isinstance(msg, comms.GetConnection) else None

        async def asend(self, msg):
            return self.send(msg)

    monkeypatch.setattr(task_runner, "SUPERVISOR_COMMS", Supervisor(), raising=False)
    forget_backends()
    yield context
    forget_backends()


def forget_backends():
    """From 3.3 on the Task SDK keeps its backends."""
    configuration = sys.modules.get("airflow.sdk.configuration")
    getattr(configuration, "clear_secrets_backends_cache", lambda: None)()


@pytest.mark.skipif(not AIRFLOW_3, reason="the look-up of Airflow 3's tasks")
def test_a_task_of_airflow_3_goes_through_the_mesh_or_nowhere(ringfence, monkeypatch, configured, task_process):
    configured()
    monkeypatch.setenv("AIRFLOW_CONN_DW", URI)
    for conn_id in ("dw", "api_dw"):
        assert address(task_process._get_connection(conn_id)) == ("127.0.0.1", 25435)
        assert address(asyncio.run(task_process._async_get_connection(conn_id))) == ("127.0.0.1", 25435)
    assert type(task_process._get_connection("api_dw")).__module__.startswith("airflow.sdk.")
    if secrets.AccessDenied is None:
        assert task_process._get_connection("api_lost").host == "nowhere.no-route.ringfence.invalid"
        return
    with pytest.raises(secrets.AccessDenied, match=r"'api_lost' names the mesh host 'nowhere\.virtual\.consul'"):
        task_process._get_connection("api_lost")
    with pytest.raises(secrets.AccessDenied):
        asyncio.run(task_process._async_get_connection("api_lost"))


@pytest.mark.skipif(secrets.AccessDenied is None, reason="Airflow 3.2.2 and later stop at a denial")
def test_the_denial_is_the_one_at_which_airflow_stops():
    assert secrets.AccessDenied.__module__ == "airflow.sdk.exceptions"


@pytest.mark.skipif(not AIRFLOW_3, reason="Airflow 3 tells processes apart")
def test_a_supervisor_of_airflow_3_never_asks_the_database(monkeypatch):
    from airflow.sdk import Connection as TaskConnection

    monkeypatch.delenv("_AIRFLOW_PROCESS_CONTEXT", raising=False)
    assert secrets._following(TaskConnection) == [secrets.ENVIRONMENT]
    assert secrets._following(Connection) == [secrets.ENVIRONMENT, secrets.METASTORE]
    monkeypatch.setenv("_AIRFLOW_PROCESS_CONTEXT", "server")
    assert secrets._following(TaskConnection) == [secrets.ENVIRONMENT, secrets.METASTORE]
