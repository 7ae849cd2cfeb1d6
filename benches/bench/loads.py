"""The load programs. Each goes through one port, to the end, and gives one dictionary:

    count     units of work carried              seconds   how long that took
    latency   p50 p90 p99 p999 in us and a curve [[percentile, us], ...], or None where the program cannot say
    failures  how many operations failed         detail    which

A program that carries nothing, or whose output cannot be read, raises `Failure` with what it said.
"""

import json
import re
import statistics
import subprocess

from .base import Failure
from .world import bench_load, payload_key

PERCENTILES = {"p50": 50, "p90": 90, "p99": 99, "p999": 99.9}
CURVE_POINTS = (0, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 99.95, 99.99)
# bench-load may need this much beyond its time: to connect, to drain and to check.
PATIENCE_S = 60


def result(count, seconds, latency=None, failures=0, detail="", **more):
    return {"count": count, "seconds": seconds, "latency": latency, "failures": failures, "detail": detail, **more}


def redis(programs, port, count, connections, size, *more):
    """redis-benchmark, closed loop. It gives percentiles in halving steps; those between are drawn straight."""
    clients = min(connections, count)
    command = ["redis-benchmark", "-h", "127.0.0.1", "-p", port, "-c", clients, "-n", count, "-P", 1, "--precision", 3, *more, "GET", payload_key(size)]
    text = programs.run("redis-benchmark", command).replace("\r", "\n")
    rate = re.search(r"throughput summary: ([0-9.]+) requests per second", text)
    rows = re.findall(r"^([0-9.]+)% <= ([0-9.]+) milliseconds \(cumulative count", text, re.MULTILINE)
    if re.search(r"\berr", text, re.IGNORECASE) or not rate or float(rate[1]) <= 0 or not rows:
        raise Failure(f"redis-benchmark through port {port} carried nothing: {text[-600:].strip() or 'no output'}")
    points = [(float(percent), float(ms) * 1000) for percent, ms in rows]
    return result(count, count / float(rate[1]), percentiles(points))


def percentiles(points):
    """Out of rising (percentile, us) points, those that the report names."""
    named = {name: between(points, wanted) for name, wanted in PERCENTILES.items()}
    return named | {"curve": [[wanted, between(points, wanted)] for wanted in CURVE_POINTS]}


def between(points, wanted):
    below = points[0]
    for above in points:
        if above[0] >= wanted:
            if above[0] == below[0]:
                return above[1]
            return below[1] + (above[1] - below[1]) * (wanted - below[0]) / (above[0] - below[0])
        below = above
    return points[-1][1]


def of_samples(samples):
    """The same out of every single latency."""
    ordered = sorted(samples)
    at = lambda wanted: ordered[min(len(ordered) - 1, int(len(ordered) * wanted / 100))]
    return {name: at(wanted) for name, wanted in PERCENTILES.items()} | {"curve": [[wanted, at(wanted)] for wanted in CURVE_POINTS]}


def iperf(programs, port, seconds, streams, reverse):
    """iperf3; the unit is a GB received."""
    command = ["iperf3", "--client", "127.0.0.1", "--port", port, "--time", max(1, round(seconds)), "--parallel", streams, "--json", *(["--reverse"] if reverse else [])]
    text = programs.run("iperf3 client", command, accept=(0, 1))
    try:
        report = json.loads(text)
        if report.get("error"):
            raise Failure(f"iperf3 through port {port}: {report['error']}")
        carried = report["end"]["sum_received"]
        count, seconds = carried["bytes"] / 1e9, carried["seconds"]
    except (ValueError, KeyError) as error:
        raise Failure(f"iperf3 through port {port} gave no result ({error!r}): {text[-600:].strip()}") from None
    if count <= 0 or seconds <= 0:
        raise Failure(f"iperf3 through port {port} carried nothing")
    return result(count, seconds)


WRK_SCRIPT = """
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("BENCH %d %d %d %d", summary.requests, summary.duration, e.connect + e.read + e.write + e.timeout, e.status))
  for _, p in ipairs({POINTS}) do io.write(string.format(" %g:%d", p, latency:percentile(p))) end
  io.write("\\n")
end
"""


def wrk(programs, port, seconds, connections):
    """wrk, keep-alive, closed loop."""
    script = programs.folder / "wrk.lua"
    script.write_text(WRK_SCRIPT.replace("POINTS", ", ".join(str(point) for point in CURVE_POINTS if point)))
    command = ["wrk", "--threads", 1, "--connections", connections, "--duration", f"{max(1, round(seconds))}s", "--script", script, f"http://127.0.0.1:{port}/"]
    text = programs.run("wrk", command)
    line = re.search(r"^BENCH (.*)$", text, re.MULTILINE)
    if not line:
        raise Failure(f"wrk through port {port} gave no result: {text[-600:].strip()}")
    requests, micros, errors, statuses, *points = line[1].split()
    if int(requests) <= 0:
        raise Failure(f"wrk through port {port} carried nothing: {errors} errors")
    pairs = [tuple(map(float, point.split(":"))) for point in points]
    failures = int(errors) + int(statuses)
    return result(int(requests), int(micros) / 1e6, percentiles(pairs), failures, f"{errors} of the socket, {statuses} of HTTP" if failures else "")


def pgbench(programs, port, seconds, clients, reconnect):
    """pgbench, select only; every transaction's latency is logged. With -C each is a connection of its own."""
    for old in programs.folder.glob("pgbench_log.*"):
        old.unlink()
    command = ["pgbench", "-h", "127.0.0.1", "-p", port, "-U", "bench", "-n", "-S", "-c", clients, "-j", 1, "-T", max(1, round(seconds)), "--log", *(["-C"] if reconnect else []), "postgres"]
    text = programs.run("pgbench", command, more={"PGSSLMODE": "disable", "PGGSSENCMODE": "disable"})
    done = re.search(r"number of transactions actually processed: (\d+)", text)
    failed = re.search(r"number of failed transactions: (\d+)", text)
    tps = re.search(r"tps = ([0-9.]+)", text)
    samples = [int(line.split()[2]) for file in programs.folder.glob("pgbench_log.*") for line in file.read_text().splitlines()]
    if not done or not tps or int(done[1]) <= 0 or not samples:
        raise Failure(f"pgbench through port {port} carried nothing: {text[-600:].strip()}")
    failures = int(failed[1]) if failed else 0
    connect = re.search(r"average connection time = ([0-9.]+) ms", text)
    more = {"connect_mean_us": float(connect[1]) * 1000} if connect else {}
    return result(int(done[1]), int(done[1]) / float(tps[1]), of_samples(samples), failures, f"{failures} transactions" if failures else "", **more)


def shape(programs, name, ports, seconds, *words, unit="messages", tag=""):
    """bench-load, one shape. The unit is what `unit` names in its report."""
    return finish(name, start_shape(programs, name, ports, seconds, *words, tag=tag), programs, seconds, unit)


def start_shape(programs, name, ports, seconds, *words, tag="", **more):
    """Starts it and returns (program, its file), for loads that run side by side."""
    file = programs.folder / f"bench-load{tag}.json"
    file.unlink(missing_ok=True)
    to = ",".join(f"127.0.0.1:{port}" for port in ports)
    command = [bench_load(), "run", name, "--to", to, "--json", file, *words]
    if seconds:
        command += ["--seconds", max(1, round(seconds))]
    return programs.start(f"bench-load {name}{tag}", command, **more), file


def finish(name, started, programs, seconds, unit):
    program, file = started
    try:
        program.process.wait((seconds or 0) + PATIENCE_S)
    except subprocess.TimeoutExpired:
        programs.stop(program)
        raise Failure(f"bench-load {name} was not done {PATIENCE_S} s after its time; what it goes through stands still") from None
    programs.running.remove(program)
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise Failure(f"bench-load {name} ended with {program.process.returncode} and left no report ({error}):\n  {program.last_words()}") from None
    failures = {key: value for key, value in report["failures"].items() if value}
    count, took = report[unit] if isinstance(unit, str) else unit(report), report["seconds"]
    if count <= 0 or took <= 0:
        raise Failure(f"bench-load {name} carried nothing; failures {failures or 'none'}:\n  {program.last_words()}")
    # To the first byte of the answer: the connect itself ends at the sidecar of the client's own host.
    connect = report.get("first_answer_us") if unit == "connections_opened" else None
    detail = ", ".join(f"{value} {key}" for key, value in failures.items())
    return result(count, took, trimmed(report.get("latency_us")), sum(failures.values()), detail, connect=trimmed(connect), report=without_curves(report))


def trimmed(latency):
    """bench-load's latencies in the form of all others."""
    if not latency or not latency.get("count"):
        return None
    curve = [[float(percent), us] for percent, us in latency.get("curve", [])]
    return {name: latency[name] for name in PERCENTILES} | {"curve": curve}


def without_curves(report):
    return {key: value for key, value in report.items() if key not in ("latency_us", "connect_us", "first_answer_us")}


def median_latency(latencies):
    """The median of several runs, percentile by percentile; the curve where they have the same points."""
    known = [latency for latency in latencies if latency]
    if not known:
        return None
    named = {name: statistics.median(latency[name] for latency in known) for name in PERCENTILES}
    grids = [[point for point, _ in latency["curve"]] for latency in known]
    same = all(grid == grids[0] for grid in grids)
    curve = [[point, statistics.median(latency["curve"][at][1] for latency in known)] for at, point in enumerate(grids[0])] if same else known[0]["curve"]
    return named | {"curve": curve}
