"""Rotation of the CA and restart of ringfence while a DAG runs."""

from __future__ import annotations

from e2e.airflow import Deployment
from e2e.report import Report


def rotation(deployment: Deployment, report: Report) -> None:
    """Later."""


def restart(deployment: Deployment, report: Report) -> None:
    """Later."""
