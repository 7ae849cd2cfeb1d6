"""The link `Mesh connections` on a task's page: ringfence's view of the connections of that try."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from airflow.configuration import conf

try:
    from airflow.sdk import BaseOperatorLink
except ImportError:  # Airflow 2
    from airflow.models.baseoperatorlink import BaseOperatorLink

SECTION = "ringfence"
CONSOLE_URL_DEFAULT = "http://127.0.0.1:19000"


class MeshConnectionsLink(BaseOperatorLink):
    """Leads to `{console_url}/airflow` for one task try."""

    @property
    def name(self) -> str:
        """The text of the button."""
        return "Mesh connections"

    def get_link(self, operator: Any, *, ti_key: Any) -> str:
        """The address for the try that `ti_key` names."""
        query = {
            "dag": ti_key.dag_id,
            "task": ti_key.task_id,
            "run": ti_key.run_id,
            "try": ti_key.try_number,
            "map": ti_key.map_index,
        }
        return f"{console_url()}/airflow?{urlencode(query)}"


def console_url() -> str:
    """`[ringfence] console_url`, without a slash at its end."""
    return str(conf.get(SECTION, "console_url", fallback=CONSOLE_URL_DEFAULT) or CONSOLE_URL_DEFAULT).rstrip("/")
