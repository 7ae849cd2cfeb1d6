"""What is measured. A row is one kind of work in one size; `run` does it once through a pair and gives the figures of it.

All rows of a pair go through the same two processes, except where fresh ones are the point (`idle`), or resumption off
(`connect`), fifty identities or a rotating agent make other processes necessary. Whoever cannot do a row raises
`NotApplicable`; what goes wrong raises `Failure`; single operations that fail are counted and reported.
"""

import dataclasses
import subprocess
import threading
import time

from . import account, loads
from .base import Failure
from .peers import PEERS, NotApplicable
from .world import IDENTITIES

# After the load has gone: time for the proxies to end its connections, so that this work is counted too.
SETTLE_S = 0.3
CONNECTIONS = 50
PG_CLIENTS = 10
PACED_PER_S = 4_000
FAIRNESS_PER_S = 2_000
FAIRNESS_SMALL = 50
FAIRNESS_P99_MOST = 3
ROTATION_PER_S = 2_000
ROTATION_CONNECTS_PER_S = 50
ROTATION_EVERY_S = 1
SLOW_BYTES_PER_S = 100_000
SLOW_NEIGHBOURS = 50
SLOW_NEIGHBOURS_PER_S = 1_000
EXEC_PER_S = 60
HAUL_CONNECTIONS = 2_000
SQL_PER_S = 200
STORM_TASKS = 300
HOLD_READY_S = 60
# A sidecar has two files for each connection and some of its own. Where the machine allows fewer, a few connections less are
# held, and the report says how many; below this part of what was asked the row is an error.
FILES_SPARE = 400
HOLD_LEAST = 0.95
# A process is looked at when it has been left alone this long.
IDLE_REST_S = 1.0
WARMUP_S = 0.4
SYSCALL_RUN_S = 0.5


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the benchmark."""

    key: str
    workload: str
    title: str
    run: object
    unit: str = "request"
    scale: float = 1e6  # CPU seconds to the printed unit
    cpu_unit: str = "us"
    kind: str = "main"
    service: str = "load"
    main: bool = False  # gets the full number of runs
    runs_others: int = 0  # where a run is long and scatters little: rounds of all but ringfence and Envoy
    quick: bool = False
    seconds: float = 1.5
    quick_seconds: float = 2.0
    extra_s: float = 0.0  # what a run takes beyond its seconds
    syscalls: bool = True
    yardsticks: bool = True
    quick_yardsticks: bool = False
    paced: bool = False  # its rate is given: who carries it at all has the same throughput
    note: str = ""


def measured(pair, row, load):
    """Figures of one load: what it says, and what the kernel says of the sidecars meanwhile."""
    time.sleep(SETTLE_S)
    pids = pair.pids()
    before = account.usage(pids)
    figures = load()
    time.sleep(SETTLE_S)
    if pids and sorted(pair.pids()) != sorted(pids):
        raise Failure(f"the processes of the {pair.peer} pair changed during {row.key}; its CPU cannot be told")
    used = account.usage(pids).since(before)
    if pids:
        figures["cpu_s"] = used.cpu_s(len(pids))
        figures["user_s"], figures["system_s"], figures["switches"] = used.user_s, used.system_s, used.switches
    return figures


def plain(make):
    """A row whose work is one load. `make(session, pair, row, seconds)` does it; it is warmed up, and counted once by perf."""

    def run(session, row, pair, seconds):
        state = session.state(row, pair)
        if "warm" not in state:
            state["warm"] = make(session, pair, row, WARMUP_S, state)
            state["rate"] = state["warm"]["count"] / state["warm"]["seconds"]
        figures = measured(pair, row, lambda: make(session, pair, row, seconds, state))
        if row.syscalls and pair.sidecars and "syscalls" not in state and session.count_syscalls:
            with account.SyscallCount(session.programs, pair.pids()) as counter:
                short = make(session, pair, row, min(SYSCALL_RUN_S, seconds), state)
            state["syscalls"] = counter.count / short["count"]
        if "syscalls" in state:
            figures["syscalls"] = state["syscalls"]
        return figures

    return run


def redis(connections, size, *words):
    def make(session, pair, row, seconds, state):
        # As many requests as take this long, at the rate of the warm-up.
        count = int(state["rate"] * seconds) if "rate" in state else connections * (20 if "-k" in words else 40)
        return loads.redis(session.programs, pair.port("cache"), max(count, connections, 100), connections, size, *words)

    return plain(make)


def iperf(streams, reverse):
    return plain(lambda session, pair, row, seconds, state: loads.iperf(session.programs, pair.port("sink"), seconds, streams, reverse))


def http(session, pair, row, seconds, state):
    return loads.wrk(session.programs, pair.port("web"), seconds, CONNECTIONS)


def pgbench(reconnect):
    return plain(lambda session, pair, row, seconds, state: loads.pgbench(session.programs, pair.port("db"), seconds, PG_CLIENTS, reconnect))


def shape(name, *words, unit="messages"):
    """A row of one bench-load shape through `load`."""
    return plain(lambda session, pair, row, seconds, state: loads.shape(session.programs, name, [pair.port("load")], seconds, *words, unit=unit))


def gigabytes(report):
    return (report["bytes_sent"] + report["bytes_received"]) / 1e9


def sql_small(session, pair, row, seconds, state):
    ports = [port for (_client, name), port in sorted(pair.dial.items()) if name == "load"]
    words = ["--rate", SQL_PER_S, "--connections", CONNECTIONS]
    return loads.shape(session.programs, "sql-small", ports, seconds, *words, unit="connections_opened")


def storm(session, pair, row, seconds, state):
    """300 tasks in 2 s. One in ten goes to a service that an intention denies, where the peer has intentions."""
    words = ["--connections", STORM_TASKS]
    if ("client", "denied") in pair.dial and pair.peer != "direct":
        words += ["--denied", f"127.0.0.1:{pair.port('denied')}"]
    figures = loads.shape(session.programs, "storm", [pair.port("load")], seconds, *words, unit=lambda report: report["connections_opened"] + report["denied_ok"])
    figures["denied"] = figures["report"].get("denied_ok")
    return figures


# --- rows that are more than one load -----------------------------------------------------------------------------------------


def idle(connections):
    """Memory of held connections, in processes started for this; afterwards every connection must still answer."""

    def run(session, row, _pair, seconds):
        fit = (session.files - FILES_SPARE) // 2
        if fit < connections * HOLD_LEAST:
            raise Failure(f"{session.files} open files are allowed, {connections} connections need {connections * 2 + FILES_SPARE}; raise `ulimit -n`")
        return hold(session, row, min(connections, fit), seconds)

    return run


def hold(session, row, connections, seconds):
    pair = session.fresh(session.current, row)
    try:
        pids = pair.pids("load")
        time.sleep(IDLE_REST_S)
        sidecars = max(1, len([sidecar for sidecar in pair.sidecars if sidecar.services in (None, ("load",))]))
        before, room = account.memory(pids), account.available()
        words = ["--connections", connections]
        started = loads.start_shape(session.programs, "hold", [pair.port("load")], 0, *words, stdin=subprocess.PIPE)
        program, _ = started
        wait_for_ready(program)
        time.sleep(IDLE_REST_S)
        during, less = account.memory(pids), account.available()
        program.process.stdin.write(b"\n")
        program.process.stdin.close()
        figures = loads.finish("hold", started, session.programs, seconds, lambda report: max(report["connections_opened"], 1))
        opened = figures["report"]["connections_opened"]
        if opened < connections:
            figures["failures"] += connections - opened
            figures["detail"] += f" {connections - opened} of {connections} never opened"
        per = {name: (during[name] - before[name]) / sidecars / connections for name in before}
        figures |= {"process_bytes": before["resident"] / sidecars, "process_anonymous": before["anonymous"] / sidecars}
        figures |= {"connection_bytes": per["resident"], "connection_anonymous": per["anonymous"], "machine_bytes": (room - less) / connections, "connections": connections}
        if not pids:
            figures = {key: value for key, value in figures.items() if not key.startswith(("process_", "connection_"))}
        figures["latency"] = None
        return figures
    finally:
        session.programs.stop(*pair.all_programs())


def wait_for_ready(program):
    """bench-load says `ready` when all connections are open."""
    deadline = time.monotonic() + HOLD_READY_S
    while time.monotonic() < deadline:
        if "ready" in program.log.read_text(errors="replace"):
            return
        program.check_alive()
        time.sleep(0.05)
    raise Failure(f"{program.name} was not ready after {HOLD_READY_S} s; last words:\n  {program.last_words()}")


def slow_reader(session, row, pair, seconds):
    """A reader slower than its server: what the proxies hold for it must have a bound, and neighbours must not notice."""
    words = ["--connections", SLOW_NEIGHBOURS, "--rate", SLOW_NEIGHBOURS_PER_S]
    port, pids = [pair.port("load")], pair.pids("load")
    alone = loads.shape(session.programs, "request", port, seconds, *words)
    with account.MemoryWatch(pids) as watch:
        figures = measured(pair, row, lambda: loads.shape(session.programs, "slow-reader", port, seconds, *words, "--slow-bytes-per-s", SLOW_BYTES_PER_S))
    if pids:
        figures["growth_bytes"] = watch.most - watch.before
    return beside(figures, alone)


def beside(figures, alone):
    """Figures of connections beside others, and their p99 over that of the same ones alone."""
    figures["alone_p99"] = alone["latency"]["p99"]
    figures["p99_times"] = figures["latency"]["p99"] / alone["latency"]["p99"]
    figures["failures"] += alone["failures"]
    figures["detail"] += f" alone: {alone['detail']}" if alone["detail"] else ""
    return figures


def fairness(session, row, pair, seconds):
    """p99 of 50 small ones beside one bulk stream, over its value alone."""
    words = ["--connections", FAIRNESS_SMALL, "--rate", FAIRNESS_PER_S]
    port = [pair.port("load")]
    alone = loads.shape(session.programs, "fairness", port, seconds, *words, "--bulk", 0)
    figures = measured(pair, row, lambda: loads.shape(session.programs, "fairness", port, seconds, *words, "--bulk", 1))
    return beside(figures, alone)


def rotation(session, row, pair, seconds):
    """Kept and new connections for as long without a rotation and with one each second. The order changes by round."""
    state = session.state(row, pair)
    rotations = PEERS[pair.peer].rotations
    if not pair.rotate or not rotations:
        raise NotApplicable("its certificates cannot be replaced while it runs")
    state["round"] = state.get("round", 0) + 1
    parts = {}
    seen = 0
    for turning in (False, True) if state["round"] % 2 else (True, False):
        before = rotations(pair)
        parts[turning] = measured(pair, row, lambda turning=turning: rotated_load(session, pair, seconds, turning))
        if turning:
            seen = rotations(pair) - before
            if not seen:
                raise Failure(f"{parts[True]['turned']} rotations were asked for, and the {pair.peer} pair took none")
    figures = parts[True]
    figures["still_p99"], figures["rotations_seen"] = parts[False]["latency"]["p99"], seen
    figures["p99_times"] = figures["latency"]["p99"] / parts[False]["latency"]["p99"]
    figures["failures_still"] = parts[False]["failures"]
    return figures


def rotated_load(session, pair, seconds, turning):
    port = [pair.port("load")]
    ended, turned, errors = threading.Event(), [], []

    def turn():
        while not ended.wait(ROTATION_EVERY_S):
            try:
                pair.rotate()
                turned.append(time.monotonic())
            except OSError as error:
                errors.append(error)
                return

    thread = threading.Thread(target=turn, daemon=True)
    kept = loads.start_shape(session.programs, "request", port, seconds, "--connections", CONNECTIONS, "--rate", ROTATION_PER_S, tag="-kept")
    new = loads.start_shape(session.programs, "connect", port, seconds, "--rate", ROTATION_CONNECTS_PER_S, tag="-new")
    if turning:
        thread.start()
    try:
        figures = loads.finish("request", kept, session.programs, seconds, "messages")
        opened = loads.finish("connect", new, session.programs, seconds, "connections_opened")
    finally:
        ended.set()
        if turning:
            thread.join()
    if errors:
        raise Failure(f"the certificates of the {pair.peer} pair could not be rotated: {errors[0]}")
    figures["failures"] += opened["failures"]
    figures["detail"] = "; ".join(part for part in (figures["detail"] and f"kept: {figures['detail']}", opened["detail"] and f"new: {opened['detail']}") if part)
    figures["opened"], figures["turned"], figures["connect"] = opened["count"], len(turned), opened["connect"] or opened["latency"]
    return figures


# --- the list -----------------------------------------------------------------------------------------------------------------


def request_row(connections, size, **more):
    label = f"{size} B" if size < 1_024 else f"{size // 1024} KiB"
    plural = "connection" if connections == 1 else "connections"
    return Row(f"request-{connections}x{size}", "request", f"request/response, {label}, {connections} {plural}", redis(connections, size), service="cache", **more)


def bulk_row(streams, reverse, **more):
    title = f"bulk, {'one stream' if streams == 1 else f'{streams} streams'}, {'server' if reverse else 'client'} sends"
    key = f"bulk-{streams}-{'down' if reverse else 'up'}"
    return Row(key, "bulk", title, iperf(streams, reverse), "GB", 1, "s", service="sink", **more)


NEW = {"unit": "connection", "service": "cache", "main": True, "quick": True, "seconds": 2.5, "quick_seconds": 2.0}

ROWS = (
    request_row(50, 100, main=True, quick=True, seconds=3, quick_seconds=2.5, quick_yardsticks=True),
    request_row(1, 100),
    request_row(512, 100),
    request_row(1, 4_096),
    request_row(50, 4_096),
    request_row(512, 4_096),
    Row("request-paced", "request", f"request/response, 100 B, {CONNECTIONS} connections, {PACED_PER_S} a second", shape("request", "--connections", CONNECTIONS, "--rate", PACED_PER_S, "--request-bytes", 100, "--response-bytes", 100), seconds=3, paced=True, note="open loop: a late answer counts from when its request was due"),
    bulk_row(1, False, main=True, quick=True, seconds=3, quick_seconds=2),
    bulk_row(1, True, main=True, quick=True, seconds=3, quick_seconds=2),
    bulk_row(8, False, seconds=1),
    bulk_row(8, True, seconds=1),
    Row("connect", "connect", "new connections, full handshakes", redis(CONNECTIONS, 100, "-k", 0), kind="full", **NEW),
    Row("connect-resumed", "connect-resumed", "new connections, resumption on", redis(CONNECTIONS, 100, "-k", 0), **NEW),
    Row("http", "http", f"HTTP/1.1 keep-alive, 1 KiB answers, {CONNECTIONS} connections", plain(http), service="web", seconds=1),
    Row("pgbench", "pgbench", f"pgbench -S, {PG_CLIENTS} clients", pgbench(False), "transaction", service="db"),
    Row("pgbench-C", "pgbench", f"pgbench -S -C, {PG_CLIENTS} clients, a connection each transaction", pgbench(True), "transaction", service="db"),
    Row("idle-1000", "idle", "1,000 held connections", idle(1_000), "connection", kind="idle", quick=True, seconds=0, quick_seconds=0, extra_s=4, runs_others=2, syscalls=False, paced=True),
    Row("idle-10000", "idle", "10,000 held connections", idle(10_000), "connection", kind="idle", seconds=0, extra_s=13, runs_others=1, syscalls=False, paced=True),
    Row("slow-reader", "slow-reader", f"one reader of {SLOW_BYTES_PER_S // 1000} kB/s of 64 MB beside {SLOW_NEIGHBOURS} small connections", slow_reader, "message", seconds=2, extra_s=3, syscalls=False, paced=True),
    Row("fairness", "fairness", f"one bulk stream beside {FAIRNESS_SMALL} small connections", fairness, quick=True, quick_yardsticks=True, seconds=2, quick_seconds=2, extra_s=3, syscalls=False, note=f"p99 may be at most {FAIRNESS_P99_MOST} times its value alone", paced=True),
    Row("rotation", "rotation", "certificates replaced each second under load", rotation, kind="rotation", main=True, quick=True, seconds=6, quick_seconds=4, extra_s=7, syscalls=False, yardsticks=False, note=f"{CONNECTIONS} kept connections with {ROTATION_PER_S} requests a second, {ROTATION_CONNECTS_PER_S} new connections a second", paced=True),
    Row("meta-churn", "meta-churn", "Airflow 2: a task's connections to the metadata database", shape("meta-churn", "--connections", 16, unit="connections_opened"), "connection"),
    Row("exec-api", "exec-api", "Airflow 3: tasks at the execution API", shape("exec-api", "--connections", 32, "--rate", EXEC_PER_S), paced=True),
    Row("sql-small-1", "sql-small", f"{SQL_PER_S} small queries a second, one identity", plain(sql_small), "connection", paced=True),
    Row("sql-small-50", "sql-small", f"{SQL_PER_S} small queries a second, {IDENTITIES} identities", plain(sql_small), "connection", kind="identities", yardsticks=False, paced=True),
    Row("bulk-haul", "bulk-haul", "Airflow: query results down, COPY up", shape("bulk", "--direction", "both", unit=gigabytes), "GB", 1, "s", seconds=2),
    Row("idle-haul", "idle-haul", f"{HAUL_CONNECTIONS} flows that say little", shape("idle-haul", "--connections", HAUL_CONNECTIONS), "message", seconds=3, extra_s=2, syscalls=False, paced=True),
    Row("storm", "storm", f"{STORM_TASKS} tasks in 2 s, one in ten denied", plain(storm), "connection", seconds=2, extra_s=1, syscalls=False, paced=True),
)  # fmt: skip
WORKLOADS = tuple(dict.fromkeys(row.workload for row in ROWS))
