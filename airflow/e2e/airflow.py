"""One deployment of Airflow: a host that runs the tasks and one with the api-server (webserver in Airflow 2), each with a
ringfence of its own, set up by the files of `ringfence airflow init` and nothing else.

Airflow runs as a user without rights, in cgroups that are named and placed as systemd's units.
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.consul import Consul
from e2e.http import Answer, ask
from e2e.install import VERSIONS
from e2e.machine import Machine, Process, wait
from e2e.servers import Postgres, Redis
from e2e.sidecars import Sidecar

ADMIN_TASKS, ADMIN_API = 19000, 19001
PORT_BASE_TASKS, PORT_BASE_API = 22000, 22100
WAREHOUSE_PORT = 25435
APP_PORT = 8080
APP = f"http://127.0.0.1:{APP_PORT}"
RULES = """
[[rule]]
name = "payroll"
dag = ["payroll_*"]
identity = "airflow-payroll"

[[rule]]
name = "reports"
dag = ["reports"]
identity = "airflow-reports"
"""
IDENTITIES = ("airflow-payroll", "airflow-reports")
EXAMPLE_POLICY = '#service "airflow-payroll" {\n#  policy = "write"\n#}\n'
ENDED = ("success", "failed")


@dataclass(frozen=True)
class Task:
    """A task instance as Airflow's database has it."""

    name: str
    map_index: int
    state: str
    try_number: int


class Deployment:
    """See the module."""

    def __init__(
        self,
        machine: Machine,
        consul: Consul,
        postgres: Postgres,
        redis: Redis,
        binary: Path,
        venv: Path,
        version: str,
        executor: str,
    ) -> None:
        self.machine, self.consul, self.postgres, self.redis = machine, consul, postgres, redis
        self.binary, self.venv, self.version, self.executor = binary, venv, version, executor
        self.release = version.split(".", maxsplit=1)[0]
        self.name = f"{VERSIONS[version]} {executor}"
        self.folder = machine.scratch / f"airflow-{version}-{executor}"
        self.home = self.folder / "home"
        shutil.copytree(Path(__file__).parent / "dags", self.home / "dags")
        (self.home / "logs").mkdir()
        for path in [self.home, *self.home.rglob("*")]:
            os.chown(path, machine.user.pw_uid, machine.user.pw_gid)
        self.fernet, self.jwt, self.password = (
            base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
            secrets.token_hex(64),
            secrets.token_hex(8),
        )
        self.components: dict[str, Process] = {}
        self.revived: list[str] = []
        self.headers: dict[str, str] = {}

    @property
    def web(self) -> str:
        """What serves people."""
        return "api-server" if self.release == "3" else "webserver"

    def roles(self) -> list[str]:
        """Those of the host that runs tasks."""
        return ["scheduler", "triggerer", "dag-processor", *(["worker"] if self.executor == "celery" else [])]

    def start_mesh(self) -> None:
        """Files, registrations, intentions, tokens, and both sidecars."""
        self.tasks = self._host("tasks", self.roles(), PORT_BASE_TASKS, ADMIN_TASKS, RULES)
        self.api = self._host("api", ["api-server"], PORT_BASE_API, ADMIN_API, "")
        if self.release == "2":
            # Tasks of Airflow 2 talk to the metadata database themselves: INSTALL.txt and intentions.sh say so.
            for identity in IDENTITIES:
                self.consul.allow(identity, "postgres")
        for sidecar in (self.tasks, self.api):
            sidecar.wait_ready()
        called = ["postgres", "warehouse", *(["redis"] if self.executor == "celery" else [])]
        wait(f"{', '.join(called)} have healthy sidecars", 30, lambda: all(map(self.consul.has_endpoint, called)))

    def start_airflow(self) -> None:
        """The database's tables, then every component, then what an operator does once."""
        self.command("airflow db migrate", ["db", "migrate"])
        if self.release == "2":
            user = [
                "users",
                "create",
                "-u",
                "e2e",
                "-p",
                self.password,
                "-r",
                "Admin",
                "-f",
                "e",
                "-l",
                "e",
                "-e",
                "e@e.example",
            ]
            self.command("airflow users create", user)
        for role in [self.web, *self.roles()]:
            self.start_component(role)
        wait(f"the {self.web} answers", 90, self._is_web_up, 0.3)
        self.headers = self._headers()
        self._add_connection()
        wait("the DAGs are known", 90, self._knows_dags, 0.5)
        if "worker" in self.components:
            wait("the Celery worker is ready", 60, self._is_worker_ready, 0.3)
        if self.release == "3":
            wait("the execution API has a healthy sidecar", 30, lambda: self.consul.has_endpoint("airflow-api-server"))

    def start_component(self, role: str) -> None:
        """As its unit would."""
        words = ["celery", "worker"] if role == "worker" else [role]
        unit = f"airflow-{role}.service"
        host = "api" if role == self.web else "tasks"
        self.components[role] = self.machine.start(
            f"{self.version}-{self.executor}-{role}",
            [self.venv / "bin/airflow", *words],
            unit=unit,
            user=self.machine.user.pw_name,
            env=self.env(host),
        )

    def assert_running(self) -> None:
        """Fails with the last words of a component that has ended."""
        for process in self.components.values():
            process.assert_running()

    def stop_airflow(self) -> None:
        """Ends all components, so that every connection of theirs is closed and logged."""
        for role in list(self.components):
            self.machine.kill_unit(f"airflow-{role}.service")
            self.components.pop(role).child.wait()

    def stop_mesh(self) -> None:
        """Ends the sidecars and takes their registrations and the intentions away."""
        for sidecar in (self.tasks, self.api):
            sidecar.stop(10)
        for intention in self.consul.must("/v1/connect/intentions"):
            self.consul.must(f"/v1/connect/intentions/{intention['ID']}", "DELETE")
        for service in self.consul.must("/v1/agent/services"):
            # Its sidecar goes with it.
            if service.startswith("airflow-") and not service.endswith("-sidecar-proxy"):
                self.consul.must(f"/v1/agent/service/deregister/{service}", "PUT")

    def command(self, name: str, words: list[str]) -> str:
        """A command of Airflow's, run where the scheduler runs."""
        return self.machine.run(
            name,
            [self.venv / "bin/airflow", *words],
            unit="airflow-scheduler.service",
            user=self.machine.user.pw_name,
            env=self.env("tasks"),
        )

    def env(self, host: str) -> dict[str, str]:
        """What the drop-ins load, the secrets, and what is the deployment's own."""
        settings = {}
        for line in (self.folder / host / "airflow.env").read_text().splitlines():
            if line and not line.startswith("#"):
                name, _, value = line.partition("=")
                settings[name] = value
        return {
            "HOME": str(self.home),
            "AIRFLOW_HOME": str(self.home),
            "PATH": f"{self.venv}/bin:/usr/bin:/bin",
            "NO_PROXY": "*",
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__CORE__PARALLELISM": "6",
            # How soon a task is missed whose process could not tell its end: 300 s otherwise. Airflow 3's name, then 2's.
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
            "AIRFLOW__SCHEDULER__SCHEDULER_ZOMBIE_TASK_THRESHOLD": "60",
            # And how soon a new scheduler looks for tasks of one that died: 300 s otherwise.
            "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "30",
            "AIRFLOW__CELERY__WORKER_CONCURRENCY": "4",
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__WEBSERVER__WORKERS": "1",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__API__AUTH_BACKENDS": "airflow.api.auth.backend.basic_auth",
            "AIRFLOW__CORE__FERNET_KEY": self.fernet,
            "AIRFLOW__WEBSERVER__SECRET_KEY": self.jwt,
            "AIRFLOW__API_AUTH__JWT_SECRET": self.jwt,
            "AIRFLOW__API__SECRET_KEY": self.jwt,
            "AIRFLOW_DATABASE_USER": "airflow",
            "AIRFLOW_DATABASE_PASSWORD": self.postgres.passwords["airflow"],
            "AIRFLOW_BROKER_PASSWORD": self.redis.password,
            "RINGFENCE_AIRFLOW_SOCKET": str(self._socket(host)),
            "RINGFENCE_E2E_PYTHON": str(self.venv / "bin/python"),
            **settings,
        }

    def trigger(self, dag: str, run: str, conf: dict[str, Any] | None = None) -> None:
        """A new run."""
        body: dict[str, Any] = {"dag_run_id": run, "conf": conf or {}}
        if self.release == "3":
            body["logical_date"] = None
        self.rest("POST", f"/dags/{dag}/dagRuns", body)

    def state(self, dag: str, run: str) -> str:
        """Of a run."""
        rows = self.postgres.query(f"select state from dag_run where dag_id='{dag}' and run_id='{run}'", "airflow")
        return rows[0][0] if rows else ""

    def take_revived(self) -> list[str]:
        """The components that had ended since this was asked last."""
        revived, self.revived = self.revived, []
        return revived

    def revive(self) -> None:
        """Starts components again that have ended, as Restart= of their units would."""
        for role, process in list(self.components.items()):
            if process.child.poll() is not None:
                self.revived.append(role)
                self.machine.kill_unit(f"airflow-{role}.service")
                self.start_component(role)

    def wait_run(self, dag: str, run: str, seconds: float = 120, revive: bool = False) -> str:
        """The run's last state. A component that ends meanwhile is a failure, or is started again."""

        def has_ended() -> bool | str:
            if revive:
                self.revive()
            self.assert_running()
            state = self.state(dag, run)
            return True if state in ENDED else f"{state}: {self.tasks_of(dag, run)}"

        wait(f"run {run} of {dag} ends", seconds, has_ended, 0.3)
        return self.state(dag, run)

    def tasks_of(self, dag: str, run: str) -> list[Task]:
        """The run's task instances."""
        columns, condition = "task_id, map_index, coalesce(state, ''), try_number", f"dag_id='{dag}' and run_id='{run}'"
        sql = f"select {columns} from task_instance where {condition} order by 1, 2"
        return [
            Task(name, int(index), state, int(number)) for name, index, state, number in self.postgres.query(sql, "airflow")
        ]

    def tasks_that_ran(self) -> set[tuple[str, str, str, int]]:
        """Dag, task, run and map index of every task instance that has ended."""
        sql = f"select dag_id, task_id, run_id, map_index from task_instance where state in {ENDED}"
        return {(dag, task, run, int(index)) for dag, task, run, index in self.postgres.query(sql, "airflow")}

    def task_log(self, dag: str, run: str, task: str) -> str:
        """What a reader of the task's log sees, of all tries."""
        files = sorted((self.home / "logs" / f"dag_id={dag}" / f"run_id={run}" / f"task_id={task}").rglob("*.log"))
        return "\n".join(_readable(line) for file in files for line in file.read_text(errors="replace").splitlines())

    def rest(self, method: str, path: str, body: Any = None) -> Any:
        """Airflow's REST API, as people use it."""
        answer: Answer = ask(f"{APP}/api/v{'2' if self.release == '3' else '1'}{path}", method, body, self.headers)
        if answer.status not in (200, 201):
            raise RuntimeError(f"{method} {path}: {answer.status} {answer.body[:500]}")
        return answer.json()

    def _host(self, host: str, roles: list[str], port_base: int, admin: int, rules: str) -> Sidecar:
        folder = self.folder / host
        operator = self.machine.scratch / "token-operator"
        if not operator.exists():
            operator.write_text(
                self.consul.token_by(
                    "operator",
                    'service_prefix "" { policy = "write" intentions = "write" }\nagent_prefix "" { policy = "read" }',
                )
            )
        words = [
            "airflow",
            "init",
            "-airflow",
            self.release,
            "-executor",
            self.executor,
            "-consul",
            "1.8",
            "-port-base",
            str(port_base),
            "-config-folder",
            str(folder),
            "-out",
            str(folder),
            "-apply",
            "-http-addr",
            self.consul.address,
            "-token-file",
            str(operator),
        ]
        words += [word for role in roles for word in ("-role", role)]
        if rules:
            words += ["-upstream", f"warehouse:{WAREHOUSE_PORT}:postgres"]
        self.machine.run(f"ringfence airflow init of the host {host}", [self.binary, *words])
        file = folder / "airflow.toml"
        text = _replaced(file.read_text(), 'socket = "/run/ringfence/airflow.sock"', f'socket = "{self._socket(host)}"')
        place = f"{self.machine.slice}/tasks" if rules else "off"
        file.write_text(_replaced(text, 'cgroup = "auto"', f'cgroup = "{place}"') + rules)
        policy = (folder / "consul/token-policy.hcl").read_text()
        identities = "".join(f'service "{name}" {{ policy = "write" }}\n' for name in IDENTITIES) if rules else ""
        token = self.consul.token_by(
            f"{self.name}-{host}".replace(" ", "-").replace(".", "-"), _replaced(policy, EXAMPLE_POLICY, identities)
        )
        unit = (folder / "systemd/ringfence-airflow.service").read_text()
        start = next(line for line in unit.splitlines() if line.startswith("ExecStart=")).split()
        arguments = [word for word in start[2:] if word != "$RINGFENCE_FLAGS"]
        return Sidecar(
            self.machine, self.consul, self.binary, f"{self.version}-{self.executor}-{host}", admin, token, arguments
        )

    def _socket(self, host: str) -> Path:
        return self.folder / host / "airflow.sock"

    def _is_web_up(self) -> bool:
        self.assert_running()
        return ask(f"{APP}/api/v2/version" if self.release == "3" else f"{APP}/health", timeout=3).status == 200

    def _is_worker_ready(self) -> bool | str:
        """By its own word: when it cannot start, its process lives on for the server of task logs, and no task ever runs."""
        self.assert_running()
        worker = self.components["worker"]
        said = worker.log.read_text(errors="replace")
        return bool(re.search(r"\bcelery@\S+ ready\.", said)) or f"{worker.log}:\n{worker.tail()}"

    def _headers(self) -> dict[str, str]:
        if self.release == "3":
            return {"Authorization": f"Bearer {ask(f'{APP}/auth/token').json()['access_token']}"}
        return {"Authorization": "Basic " + base64.b64encode(f"e2e:{self.password}".encode()).decode()}

    def _add_connection(self) -> None:
        self.rest(
            "POST",
            "/connections",
            {
                "connection_id": "warehouse",
                "conn_type": "postgres",
                "host": "warehouse.virtual.consul",
                "schema": "warehouse",
                "login": "etl",
                "password": self.postgres.passwords["etl"],
                "port": 5432,
            },
        )

    def _knows_dags(self) -> bool | str:
        self.assert_running()
        known = {row[0] for row in self.postgres.query("select dag_id from serialized_dag", "airflow")}
        wanted = {"payroll_daily", "reports", "payroll_steady"}
        return True if known >= wanted else json.dumps(sorted(known))


def _readable(line: str) -> str:
    """A line of Airflow 3 is an object, which its page shows as text with the exceptions below."""
    try:
        said = json.loads(line)
    except ValueError:
        return line
    if not isinstance(said, dict):
        return line
    errors = [f"{one.get('exc_type')}: {one.get('exc_value')}" for one in said.get("error_detail") or []]
    return "\n".join([f"{said.get('level', '')}: {said.get('event', '')}", *errors])


def _replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"`ringfence airflow init` writes {old!r} no more"
    return text.replace(old, new)
