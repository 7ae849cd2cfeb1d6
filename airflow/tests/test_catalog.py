"""The catalog says what the metadata database says of each current DAG, and its file is replaced whole or not at all."""

from __future__ import annotations

import json
import stat
from argparse import Namespace

import airflow
import pytest
from airflow.models.base import Base
from airflow.models.dag import DagModel, DagTag
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from airflow_ringfence import catalog, commands
from airflow_ringfence.catalog import CatalogError

AIRFLOW_3 = not airflow.__version__.startswith("2.")
HAS_TEAMS = "dag_bundle_team" in Base.metadata.tables and "team_name" in Base.metadata.tables["dag_bundle_team"].columns
FAB = "airflow.providers.fab.auth_manager.fab_auth_manager.FabAuthManager"
SIMPLE = "airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager"
FAB_TABLES = """
    CREATE TABLE IF NOT EXISTS ab_role (id INTEGER PRIMARY KEY, name TEXT);
    CREATE TABLE IF NOT EXISTS ab_permission (id INTEGER PRIMARY KEY, name TEXT);
    CREATE TABLE IF NOT EXISTS ab_view_menu (id INTEGER PRIMARY KEY, name TEXT);
    CREATE TABLE IF NOT EXISTS ab_permission_view (id INTEGER PRIMARY KEY, permission_id INTEGER, view_menu_id INTEGER);
    CREATE TABLE IF NOT EXISTS ab_permission_view_role (id INTEGER PRIMARY KEY, permission_view_id INTEGER, role_id INTEGER);
    INSERT INTO ab_role VALUES (1, 'finance'), (2, 'audit'), (3, 'Admin');
    INSERT INTO ab_permission VALUES (1, 'can_edit'), (2, 'can_read');
    INSERT INTO ab_view_menu VALUES (1, 'DAG:payroll_daily'), (2, 'DAGs'), (3, 'DAG Run:payroll_daily');
    INSERT INTO ab_permission_view VALUES (1, 1, 1), (2, 2, 1), (3, 1, 2), (4, 1, 3);
    INSERT INTO ab_permission_view_role VALUES (1, 1, 1), (2, 2, 1), (3, 2, 2), (4, 3, 3), (5, 4, 2);
"""


@pytest.fixture
def session(monkeypatch):
    monkeypatch.setenv("AIRFLOW__CORE__AUTH_MANAGER", SIMPLE)
    engine = create_engine("sqlite://")
    names = {"dag", "dag_tag", "dag_bundle", "team", "dag_bundle_team"}
    Base.metadata.create_all(engine, [table for name, table in Base.metadata.tables.items() if name in names])
    with Session(engine) as session:
        yield session


def a_dag(session, dag_id, current=True, tags=(), **fields):
    if AIRFLOW_3:
        from airflow.models.dagbundle import DagBundleModel

        if not session.get(DagBundleModel, "finance"):
            session.add(DagBundleModel(name="finance"))
            session.flush()
        fields = {"bundle_name": "finance", "is_stale": not current, **fields}
    else:
        fields = {"is_active": current, **fields}
    session.add(DagModel(dag_id=dag_id, max_active_tasks=1, max_active_runs=1, **fields))
    session.flush()
    session.add_all([DagTag(name=tag, dag_id=dag_id) for tag in tags])
    session.flush()


def place(path):
    """The DAG's file as the version keeps it."""
    from airflow import settings

    return {"relative_fileloc": path, "fileloc": f"/b/{path}"} if AIRFLOW_3 else {"fileloc": f"{settings.DAGS_FOLDER}/{path}"}


def with_fab(session, monkeypatch):
    monkeypatch.setenv("AIRFLOW__CORE__AUTH_MANAGER", FAB)
    for statement in filter(str.strip, FAB_TABLES.split(";")):
        session.execute(text(statement.replace("'DAG:", "'DAG\\:")))


def test_a_dag_is_told_with_its_place_tags_and_owners(session):
    a_dag(session, "payroll_daily", tags=["x", "mesh:etl"], owners="fin, ops,fin", **place("finance/payroll.py"))
    assert catalog.collect(session) == {
        "version": 1,
        "dags": {
            "payroll_daily": {
                "path": "finance/payroll.py",
                "bundle": "finance" if AIRFLOW_3 else None,
                "team": None,
                "tags": ["mesh:etl", "x"],
                "owners": ["fin", "ops"],
                "roles": {},
            }
        },
    }


def test_dags_that_are_gone_are_left_out(session):
    a_dag(session, "gone", current=False)
    a_dag(session, "here")
    facts = catalog.collect(session)["dags"]
    assert list(facts) == ["here"]
    assert (facts["here"]["path"], facts["here"]["owners"]) == ("", [])


def test_roles_are_told_with_what_they_hold_on_the_dag_itself(session, monkeypatch):
    a_dag(session, "payroll_daily")
    a_dag(session, "other")
    with_fab(session, monkeypatch)
    facts = catalog.collect(session)["dags"]
    assert facts["payroll_daily"]["roles"] == {"can_edit": ["finance"], "can_read": ["audit", "finance"]}
    assert facts["other"]["roles"] == {}


def test_another_auth_manager_has_no_roles_even_if_fabs_tables_are_left(session, monkeypatch):
    a_dag(session, "payroll_daily")
    with_fab(session, monkeypatch)
    monkeypatch.setenv("AIRFLOW__CORE__AUTH_MANAGER", SIMPLE)
    assert catalog.collect(session)["dags"]["payroll_daily"]["roles"] == {}


def test_fab_without_its_tables_is_no_catalog_without_roles(session, monkeypatch):
    monkeypatch.setenv("AIRFLOW__CORE__AUTH_MANAGER", FAB)
    with pytest.raises(CatalogError, match="no table ab_permission_view_role: run `airflow db migrate`"):
        catalog.collect(session)


def test_the_query_names_fabs_tables_as_fab_does():
    models = pytest.importorskip("airflow.providers.fab.auth_manager.models")
    tables = models.Model.metadata.tables
    for name in ("ab_role", "ab_permission", "ab_view_menu"):
        assert {"id", "name"} <= set(tables[name].columns.keys())
    assert {"permission_id", "view_menu_id"} <= set(tables["ab_permission_view"].columns.keys())
    assert {"permission_view_id", "role_id"} <= set(tables["ab_permission_view_role"].columns.keys())


@pytest.mark.skipif(not HAS_TEAMS, reason="teams are of Airflow 3.2 and later")
def test_a_team_is_that_of_the_bundle(session):
    from airflow.models.team import Team, dag_bundle_team_association_table

    a_dag(session, "payroll_daily")
    session.add(Team(name="money"))
    session.flush()
    session.execute(dag_bundle_team_association_table.insert().values(dag_bundle_name="finance", team_name="money"))
    assert catalog.collect(session)["dags"]["payroll_daily"]["team"] == "money"


def test_the_file_is_json_that_ringfence_may_read(tmp_path):
    out = tmp_path / "catalog.json"
    catalog.write({"version": 1, "dags": {"ü": {}}}, out)
    assert json.loads(out.read_text(encoding="utf-8")) == {"version": 1, "dags": {"ü": {}}}
    assert stat.S_IMODE(out.stat().st_mode) == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["catalog.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    out = tmp_path / "catalog.json"
    out.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(catalog.os, "fsync", full)
    with pytest.raises(CatalogError, match="No space left on device; the file is as it was"):
        catalog.write({}, out)
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["catalog.json"]
    with pytest.raises(CatalogError, match="make it, or run as a user"):
        catalog.write({}, tmp_path / "absent" / "catalog.json")


@pytest.fixture
def database(session, monkeypatch):
    from airflow.utils import session as airflow_session

    monkeypatch.setattr(airflow_session, "create_session", lambda: session)


def test_the_command_writes_the_file_and_counts(database, session, tmp_path, capsys):
    a_dag(session, "payroll_daily")
    session.commit()
    out = str(tmp_path / "c.json")
    assert commands.catalog(Namespace(out=out, json=False)) == 0
    assert capsys.readouterr().out == f"wrote 1 DAGs to {out}\n"
    assert commands.catalog(Namespace(out=out, json=True)) == 0
    assert json.loads(capsys.readouterr().out) == {"out": out, "dags": 1}


def test_a_database_without_tables_is_a_sentence(tmp_path, monkeypatch, capsys):
    from airflow.utils import session as airflow_session

    monkeypatch.setattr(airflow_session, "create_session", lambda: Session(create_engine("sqlite://")))
    assert commands.catalog(Namespace(out=str(tmp_path / "c.json"), json=False)) == 1
    assert "the metadata database does not answer (no such table" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
