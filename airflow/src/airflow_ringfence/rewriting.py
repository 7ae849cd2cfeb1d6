"""The address of one Connection, turned towards a route. Pure: no Airflow, no socket, no clock.

Invariant: whoever names a mesh service gets an address inside the mesh or a `NoRoute`. Whatever else in the Connection could
lead the driver elsewhere (an address in the extras) is taken out.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

from airflow_ringfence.client import Route

POSTGRES_TYPES = frozenset({"postgres", "postgresql"})
MYSQL_TYPES = frozenset({"mysql"})
# libpq checks the server's certificate with these, and with verify-full its name too.
SSLMODES_VERIFYING = frozenset({"verify-ca", "verify-full"})
# Extras by which a driver would connect to another address than `host` and `port`.
ADDRESS_EXTRAS: Mapping[frozenset[str], tuple[str, ...]] = {
    POSTGRES_TYPES: ("host", "hostaddr", "port"),
    MYSQL_TYPES: ("unix_socket",),
}
# RFC 6761: no resolver answers for it, so a client ends with this name in its message.
DEAD_END_DOMAIN = "no-route.ringfence.invalid"

_VIRTUAL_NAME = re.compile(r"([a-z0-9_-]{1,63})\.virtual(?:\.[a-z0-9_-]{1,63})?\.consul")
_HOST = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)?(?P<user>[^/?#]*@)?(?P<authority>[^/?#]*)(?P<rest>.*)", re.I | re.S)
_POSTGRES_SOCKET = re.compile(r"\.s\.PGSQL\.(\d{1,5})")


class NoRoute(Exception):
    """A mesh service is named, and no address inside the mesh can be given. The text says why and what to do."""


@dataclass(frozen=True)
class Fields:
    """What of a Connection makes its address."""

    conn_type: str
    host: str
    port: int | None
    extra: Mapping[str, Any] = field(default_factory=dict)


def mesh_name(host: str | None, others: Iterable[str] = ()) -> str | None:
    """The mesh host that `host` names, in lower case: a virtual name of Consul or one of `others`; None if it names none."""
    authority = _parts(host or "")["authority"]
    names = [_name(part) for part in authority.split(",")]
    mesh = [name for name in names if name in others or _looks_virtual(name)]
    if not mesh:
        return None
    if len(names) > 1:
        raise NoRoute(
            f"the host {host!r} names several hosts, of which {mesh[0]!r} is in the mesh: give a Connection one mesh host"
        )
    return mesh[0]


def service_of(name: str) -> str:
    """The Consul service of a virtual name."""
    match = _VIRTUAL_NAME.fullmatch(name)
    if match is None:
        raise NoRoute(
            f"the form of the mesh host {name!r} is not known: write NAME.virtual.consul or NAME.virtual.DATACENTER.consul"
        )
    return match.group(1)


def choose(fields: Fields, service: str, routes: Iterable[Route]) -> Route:
    """The first route that a client of this type can use."""
    routes = tuple(routes)
    for route in routes:
        if route.unix is None or _takes_unix(fields.conn_type, route.unix):
            return route
    raise NoRoute(
        f"mesh service {service!r} has only unix sockets here ({', '.join(map(str, routes))}), which a Connection of type "
        f"{fields.conn_type!r} cannot use: give the upstream a `local_bind_port` (for Postgres a `local_bind_socket_path` that "
        "ends in `.s.PGSQL.5432` serves too)"
    )


def rewrite(fields: Fields, route: Route) -> Fields:
    """The same Connection over `route`, which `choose` found."""
    bare = replace(fields, extra=_without_addresses(fields))
    if route.unix is not None:
        return _over_unix(bare, route.unix)
    if fields.conn_type in POSTGRES_TYPES and fields.extra.get("sslmode") in SSLMODES_VERIFYING:
        return _keeping_the_name(bare, route)
    return _over_tcp(bare, route)


def dead_end(conn_type: str, host: str) -> Fields:
    """A Connection that reaches nothing and says so, for the versions that would ask the next backend after an exception."""
    label = re.sub(r"[^a-z0-9_-].*", "", host.lower(), flags=re.S) or "connection"
    return Fields(conn_type, host=f"{label}.{DEAD_END_DOMAIN}", port=None)


def _over_tcp(fields: Fields, route: Route) -> Fields:
    """Host and port; within the host where it is a URL or has a path, as HTTP Connections may."""
    parts = _parts(fields.host)
    if not parts["scheme"] and not parts["rest"]:
        return replace(fields, host=f"{parts['user']}{route.address}", port=route.port)
    address = f"[{route.address}]" if ":" in (route.address or "") else route.address
    host = f"{parts['scheme']}{parts['user']}{address}:{route.port}{parts['rest']}"
    return replace(fields, host=host, port=None)


def _keeping_the_name(fields: Fields, route: Route) -> Fields:
    """libpq connects to `hostaddr` and checks the server's certificate against `host`."""
    try:
        ipaddress.ip_address(route.address or "")
    except ValueError:
        raise NoRoute(
            f"sslmode {fields.extra['sslmode']!r} needs a route with an IP address, and this one is {route}: "
            "write the address as numbers in `routes`"
        ) from None
    extra = {**fields.extra, "hostaddr": route.address}
    return replace(fields, host=_name(_parts(fields.host)["authority"]), port=route.port, extra=extra)


def _over_unix(fields: Fields, path: str) -> Fields:
    if fields.conn_type in MYSQL_TYPES:
        return replace(fields, host="localhost", port=None, extra={**fields.extra, "unix_socket": path})
    match = _POSTGRES_SOCKET.fullmatch(PurePosixPath(path).name)
    assert match is not None, "choose() takes a unix socket for Postgres by this pattern only"
    return replace(fields, host=str(PurePosixPath(path).parent), port=int(match.group(1)))


def _takes_unix(conn_type: str, path: str) -> bool:
    if conn_type in POSTGRES_TYPES:
        return _POSTGRES_SOCKET.fullmatch(PurePosixPath(path).name) is not None
    return conn_type in MYSQL_TYPES


def _without_addresses(fields: Fields) -> dict[str, Any]:
    dropped = {name for types, names in ADDRESS_EXTRAS.items() if fields.conn_type in types for name in names}
    return {name: value for name, value in fields.extra.items() if name not in dropped}


def _parts(host: str) -> dict[str, str]:
    match = _HOST.fullmatch(host.strip())
    assert match is not None, "every part of the pattern may be empty"
    return {name: part or "" for name, part in match.groupdict().items()}


def _name(authority: str) -> str:
    """The host's name without its port, as DNS compares it."""
    return re.sub(r":\d*$", "", authority.strip()).rstrip(".").lower()


def _looks_virtual(name: str) -> bool:
    return name.endswith(".consul") and ".virtual." in name
