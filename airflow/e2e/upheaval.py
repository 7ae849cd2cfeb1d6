"""Rotation of the CA, upgrade and restart of ringfence, each while `payroll_steady` runs: a query every 0.2 s over one
connection, and over a new one each time.
"""

from __future__ import annotations

import os
import signal
import time
from itertools import pairwise

from e2e.airflow import Deployment
from e2e.machine import Failure, wait
from e2e.report import Report

DAG = "payroll_steady"
# Consul's agent spreads new leaf certificates over half a minute after a rotation.
ROTATION_SECONDS = 60
# TimeoutStopSec= of the unit that `ringfence airflow init` writes.
STOP_SECONDS = 45
UPGRADE_SECONDS = 60
AT_ONCE_SECONDS = 0.1
AFTERWARDS_SECONDS = 4
# A task whose scheduler died is noticed by its missing heartbeat.
RECOVERY_SECONDS = 240


def rotation(deployment: Deployment, report: Report) -> None:
    """A new root: every leaf is signed anew, and established connections go on."""
    _begin(deployment, "rotation")
    sidecar, identity = deployment.tasks, "airflow-payroll"
    before = sidecar.serial_of(identity)
    deployment.consul.rotate_ca()
    took = wait(
        f"{identity} has a certificate of the new root", ROTATION_SECONDS, lambda: sidecar.serial_of(identity) != before
    )
    _end(deployment, "rotation")
    _no_task_failed(deployment, report, "rotation", f"the CA rotates (new leaf after {took:.0f} s)")


def upgrade(deployment: Deployment, report: Report) -> None:
    """SIGUSR2: a new process takes the listening sockets over, the old one finishes what it has begun."""
    if "SIGUSR2" not in deployment.machine.run("ringfence connect -help", [deployment.binary, "connect", "-help"]):
        report.note("this ringfence knows no upgrade by SIGUSR2: not tried")
        return
    _begin(deployment, "upgrade")
    sidecar = deployment.tasks
    old = set(sidecar.pids())
    for pid in old:
        os.kill(pid, signal.SIGUSR2)
    took = wait("a new process serves", UPGRADE_SECONDS, lambda: sidecar.said("this one finishes what it has begun") > 0)
    fresh = set(sidecar.pids()) - old
    report.check(
        "upgrade by SIGUSR2: another process serves while the old one finishes", len(fresh) == 1, f"after {took:.1f} s"
    )
    _end(deployment, "upgrade")
    _no_task_failed(deployment, report, "upgrade", "ringfence is upgraded by SIGUSR2")


def restart(deployment: Deployment, report: Report) -> None:
    """`systemctl restart`: SIGTERM, and a new process when the old one has ended; with a short drain time, and the unit's."""
    for run, flags in (("restart-short", ["-drain-time", "1s"]), ("restart", [])):
        _restart(deployment, report, run, flags)


def restart_kept(deployment: Deployment, report: Report) -> None:
    """`systemctl restart` of a unit whose sockets systemd keeps: new connections wait, and no task that makes them fails."""
    sidecar, run = deployment.tasks, "restart-kept"
    # No task runs now.
    sidecar.stop(AT_ONCE_SECONDS)
    sidecar.start_kept()
    sidecar.wait_ready()
    time.sleep(AFTERWARDS_SECONDS)
    deployment.revive()
    deployment.take_revived()
    _begin(deployment, run)
    took = sidecar.tell_manager(signal.SIGHUP)
    _end(deployment, run)
    try:
        state = deployment.wait_run(DAG, run, RECOVERY_SECONDS, revive=True)
    except Failure as failure:
        state = str(failure)
    tries = {task.name: task.try_number for task in deployment.tasks_of(DAG, run)}
    died = [f"{role} ended and was started again" for role in deployment.take_revived()]
    pause = _longest_pause(deployment, run)
    name = "restart of a unit whose sockets are kept"
    report.check(f"{name}: the run succeeds", state == "success", f"{state} {tries}" if state != "success" else "")
    report.check(
        f"{name}: no try of the task with new connections fails, and none is refused",
        tries.get("new_connections") == 1,
        f"{tries} {'; '.join(died)}; longest pause {pause:.1f} s, another process was ready after {took:.1f} s",
    )
    held = tries.get("one_connection", 0)
    report.note(
        f"{name}: the task that holds one connection through it needed try {held}; new connections paused {pause:.1f} s at most"
    )
    # As it was before, for what comes next.
    sidecar.stop_manager()
    sidecar.start()
    sidecar.wait_ready()
    time.sleep(AFTERWARDS_SECONDS)
    deployment.revive()
    deployment.take_revived()


def _restart(deployment: Deployment, report: Report, run: str, flags: list[str]) -> None:
    sidecar = deployment.tasks
    if flags:
        # The process that is to be restarted must have them; no task runs now.
        sidecar.stop(AT_ONCE_SECONDS)
        sidecar.start(flags)
        sidecar.wait_ready()
        time.sleep(AFTERWARDS_SECONDS)
        deployment.revive()
        deployment.take_revived()
    _begin(deployment, run)
    down = time.monotonic()
    stopped = sidecar.stop(STOP_SECONDS)
    sidecar.start()
    sidecar.wait_ready()
    gap = time.monotonic() - down
    _end(deployment, run)
    try:
        state = deployment.wait_run(DAG, run, RECOVERY_SECONDS, revive=True)
    except Failure as failure:
        state = str(failure)
    tasks = deployment.tasks_of(DAG, run)
    name = f"restart by SIGTERM and a new process ({' '.join(flags) or 'drain time as in the unit'})"
    report.check(f"{name}: the run succeeds in the end", state == "success", f"{state} {tasks}" if state != "success" else "")
    retried = [f"{task.name} needed try {task.try_number}" for task in tasks if task.try_number > 1]
    died = [f"{role} ended and was started again, as Restart= of its unit does" for role in deployment.take_revived()]
    report.note(
        f"{name}: the old process ended after {stopped:.1f} s and the new one was ready after {gap:.1f} s; meanwhile "
        f"new connections are refused, and established ones end with it. {'; '.join(retried + died) or 'No task noticed'}; "
        f"longest pause of new connections {_longest_pause(deployment, run):.1f} s"
    )


def _begin(deployment: Deployment, run: str) -> None:
    deployment.trigger(DAG, run)
    said = f"select count(distinct task) = 2 and count(*) > 8 from truth where run = '{run}'"

    def goes() -> bool:
        deployment.revive()
        return deployment.postgres.query(said, "warehouse") == [["t"]]

    wait(f"the run {run} goes", 60, goes, 0.3)


def _end(deployment: Deployment, run: str) -> None:
    time.sleep(AFTERWARDS_SECONDS)
    deployment.postgres.query(f"insert into stop values ('{run}')", "warehouse")


def _no_task_failed(deployment: Deployment, report: Report, run: str, what: str) -> None:
    state = deployment.wait_run(DAG, run, 200)
    tasks = deployment.tasks_of(DAG, run)
    first = state == "success" and all(task.try_number == 1 for task in tasks)
    count = deployment.postgres.query(f"select count(*) from truth where run = '{run}'", "warehouse")[0][0]
    detail = f"{count} connections, longest pause {_longest_pause(deployment, run):.1f} s" if first else f"{state} {tasks}"
    report.check(f"{what}: no task fails, not even its first try", first, detail)
    if not first:
        report.say("\n".join(deployment.task_log(DAG, run, task.name)[-2500:] for task in tasks))


def _longest_pause(deployment: Deployment, run: str) -> float:
    sql = f"select extract(epoch from at) from truth where run = '{run}' and how = 'new connections' order by at"
    times = [float(row[0]) for row in deployment.postgres.query(sql, "warehouse")]
    return max((after - before for before, after in pairwise(times)), default=0.0)
