"""Airflow finds the provider, its plugin and its link by the conventions of the version."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from importlib.resources import files
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import jsonschema
import pytest
from airflow.providers_manager import ProvidersManager

from airflow_ringfence import __version__
from airflow_ringfence.link import MeshConnectionsLink
from airflow_ringfence.provider import get_provider_info

PACKAGE = "airflow-provider-ringfence"
KEY = SimpleNamespace(dag_id="pay/roll", task_id="load", run_id="manual__2026-11-24T00:00:00+00:00", try_number=2, map_index=-1)


def test_the_description_follows_airflows_schema():
    schema = json.loads(files("airflow").joinpath("provider_info.schema.json").read_text())
    jsonschema.validate(get_provider_info(), schema)


def test_airflow_lists_the_provider_with_its_parts():
    manager = ProvidersManager()
    assert manager.providers[PACKAGE].version == __version__
    assert "airflow_ringfence.link.MeshConnectionsLink" in manager.extra_links_class_names
    assert "airflow_ringfence.secrets.RingfenceSecretsBackend" in manager.secrets_backend_class_names
    assert "console_url" in dict(manager.provider_configs)[PACKAGE]["ringfence"]["options"]


def test_airflow_loads_the_plugin_by_its_entry_point():
    (entry,) = [entry for entry in entry_points(group="airflow.plugins") if entry.name == "ringfence"]
    plugin = entry.load()
    assert plugin.__module__ == "airflow_ringfence.plugin"
    plugin.validate()


def test_airflow_offers_the_link_on_every_task():
    from airflow import plugins_manager

    if hasattr(plugins_manager, "get_global_operator_extra_links"):
        links = plugins_manager.get_global_operator_extra_links()
    else:
        plugins_manager.initialize_extra_operators_links_plugins()
        links = plugins_manager.global_operator_extra_links
    assert "Mesh connections" in [link.name for link in links]


@pytest.mark.parametrize("base", ["https://mesh.example.com", "https://mesh.example.com/"])
def test_the_link_leads_to_one_try(monkeypatch, base):
    monkeypatch.setenv("AIRFLOW__RINGFENCE__CONSOLE_URL", base)
    link = urlsplit(MeshConnectionsLink().get_link(None, ti_key=KEY))
    assert (link.scheme, link.netloc, link.path) == ("https", "mesh.example.com", "/airflow")
    expected = {"dag": ["pay/roll"], "task": ["load"], "run": [KEY.run_id], "try": ["2"], "map": ["-1"]}
    assert parse_qs(link.query, strict_parsing=True) == expected


def test_the_link_leads_to_this_hosts_admin_port_unless_told_otherwise():
    assert (
        MeshConnectionsLink()
        .get_link(None, ti_key=KEY)
        .startswith("http://127.0.0.1:19000/airflow?dag=pay%2Froll&task=load&run=")
    )
