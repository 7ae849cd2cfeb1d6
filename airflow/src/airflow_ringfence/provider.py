"""What Airflow's provider manager wants to know. Imported by every component: keep it free of imports that cost."""

from __future__ import annotations

from typing import Any

from airflow_ringfence import __version__


def get_provider_info() -> dict[str, Any]:
    """The description after `airflow/provider_info.schema.json`. A version ignores the keys that it does not know."""
    return {
        "package-name": "airflow-provider-ringfence",
        "name": "ringfence",
        "description": "Consul Connect for Airflow tasks: a mesh identity for each task try, without a change to the DAGs.",
        "versions": [__version__],
        "secrets-backends": ["airflow_ringfence.secrets.RingfenceSecretsBackend"],
        "extra-links": ["airflow_ringfence.link.MeshConnectionsLink"],
        "cli": ["airflow_ringfence.command_line.get_airflow_commands"],
        "config": {"ringfence": {"description": "ringfence, the sidecar for Consul Connect.", "options": _OPTIONS}},
    }


_OPTIONS = {
    "console_url": {
        "description": "Base of the link `Mesh connections` on a task's page: ringfence's admin port, or what gathers it.",
        "version_added": __version__,
        "type": "string",
        "example": "https://mesh.example.com",
        "default": "http://127.0.0.1:19000",
    },
}
