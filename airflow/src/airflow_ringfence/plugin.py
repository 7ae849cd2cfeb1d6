"""The plugin that Airflow loads by the entry point `airflow.plugins`.

The entry point is needed besides the provider: while `[core] lazy_load_providers` is on, plugins of providers are skipped.
"""

from __future__ import annotations

from typing import Any, ClassVar

from airflow.plugins_manager import AirflowPlugin

from airflow_ringfence import listener
from airflow_ringfence.link import MeshConnectionsLink


class RingfencePlugin(AirflowPlugin):
    """The listener, and the link on every task's page."""

    name = "ringfence"
    listeners: ClassVar[list[Any]] = [listener]
    global_operator_extra_links: ClassVar[list[Any]] = [MeshConnectionsLink()]
