"""The `mesh` commands: what each does and prints. `command_line` says how they are called.

Invariant: a command prints its answer to stdout, as text or as one JSON value, and what went wrong to stderr; it returns the
exit status and raises nothing that a person would have to read as a traceback.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from airflow_ringfence.client import Client, RingfenceError, Unreachable

EXIT_DONE, EXIT_FAILED, EXIT_USAGE = 0, 1, 2
ADMIN_ENVIRONMENT = "RINGFENCE_ADMIN"
ADMIN_DEFAULT = "127.0.0.1:19000"
ADMIN_TIMEOUT_SECONDS = 5.0
DENIAL_BYTES_MAX = 1024 * 1024


def whoami(args: Namespace) -> int:
    """Prints who ringfence takes this process for."""
    return _printing(args, lambda: Client().whoami(), _lines)


def routes(args: Namespace) -> int:
    """Prints the mesh services that this host reaches."""
    return _printing(args, lambda: [_present(asdict(route)) for route in Client().routes().routes], _route_lines)


def explain(args: Namespace) -> int:
    """Prints one denial, or what the rules would give to a task."""
    question = (args.dag, args.task, args.to)
    if args.id and not any(question):
        return _printing(args, lambda: _denial(args.id), _lines)
    if all(question) and not args.id:
        return _printing(args, lambda: Client().explain(*question), _lines)
    return _fail("name either the ID of a denial, or --dag, --task and --to together", EXIT_USAGE)


def doctor(args: Namespace) -> int:
    """Prints what is set up and what is not; fails if something is missing."""
    from airflow_ringfence import doctor

    findings = doctor.examine()
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{finding.result:8} {finding.check}: {finding.text}")
    return EXIT_FAILED if any(finding.result == doctor.FAILED for finding in findings) else EXIT_DONE


def catalog(args: Namespace) -> int:
    """Writes the catalog file."""
    from airflow.utils.session import create_session
    from sqlalchemy.exc import SQLAlchemyError

    from airflow_ringfence import catalog

    out = Path(args.out)
    try:
        with create_session() as session:
            collected = catalog.collect(session)
        catalog.write(collected, out)
    except catalog.CatalogError as error:
        return _fail(str(error))
    except SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or error).strip()
        return _fail(f"the metadata database does not answer ({cause}): run this with the scheduler's configuration")
    count = len(collected["dags"])
    print(json.dumps({"out": str(out), "dags": count}) if args.json else f"wrote {count} DAGs to {out}")
    return EXIT_DONE


def _printing(args: Namespace, ask: Callable[[], Any], lines: Callable[[Any], Iterator[str]]) -> int:
    try:
        answer = ask()
    except RingfenceError as error:
        return _fail(str(error))
    print(json.dumps(answer, indent=1, ensure_ascii=False) if args.json else "\n".join(lines(answer)))
    return EXIT_DONE


def _fail(text: str, status: int = EXIT_FAILED) -> int:
    print(f"ringfence: {text}", file=sys.stderr)
    return status


def _denial(identifier: str) -> Any:
    """The denial that ringfence keeps under this id, from its admin port."""
    address = _admin_address()
    connection = http.client.HTTPConnection(address, timeout=ADMIN_TIMEOUT_SECONDS)
    try:
        connection.request("GET", f"/denials/{quote(identifier, safe='')}", headers={"Accept": "application/json"})
        response = connection.getresponse()
        body = response.read(DENIAL_BYTES_MAX)
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"no answer from ringfence's admin port {address} ({error}): see {ADMIN_ENVIRONMENT}") from None
    finally:
        connection.close()
    if response.status == http.client.NOT_FOUND:
        raise RingfenceError(f"ringfence keeps no denial {identifier!r}, but the latest only: look into the connection log")
    if response.status != http.client.OK:
        raise Unreachable(f"ringfence's admin port {address} answered {response.status} {response.reason}: is it ringfence's?")
    try:
        return json.loads(body)
    except ValueError:
        raise Unreachable(f"ringfence's admin port {address} did not answer with JSON: is it ringfence's?") from None


def _admin_address() -> str:
    """HOST:PORT, from the environment, from ringfence itself, or its default."""
    if named := os.environ.get(ADMIN_ENVIRONMENT):
        return urlsplit(named).netloc if "://" in named else named
    try:
        return Client().routes().admin or ADMIN_DEFAULT
    except RingfenceError:
        return ADMIN_DEFAULT


def _route_lines(routes: list[dict[str, Any]]) -> Iterator[str]:
    if not routes:
        yield "no mesh service is reachable from here"
    width = max((len(route["service"]) for route in routes), default=0)
    for route in routes:
        address = f"unix:{route['unix']}" if "unix" in route else f"{route['address']}:{route['port']}"
        yield f"{route['service']:{width}}  {address}"


def _present(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _lines(value: Any, indent: str = "") -> Iterator[str]:
    """A JSON value for people: `key: value`, lists with dashes, what is inside further in. Absent values are left out."""
    if isinstance(value, dict):
        for name, inner in _present(value).items():
            yield from _labelled(f"{indent}{name}:", inner, indent)
    elif isinstance(value, list):
        for inner in value:
            yield from _labelled(f"{indent}-", inner, indent)
    else:
        yield f"{indent}{_scalar(value)}"


def _labelled(label: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, (dict, list)):
        yield label if value else f"{label} none"
        yield from _lines(value, f"{indent}  ")
    else:
        yield f"{label} {_scalar(value)}"


def _scalar(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
