"""Every Connection that names the mesh gets an address inside it, and no other Connection is touched."""

from __future__ import annotations

import pytest

from airflow_ringfence.client import Route
from airflow_ringfence.rewriting import Fields, NoRoute, choose, dead_end, mesh_name, rewrite, service_of

TCP = Route("warehouse", address="127.0.0.1", port=25435)
TCP6 = Route("warehouse", address="::1", port=25435)
PG_SOCKET = Route("ledger", unix="/run/mesh/ledger/.s.PGSQL.5432")
SOCKET = Route("queue", unix="/run/mesh/queue.sock")
HOST = "warehouse.virtual.consul"
FULL = {"sslmode": "verify-full"}


@pytest.mark.parametrize(
    ("host", "service"),
    [
        ("warehouse.virtual.consul", "warehouse"),
        ("Warehouse.Virtual.CONSUL.", "warehouse"),
        ("warehouse.virtual.dc1.consul", "warehouse"),
        ("my_ware-house2.virtual.consul", "my_ware-house2"),
        ("warehouse.virtual.consul:5432", "warehouse"),
        (" warehouse.virtual.consul ", "warehouse"),
        ("https://warehouse.virtual.consul/v1", "warehouse"),
        ("http://user:pw@warehouse.virtual.consul:8080/v1?x=1", "warehouse"),
    ],
)
def test_a_virtual_name_names_its_service(host, service):
    name = mesh_name(host)
    assert name is not None
    assert service_of(name) == service


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "db.example.com",
        "warehouse.service.consul",
        "virtual.consul",
        "warehouse.virtual.consul.example.com",
        "https://example.com/warehouse.virtual.consul",
        "https://warehouse.virtual.consul@example.com/",
        "/var/run/postgresql",
        "a.example.com,b.example.com",
        "[::1]:5432",
        "10.0.0.7",
    ],
)
def test_what_names_no_mesh_service_is_left_alone(host):
    assert mesh_name(host) is None


def test_other_hosts_are_in_the_mesh_where_the_deployment_says_so():
    assert mesh_name("DB.example.com:5432", {"db.example.com"}) == "db.example.com"


@pytest.mark.parametrize("host", ["warehouse.virtual.consul,db.example.com", "db.example.com:1,warehouse.virtual.consul:2"])
def test_several_hosts_are_refused_rather_than_half_rewritten(host):
    with pytest.raises(NoRoute, match="give a Connection one mesh host"):
        mesh_name(host)


@pytest.mark.parametrize(
    "host", ["warehouse.virtual.ns.ns.dc.consul", "a.b.virtual.consul", ".virtual.consul", "x.virtual.a.b.consul"]
)
def test_a_virtual_name_of_an_unknown_form_is_refused_rather_than_resolved(host):
    name = mesh_name(host)
    assert name is not None
    with pytest.raises(NoRoute, match=r"write NAME\.virtual\.consul"):
        service_of(name)


@pytest.mark.parametrize(
    ("fields", "route", "expected"),
    [
        (Fields("postgres", HOST, 5432), TCP, Fields("postgres", "127.0.0.1", 25435)),
        (Fields("http", HOST, None), TCP, Fields("http", "127.0.0.1", 25435)),
        (Fields("redis", f"{HOST}:6379", 6379), TCP, Fields("redis", "127.0.0.1", 25435)),
        (Fields("http", f"http://{HOST}", 80), TCP, Fields("http", "http://127.0.0.1:25435", None)),
        (Fields("http", f"https://{HOST}:8443/v1?a=b", None), TCP, Fields("http", "https://127.0.0.1:25435/v1?a=b", None)),
        (Fields("http", f"{HOST}/v1", 80), TCP, Fields("http", "127.0.0.1:25435/v1", None)),
        (Fields("http", f"http://u:p@{HOST}/", None), TCP, Fields("http", "http://u:p@127.0.0.1:25435/", None)),
        (Fields("http", f"http://{HOST}/", None), TCP6, Fields("http", "http://[::1]:25435/", None)),
        (Fields("postgres", HOST, 5432), TCP6, Fields("postgres", "::1", 25435)),
        # The server's certificate is checked against the name, so the name stays.
        (Fields("postgres", HOST, 5432, FULL), TCP, Fields("postgres", HOST, 25435, {**FULL, "hostaddr": "127.0.0.1"})),
        (
            Fields("postgres", f"{HOST.upper()}:5432", None, {"sslmode": "verify-ca", "sslrootcert": "/ca"}),
            TCP,
            Fields("postgres", HOST, 25435, {"sslmode": "verify-ca", "sslrootcert": "/ca", "hostaddr": "127.0.0.1"}),
        ),
        (
            Fields("postgres", HOST, 5432, {"sslmode": "require"}),
            TCP,
            Fields("postgres", "127.0.0.1", 25435, {"sslmode": "require"}),
        ),
        (Fields("http", HOST, 443, FULL), TCP, Fields("http", "127.0.0.1", 25435, FULL)),
        # Extras that would lead the driver past the route.
        (
            Fields("postgres", HOST, 5432, {"hostaddr": "10.0.0.7", "host": "db", "port": 1}),
            TCP,
            Fields("postgres", "127.0.0.1", 25435),
        ),
        (
            Fields("mysql", HOST, 3306, {"unix_socket": "/tmp/x", "charset": "utf8"}),
            TCP,
            Fields("mysql", "127.0.0.1", 25435, {"charset": "utf8"}),
        ),
        (Fields("http", HOST, None, {"host": "kept"}), TCP, Fields("http", "127.0.0.1", 25435, {"host": "kept"})),
        # Unix sockets.
        (Fields("postgres", HOST, 5432, {"hostaddr": "10.0.0.7"}), PG_SOCKET, Fields("postgres", "/run/mesh/ledger", 5432)),
        (Fields("mysql", HOST, 3306), SOCKET, Fields("mysql", "localhost", None, {"unix_socket": "/run/mesh/queue.sock"})),
    ],
)
def test_an_address_is_turned_towards_the_route(fields, route, expected):
    assert rewrite(fields, choose(fields, "warehouse", [route])) == expected


def test_the_first_route_that_the_client_can_use_is_taken():
    assert choose(Fields("postgres", HOST, 5432), "s", [PG_SOCKET, TCP]) is PG_SOCKET
    assert choose(Fields("http", HOST, 80), "s", [PG_SOCKET, TCP]) is TCP
    assert choose(Fields("postgres", HOST, 5432), "s", [SOCKET, TCP]) is TCP


@pytest.mark.parametrize("conn_type", ["http", "redis", "postgres"])
def test_a_unix_socket_that_the_client_cannot_use_is_no_route(conn_type):
    with pytest.raises(NoRoute, match="give the upstream a `local_bind_port`"):
        choose(Fields(conn_type, HOST, None), "queue", [SOCKET])


def test_a_certificate_check_needs_a_numeric_route():
    with pytest.raises(NoRoute, match="needs a route with an IP address"):
        rewrite(Fields("postgres", HOST, 5432, FULL), Route("w", address="localhost", port=1))


def test_a_dead_end_is_in_a_domain_that_nobody_serves():
    assert dead_end("postgres", HOST) == Fields("postgres", "warehouse.no-route.ringfence.invalid", None)
    assert dead_end("http", "://x").host == "connection.no-route.ringfence.invalid"
