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
from compat import BaseOperator, BashOperator, TimeDeltaTrigger, dag, task
from speak import speak

SPEAK = str(pathlib.Path(__file__).with_name("speak.py"))
PYTHON = os.environ.get("RINGFENCE_E2E_PYTHON", sys.executable)
PGENV = {
    "PGHOST": "{{ conn.warehouse.host }}",
    "PGPORT": "{{ conn.warehouse.port }}",
    "PGUSER": "{{ conn.warehouse.login }}",
    "PGPASSWORD": "{{ conn.warehouse.password }}",
    "PGDATABASE": "{{ conn.warehouse.schema }}",
}
PSQL = """
insert into truth (dag, task, run, try, map_index, how, port)
values ('$AIRFLOW_CTX_DAG_ID', '$AIRFLOW_CTX_TASK_ID', '$AIRFLOW_CTX_DAG_RUN_ID', $AIRFLOW_CTX_TRY_NUMBER, -1, 'psql', 0)
"""
START = datetime(2026, 1, 1)
STEADY_MAX = 180


def environment(hook: PostgresHook) -> dict[str, str]:
    """libpq's variables for the Connection, as a child needs them."""
    found = hook.get_connection("warehouse")
    names = {
        "PGHOST": found.host,
        "PGPORT": str(found.port),
        "PGUSER": found.login,
        "PGPASSWORD": found.password,
        "PGDATABASE": found.schema,
    }
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
        # Airflow's own script reads its arguments after this, too.
        airflows, sys.argv = sys.argv, [script, "external python"]
        runpy.run_path(script, run_name="__main__")
        sys.argv = airflows

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


@dag(schedule=None, start_date=START, catchup=False, default_args={"retries": 3, "retry_delay": timedelta(seconds=15)})
def payroll_steady():
    """Queries every 0.2 s until the table `stop` says so: over one connection, and over a new one each time."""

    def goes_on(connection, run):
        cursor = connection.cursor()
        cursor.execute("select count(*) from stop where run = %s", (run,))
        return cursor.fetchone()[0] == 0

    @task
    def one_connection(run_id=None):
        connection, count, deadline = PostgresHook("warehouse").get_conn(), 0, time.monotonic() + STEADY_MAX
        connection.autocommit = True
        speak(connection, "one connection")
        while goes_on(connection, run_id) and time.monotonic() < deadline:
            count += 1
            time.sleep(0.2)
        connection.close()
        print(f"{count} queries over one connection")

    @task
    def new_connections(run_id=None):
        hook, count, more, deadline = PostgresHook("warehouse"), 0, True, time.monotonic() + STEADY_MAX
        while more and time.monotonic() < deadline:
            connection = hook.get_conn()
            speak(connection, "new connections")
            more = goes_on(connection, run_id)
            connection.close()
            count += 1
            time.sleep(0.2)
        print(f"{count} connections")

    one_connection()
    new_connections()


payroll_daily()
payroll_steady()
