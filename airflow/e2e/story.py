"""What is tried, in order, on each deployment."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from e2e import install, truth, upheaval
from e2e.airflow import APP_PORT, Deployment
from e2e.consul import Consul
from e2e.machine import Failure, Machine, wait
from e2e.report import Report
from e2e.servers import POSTGRES, REDIS, Postgres, Redis
from e2e.sidecars import Sidecar

INFRASTRUCTURE = {"postgres": (POSTGRES, 23001, 19002), "warehouse": (POSTGRES, 23002, 19003), "redis": (REDIS, 23003, 19004)}
# Every task of payroll_daily.
KINDS = ("bash", "bash_psql", "child", "daemon", "deferrable", "external", "mapped", "mapped", "mapped", "taskflow")


@dataclass(frozen=True)
class Plan:
    """Which deployments, and how much of the story."""

    deployments: tuple[tuple[str, str], ...]
    is_ci: bool

    @classmethod
    def of(cls, airflow: str, executor: str, is_ci: bool) -> Plan:
        """From the flags."""
        if is_ci:
            return cls((("3.3", "local"),), True)
        versions = list(install.VERSIONS) if airflow == "both" else [airflow]
        executors = ["local", "celery"] if executor == "both" else [executor]
        return cls(tuple((version, one) for version in versions for one in executors), False)

    def in_words(self) -> str:
        """For the end."""
        names = ", ".join(
            f"Airflow {install.VERSIONS[version]} with {executor.capitalize()}Executor"
            for version, executor in self.deployments
        )
        parts = (
            "two DAGs and the intention"
            if self.is_ci
            else "two DAGs, the intention, rotation of the CA, upgrade and restart of ringfence"
        )
        left_out = "; left out as --ci: CeleryExecutor, Airflow 2.11, rotation, upgrade, restart" if self.is_ci else ""
        return f"{names}: {parts}{left_out}"


def tell(machine: Machine, report: Report, plan: Plan) -> None:
    """All of it."""
    install.servers(report.say)
    binary = install.ringfence(report.say)
    venvs = {version: install.airflow(version, report.say) for version, _ in plan.deployments}
    machine.own_network()
    consul, postgres, redis = Consul(machine), Postgres(machine), Redis(machine)
    report.say("Consul 1.8.7 with ACLs, PostgreSQL and Redis run")
    machine.wall([POSTGRES, REDIS, APP_PORT])
    for service, (port, public, admin) in INFRASTRUCTURE.items():
        consul.register(service, port, public)
        Sidecar(machine, consul, binary, service, admin, consul.token_of(service), ["-sidecar-for", service])
    for version, executor in plan.deployments:
        deployment = Deployment(machine, consul, postgres, redis, binary, venvs[version], version, executor)
        report.deployment = deployment.name
        try:
            _deployment(deployment, report, plan)
        finally:
            deployment.stop_airflow()
        deployment.stop_mesh()
        postgres.fresh()
        redis.fresh()


def _deployment(deployment: Deployment, report: Report, plan: Plan) -> None:
    machine = deployment.machine
    past = machine.tries_past() if machine.is_walled else 0
    report.say(f"Airflow {deployment.name}: `ringfence airflow init -apply`, tokens, sidecars")
    deployment.consul.allow("airflow-payroll", "warehouse")
    deployment.start_mesh()
    report.say(f"Airflow {deployment.name} starts as user {deployment.machine.user.pw_name}, its database through ringfence")
    deployment.start_airflow()
    report.say("Airflow is up; payroll_daily (allowed) and reports (denied) run")
    deployment.trigger("payroll_daily", "first")
    deployment.trigger("reports", "denied")
    _payroll(deployment, report)
    _denied(deployment, report)
    _allowed(deployment, report)
    if not plan.is_ci:
        upheaval.rotation(deployment, report)
        upheaval.upgrade(deployment, report)
        upheaval.restart_kept(deployment, report)
        upheaval.restart(deployment, report)
    # Tasks have ended; so that the log has a line for each connection of the components too, these end.
    deployment.stop_airflow()
    wait("the log is complete", 10, lambda: not _open(deployment), 0.2)
    _attribution(deployment, report)
    if machine.is_walled:
        tried = machine.tries_past() - past
        report.check(
            f"Airflow and its tasks go to PostgreSQL, Redis and the {deployment.web} by ringfence alone, as a firewall sees to",
            tried == 0,
            f"{tried} connections past it were rejected" if tried else "",
        )
    else:
        report.note("whether all of Airflow's connections go through ringfence was not checked: it takes a network of its own")


def _payroll(deployment: Deployment, report: Report) -> None:
    state = deployment.wait_run("payroll_daily", "first")
    tasks = deployment.tasks_of("payroll_daily", "first")
    bad = [task for task in tasks if task.state != "success"]
    fine = state == "success" and tuple(sorted(task.name for task in tasks)) == KINDS
    report.check(
        "the allowed DAG succeeds: TaskFlow, Bash, psql, subprocess, daemon, external Python, 3 mapped, deferrable",
        fine,
        f"{state} {bad}" if not fine else "",
    )
    for task in bad:
        report.say(deployment.task_log("payroll_daily", "first", task.name)[-3000:])
    log = deployment.task_log("payroll_daily", "first", "taskflow")
    if deployment.release == "3":
        report.check(
            "its task log says as whom it speaks", "this task speaks as airflow-payroll" in log, "" if log else "no log"
        )


def _denied(deployment: Deployment, report: Report) -> None:
    state = deployment.wait_run("reports", "denied")
    log = deployment.task_log("reports", "denied", "load")
    parts = ("airflow-reports", "may not call", "warehouse", "task load of dag reports")
    missing = [part for part in parts if part not in log]
    found = re.search(r"\bid[= ]([0-9a-f]{16})", log)
    fine = state == "failed" and not missing and found is not None
    said = next((line.strip()[-300:] for line in log.splitlines() if "may not call" in line), "")
    report.check(
        "the denied DAG fails, with the reason and the denial's id in its task log",
        fine,
        said if fine else f"{state}, missing {missing}\n{log[-3000:]}",
    )
    if found is None:
        return
    words = ["explain", found.group(1), "-admin", f"127.0.0.1:{deployment.tasks.admin}"]
    text = deployment.machine.run("ringfence explain", [deployment.binary, *words])
    fine = all(part in text for part in ("airflow-reports", "warehouse", "reports"))
    report.check("`ringfence explain` answers for that id", fine, text.strip().splitlines()[0] if fine else text)
    words = [
        "explain",
        "-dag",
        "reports",
        "-task",
        "load",
        "-to",
        "warehouse",
        "-socket",
        str(deployment.folder / "tasks/airflow.sock"),
    ]
    try:
        deployment.machine.run("ringfence explain -dag", [deployment.binary, *words])
        report.check(
            "`ringfence explain -dag reports -task load -to warehouse` says that it would be denied", False, "exit code 0"
        )
    except Failure as error:
        fine = "ended with 1:" in str(error)
        report.check(
            "`ringfence explain -dag reports -task load -to warehouse` says that it would be denied",
            fine,
            "" if fine else str(error),
        )


def _allowed(deployment: Deployment, report: Report) -> None:
    before = deployment.tasks.pids()
    deployment.consul.allow("airflow-reports", "warehouse")
    deployment.trigger("reports", "allowed")
    state = deployment.wait_run("reports", "allowed")
    same = before == deployment.tasks.pids()
    report.check(
        "an intention flips it to success, with no restart",
        state == "success" and same,
        deployment.task_log("reports", "allowed", "load")[-2000:]
        if state != "success"
        else ""
        if same
        else f"its processes were {before} and are {deployment.tasks.pids()}",
    )


def _attribution(deployment: Deployment, report: Report) -> None:
    lines = deployment.tasks.connections()
    ours = [line for line in lines if line["direction"] == "outbound"]
    said = truth.statements(deployment.postgres)
    of_warehouse = [line for line in ours if line["upstream"] == "warehouse"]
    wrong = truth.differences(said, of_warehouse, deployment.release == "3")
    tiers = _count(of_warehouse, "tier")
    report.check(
        f"every warehouse connection has its true dag, task, run, try and map index ({len(said)} statements of tasks)",
        bool(said) and not wrong,
        "; ".join(wrong[:5]) or f"tiers {tiers}",
    )
    unknown = [line for line in ours if line["caller"]["tier"] == "unidentified"]
    audits = [line for line in unknown if deployment.release == "2" and _is_audit(line)]
    if audits:
        unknown = [line for line in unknown if line not in audits]
        report.note(
            f"{len(audits)} connections of supervisors to the database were denied as unidentified: Airflow 2 writes its audit "
            "line `cli_task_run` before any listener hears of the task, so it cannot be registered by then; Airflow goes on"
        )
    report.check(
        f"nothing is unidentified among {len(ours)} connections of the host", not unknown, "; ".join(map(_brief, unknown[:5]))
    )
    components = [line for line in ours if "component" in line["caller"]]
    wrong_parts = [line for line in components if line["caller"]["identity"] != line["caller"]["component"]]
    seen = sorted({(line["caller"]["component"], line["upstream"]) for line in components})
    missing = _expected(deployment) - set(seen)
    report.check(
        "components speak under their own identities",
        not wrong_parts and not missing,
        f"missing {sorted(missing)}, wrong {list(map(_brief, wrong_parts[:3]))}"
        if wrong_parts or missing
        else ", ".join(f"{who} -> {to}" for who, to in seen),
    )
    tasks_elsewhere = [line for line in ours if "dag" in line["caller"] and line["upstream"] != "warehouse"]
    known = {"payroll_daily": "airflow-payroll", "payroll_steady": "airflow-payroll", "reports": "airflow-reports"}
    wrong_tasks = [
        line for line in ours if "dag" in line["caller"] and line["caller"]["identity"] != known.get(line["caller"]["dag"])
    ]
    detail = f"{len(tasks_elsewhere)} connections of tasks to other upstreams: {_count(tasks_elsewhere, 'dag')}"
    report.check(
        "each DAG's tasks have the identity of its rule", not wrong_tasks, "; ".join(map(_brief, wrong_tasks[:3])) or detail
    )
    if deployment.release == "2":
        _metadata(deployment, report, tasks_elsewhere)
    api = [line for line in deployment.api.connections() if line["direction"] == "outbound"]
    name = f"airflow-{deployment.web}"
    odd = [line for line in api if line["caller"]["identity"] != name]
    report.check(
        f"the {deployment.web}'s own sidecar knows all {len(api)} connections of its host",
        bool(api) and not odd,
        "; ".join(map(_brief, odd[:3])),
    )
    lost = [
        line
        for line in ours
        if line["reason"] not in ("complete", "caller_denied", "reset_by_app", "reset_by_peer", "drained", "shutdown")
    ]
    report.note(f"how connections of the task host ended: {_reasons(ours)}" + (f"; look at {_brief(lost[0])}" if lost else ""))


def _metadata(deployment: Deployment, report: Report, lines: list[dict[str, Any]]) -> None:
    """All tasks of Airflow 2 talk to the metadata database themselves: the log names these tasks and no others."""
    have = {(who["dag"], who["task"], who["run"], who["map_index"]) for who in (line["caller"] for line in lines)}
    ran = deployment.tasks_that_ran()
    report.check(
        f"{len(lines)} connections of tasks to the metadata database name the {len(ran)} tasks that Airflow ran, and no others",
        bool(ran) and have == ran,
        f"not in the log {sorted(ran - have)}, not in Airflow {sorted(have - ran)}" if have != ran else "",
    )


def _expected(deployment: Deployment) -> set[tuple[str, str]]:
    """Who must have called what."""
    pairs = {("airflow-scheduler", "postgres"), ("airflow-triggerer", "postgres"), ("airflow-dag-processor", "postgres")}
    if deployment.executor == "celery":
        pairs |= {("airflow-scheduler", "redis"), ("airflow-worker", "redis"), ("airflow-worker", "postgres")}
    if deployment.release == "3":
        pairs.add(("airflow-worker" if deployment.executor == "celery" else "airflow-scheduler", "airflow-api-server"))
    return pairs


def _open(deployment: Deployment) -> int:
    """Connections of the host that live still."""
    metrics = deployment.tasks.ask("/metrics").body
    found = re.findall(r"^ringfence_connections_active\{[^}]*\} (\S+)$", metrics, re.M)
    return int(sum(map(float, found)))


def _is_audit(line: dict[str, Any]) -> bool:
    """Whether this is a supervisor of Airflow 2 that has not said yet which task it runs."""
    is_supervisor = line["caller"].get("command", "").startswith("airflow task supervisor: ")
    return is_supervisor and line["upstream"] == "postgres" and line["reason"] == "caller_denied"


def _count(lines: list[dict[str, Any]], key: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for line in lines:
        name = str(line["caller"].get(key))
        counts[name] = counts.get(name, 0) + 1
    return counts


def _reasons(lines: list[dict[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for line in lines:
        counts[line["reason"]] = counts.get(line["reason"], 0) + 1
    return counts


def _brief(line: dict[str, Any]) -> str:
    return f"{line['upstream']} from {line['downstream']}: {line['reason']} {line['detail'] or ''} {line['caller']}"
