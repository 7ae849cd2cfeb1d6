"""What every task does: connects to the warehouse and writes there who it is, and from which local port it spoke.

A script for Bash, subprocesses and other Pythons (PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE say where), a module for
TaskFlow.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

SQL = "insert into truth (dag, task, run, try, map_index, how, port) values (%s, %s, %s, %s, %s, %s, %s)"


def local_port(connection: Any) -> int:
    """Of a libpq connection, as the kernel knows it."""
    with socket.socket(fileno=os.dup(connection.fileno())) as twin:
        return int(twin.getsockname()[1])


def speak(connection: Any, how: str, map_index: int = -1) -> None:
    """Writes who this is over the connection, by what Airflow told this process."""
    names = ("DAG_ID", "TASK_ID", "DAG_RUN_ID", "TRY_NUMBER")
    dag, task, run, number = (os.environ.get(f"AIRFLOW_CTX_{name}", "") for name in names)
    cursor = connection.cursor()
    cursor.execute(SQL, (dag, task, run, int(number or 0), map_index, how, local_port(connection)))
    connection.commit()


if __name__ == "__main__":
    import psycopg2

    once = psycopg2.connect("")
    speak(once, sys.argv[1])
    once.close()
