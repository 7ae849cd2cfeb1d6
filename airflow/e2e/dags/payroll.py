"""`payroll_daily` reaches the warehouse in every way that a task can; `payroll_steady` goes on for a while.

Nothing here knows of ringfence: the Connection `warehouse` names the host warehouse.virtual.consul.
"""

import os
import pathlib
import subprocess
import sys
import time
from datetime import datetime, timedelta

from airflow.providers.postgres.hooks.postgres import PostgresHook

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from compat import BaseOperator, BashOperator, TimeDeltaTrigger, dag, task  # noqa: E402
from speak import speak  # noqa: E402

SPEAK = str(pathlib.Path(__file__).with_name("speak.py"))
PYTHON = os.environ.get("RINGFENCE_E2E_PYTHON", sys.executable)
PGENV = {
    "PGHOST": "{{ conn.warehouse.host }}", "PGPORT": "{{ conn.warehouse.port }}", "PGUSER": "{{ conn.warehouse.login }}",
    "PGPASSWORD": "{{ conn.warehouse.password }}", "PGDATABASE": "{{ conn.warehouse.schema }}",
}
PSQL = """
insert into truth (dag, task, run, try, map_index, how, port)
values ('$AIRFLOW_CTX_DAG_ID', '$AIRFLOW_CTX_TASK_ID', '$AIRFLOW_CTX_DAG_RUN_ID', $AIRFLOW_CTX_TRY_NUMBER, -1, 'psql', 0)
"""
START = datetime(2026, 1, 1)


def environment(hook: PostgresHook) -> dict[str, str]:
    """libpq's variables for the Connection, as a child needs them."""
    found = hook.get_connection("warehouse")
    names = {"PGHOST": found.host, "PGPORT": str(found.port), "PGUSER": found.login, "PGPASSWORD": found.password, "PGDATABASE": found.schema}
    return {**os.environ, **names}


def ask(how: str, map_index: int = -1) -> None:
    """One connection of the hook's."""
    connection = PostgresHook("warehouse").get_conn()
    speak(connection, how, map_index)
    connection.close()


class WaitThenAsk(BaseOperator):
    """Asks, defers to the triggerer for a second, and asks again in a process of its own."""

    def execute(self, context):
        """Before."""
        ask("before it was deferred")
        self.defer(trigger=TimeDeltaTrigger(timedelta(seconds=1)), method_name="resume")

    def resume(self, context, event=None):
        """After."""
        ask("after it was deferred")


@dag(schedule=None, start_date=START, catchup=False)
def payroll_daily():
    """Every kind of task."""

    @task
    def taskflow():
        ask("hook")

    @task
    def child():
        subprocess.run([PYTHON, SPEAK, "subprocess"], check=True, env=environment(PostgresHook("warehouse")))

    @task
    def daemon():
        # setsid and a lost parent: nothing but the cgroup tells whose it is.
        script = f"setsid {PYTHON} {SPEAK} daemon </dev/null >/dev/null 2>&1 & "
        subprocess.run(["bash", "-c", script], check=True, env=environment(PostgresHook("warehouse")))
        time.sleep(2)

    @task.external_python(python=PYTHON)
    def external(script, host, port, login, password, schema):
        import os
        import runpy
        import sys

        os.environ.update(PGHOST=host, PGPORT=port, PGUSER=login, PGPASSWORD=password, PGDATABASE=schema)
        sys.argv = [script, "external python"]
        runpy.run_path(script, run_name="__main__")

    @task
    def mapped(number):
        ask("mapped", number)

    taskflow()
    child()
    daemon()
    external(SPEAK, *PGENV.values())
    mapped.expand(number=[0, 1, 2])
    BashOperator(task_id="bash", bash_command=f"{PYTHON} {SPEAK} bash", env=PGENV, append_env=True)
    BashOperator(task_id="bash_psql", bash_command=f'psql -q -c "{PSQL}"', env=PGENV, append_env=True)
    WaitThenAsk(task_id="deferrable")


@dag(schedule=None, start_date=START, catchup=False, default_args={"retries": 3, "retry_delay": timedelta(seconds=1)})
def payroll_steady():
    """Queries every 0.2 s for as long as conf says: over one connection, and over a new one each time."""

    @task
    def one_connection(dag_run=None):
        connection = PostgresHook("warehouse").get_conn()
        deadline, count = time.monotonic() + float(dag_run.conf["seconds"]), 0
        while time.monotonic() < deadline:
            connection.cursor().execute("select 1")
            count += 1
            time.sleep(0.2)
        speak(connection, "one connection", detail=str(count))
        connection.close()

    @task
    def new_connections(dag_run=None):
        hook, count = PostgresHook("warehouse"), 0
        deadline = time.monotonic() + float(dag_run.conf["seconds"])
        while time.monotonic() < deadline:
            connection = hook.get_conn()
            speak(connection, "new connections", detail=str(count))
            connection.close()
            count += 1
            time.sleep(0.2)

    one_connection()
    new_connections()


payroll_daily()
payroll_steady()
