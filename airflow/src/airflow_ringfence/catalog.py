"""The catalog: what Airflow's metadata database says of each DAG, for the conditions of ringfence's rules.

Tags and owners are written by DAG authors; file path, bundle, team and roles by who runs the deployment. ringfence keeps these
classes apart; this module only copies. A role is listed with what it holds on the DAG itself (`DAG:<dag_id>`), not with what it
holds on all DAGs: a rule for a role would otherwise match everywhere.

Invariant: the file is replaced whole or not at all.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

VERSION = 1
FILE_MODE = 0o644
FAB_AUTH_MANAGER = "FabAuthManager"
FAB_TABLE = "ab_permission_view_role"
DAG_PREFIX = "DAG:"
FAB_GRANTS = """
    SELECT ab_view_menu.name, ab_permission.name, ab_role.name
    FROM ab_permission_view_role
    JOIN ab_role ON ab_role.id = ab_permission_view_role.role_id
    JOIN ab_permission_view ON ab_permission_view.id = ab_permission_view_role.permission_view_id
    JOIN ab_permission ON ab_permission.id = ab_permission_view.permission_id
    JOIN ab_view_menu ON ab_view_menu.id = ab_permission_view.view_menu_id
    WHERE ab_view_menu.name LIKE :pattern
"""


class CatalogError(Exception):
    """The catalog could not be made or written. The text says why and what to do."""


def collect(session: Any) -> dict[str, Any]:
    """The catalog of every DAG that Airflow has now."""
    tags, roles, teams = _tags(session), _roles(session), _teams(session)
    dags = {}
    for dag in _current_dags(session):
        bundle = getattr(dag, "bundle_name", None)
        dags[dag.dag_id] = {
            "path": _relative_path(dag),
            "bundle": bundle,
            "team": teams.get(bundle),
            "tags": sorted(tags[dag.dag_id]),
            "owners": sorted({owner.strip() for owner in (dag.owners or "").split(",")} - {""}),
            "roles": {permission: sorted(names) for permission, names in sorted(roles[dag.dag_id].items())},
        }
    return {"version": VERSION, "dags": dags}


def write(catalog: dict[str, Any], out: Path) -> None:
    """Puts the catalog in the place of `out`, readable for ringfence's user."""
    text = json.dumps(catalog, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        handle, beside = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        raise CatalogError(
            f"cannot write in {out.parent}: {error.strerror}: make it, or run as a user that may write there"
        ) from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), FILE_MODE)
            os.fsync(file.fileno())
        Path(beside).replace(out)
    except OSError as error:
        Path(beside).unlink()
        raise CatalogError(f"cannot write {out}: {error.strerror}; the file is as it was") from None


def _current_dags(session: Any) -> list[Any]:
    from airflow.models.dag import DagModel

    current = DagModel.is_stale.is_(False) if hasattr(DagModel, "is_stale") else DagModel.is_active.is_(True)
    return list(session.query(DagModel).filter(current).order_by(DagModel.dag_id))


def _relative_path(dag: Any) -> str:
    """The DAG's file below its bundle; in Airflow 2 below the DAGs folder."""
    return str(dag.relative_fileloc or dag.fileloc or "")


def _tags(session: Any) -> dict[str, set[str]]:
    from airflow.models.dag import DagTag

    tags: dict[str, set[str]] = defaultdict(set)
    for dag_id, name in session.query(DagTag.dag_id, DagTag.name):
        tags[dag_id].add(name)
    return tags


def _teams(session: Any) -> dict[str | None, str]:
    """The team of each bundle: Airflow 3.2 and later, in multi-team mode. 3.1 has the table, but not yet the names."""
    try:
        from airflow.models.team import dag_bundle_team_association_table as table
    except ImportError:
        return {}
    if "team_name" not in table.columns:
        return {}
    return {bundle: team for bundle, team in session.query(table.c.dag_bundle_name, table.c.team_name)}  # noqa: C416 (typed rows)


def _roles(session: Any) -> dict[str, dict[str, set[str]]]:
    """Roles by DAG and permission, where the FAB auth manager keeps them."""
    from airflow.configuration import conf
    from sqlalchemy import inspect, text

    roles: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    if FAB_AUTH_MANAGER not in conf.get("core", "auth_manager", fallback=""):
        return roles
    if not inspect(session.connection()).has_table(FAB_TABLE):
        raise CatalogError(f"FAB is the auth manager, but the database has no table {FAB_TABLE}: run `airflow db migrate`")
    for resource, permission, role in session.execute(text(FAB_GRANTS), {"pattern": f"{DAG_PREFIX}%"}):
        roles[resource.removeprefix(DAG_PREFIX)][permission].add(role)
    return roles
