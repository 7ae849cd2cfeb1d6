"""Where this host reaches each mesh service, as ringfence tells it.

Invariant: within `FRESH_SECONDS` of an answer the socket is not touched again, and an older answer is never used: when
ringfence is away there is no route. The table belongs to the process and not to its reader, because Airflow 3.1 and 3.2 make a
secrets backend for every look-up. It is replaced whole, so threads need no lock, and a forked child inherits it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from airflow_ringfence.client import Client, Route, socket_path

FRESH_SECONDS = 30.0


@dataclass(frozen=True)
class RouteTable:
    """The routes of each service, by its name in lower case, in ringfence's order."""

    by_service: Mapping[str, tuple[Route, ...]]
    read_at_seconds: float

    def of(self, service: str) -> tuple[Route, ...]:
        """The routes of `service`; none if this host has none."""
        return self.by_service.get(service.lower(), ())

    def services(self) -> list[str]:
        """Every service with a route."""
        return sorted(self.by_service)


_tables: dict[str, RouteTable] = {}


def route_table() -> RouteTable:
    """The table of this host, at most `FRESH_SECONDS` old. Raises `RingfenceError` if ringfence does not tell it."""
    path = socket_path()
    table = _tables.get(path)
    if table is None or time.monotonic() - table.read_at_seconds > FRESH_SECONDS:
        table = _read(path)
        _tables[path] = table
    return table


def forget() -> None:
    """Lets the next look-up ask ringfence."""
    _tables.clear()


def _read(path: str) -> RouteTable:
    by_service: dict[str, tuple[Route, ...]] = {}
    for route in Client(path).routes().routes:
        name = route.service.lower()
        by_service[name] = (*by_service.get(name, ()), route)
    return RouteTable(by_service, time.monotonic())
