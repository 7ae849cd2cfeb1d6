"""`reports` wants to read the warehouse, which its identity may not until an intention says so."""

import pathlib
import sys
from datetime import datetime

from airflow.providers.postgres.hooks.postgres import PostgresHook

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from compat import dag, task
from speak import speak


@dag(schedule=None, start_date=datetime(2026, 1, 1), catchup=False)
def reports():
    """One task."""

    @task
    def load():
        connection = PostgresHook("warehouse").get_conn()
        speak(connection, "hook")
        connection.close()

    load()


reports()
