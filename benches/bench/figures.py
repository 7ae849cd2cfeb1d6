"""Medians, spreads and ratios out of single runs, and the targets.

A ratio is taken round by round, round i of a peer over round i of Envoy, so that what slows the machine for a while slows
both; its median and spread are those of these quotients, not quotients of medians. A measure that a row does not have is
None, never 0.
"""

import dataclasses
import statistics

from .loads import PERCENTILES, median_latency
from .peers import OURS, REFERENCE

KIB, MIB = 1_024, 1_048_576


def per_unit(key):
    return lambda run: run[key] / run["count"] if key in run and run["count"] else None


def percentile(name, source="latency"):
    return lambda run: (run.get(source) or {}).get(name)


def share_of_user(run):
    total = run.get("user_s", 0) + run.get("system_s", 0)
    return run["user_s"] / total if total > 0 else None


MEASURES = {
    "cpu": per_unit("cpu_s"),
    "user_share": share_of_user,
    "rate": lambda run: run["count"] / run["seconds"] if run.get("seconds") else None,
    **{name: percentile(name) for name in PERCENTILES},
    **{f"connect_{name}": percentile(name, "connect") for name in PERCENTILES},
    "switches": per_unit("switches"),
    **{
        name: (lambda name: lambda run: run.get(name))(name)
        for name in ("syscalls", "process_bytes", "process_anonymous", "connection_bytes", "connection_anonymous", "machine_bytes", "growth_bytes", "p99_times", "alone_p99", "still_p99")
    },
    "resumed_share": lambda run: run["resumed"] / run["handshakes"] if run.get("handshakes") else None,
}
# Where more is better; everywhere else it is worse.
MORE_IS_BETTER = ("rate",)


def spread(values):
    known = [value for value in values if value is not None]
    return {"median": statistics.median(known), "min": min(known), "max": max(known)} if known else None


def by_round(entry, measure):
    """Round to figure, for one peer of one row."""
    if not entry:
        return {}
    found = {run["round"]: MEASURES[measure](run) for run in entry["runs"]}
    return {number: value for number, value in found.items() if value is not None}


def figure(row, peer, measure):
    return spread(list(by_round(row["peers"].get(peer), measure).values()))


def ratio(row, peer, measure, reference=REFERENCE):
    """The spread of round i over the reference's round i."""
    mine, other = (by_round(row["peers"].get(name), measure) for name in (peer, reference))
    return spread([mine[number] / other[number] for number in sorted(mine) if other.get(number)])


def added(row, peer, measure):
    """What the pair adds to the direct connection, round by round."""
    mine, direct = (by_round(row["peers"].get(name), measure) for name in (peer, "direct"))
    return spread([mine[number] - direct[number] for number in mine if number in direct])


def failures(entry):
    return sum(run.get("failures", 0) for run in entry["runs"])


def curve(row, peer):
    entry = row["peers"].get(peer)
    return median_latency([run.get("latency") for run in entry["runs"]]) if entry else None


def is_worse(measure, value):
    """Whether a ratio of this measure says that Envoy is better."""
    return value < 1 if measure in MORE_IS_BETTER else value > 1


# --- the targets of the design, section 5 -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
    """What must be reached (None: nothing must) and what is aimed for: of Envoy's (`ratio`), or an absolute figure in `scale`."""

    title: str
    row: str
    measure: str
    must: float | None
    aim: float
    ratio: bool = True
    scale: float = 1
    unit: str = "of Envoy's"


TARGETS = (
    Target("request/response, 100 B, 50 connections: CPU a request", "request-50x100", "cpu", 0.45, 0.36),
    Target("bulk, one stream, client sends: CPU a GB", "bulk-1-up", "cpu", 0.62, 0.52),
    Target("bulk, one stream, server sends: CPU a GB", "bulk-1-down", "cpu", 0.62, 0.52),
    Target("new connections, full handshakes: CPU a connection", "connect", "cpu", 0.60, 0.40),
    Target("new connections, resumed: CPU a connection", "connect-resumed", "cpu", 0.80, 0.50),
    Target("1,000 idle connections: user memory of one sidecar, each", "idle-1000", "connection_bytes", 6, 3, False, KIB, "KiB"),
    Target("10,000 idle connections: user memory of one sidecar, each", "idle-10000", "connection_bytes", 6, 3, False, KIB, "KiB"),
    Target("idle process: resident", "idle-1000", "process_bytes", 12, 8, False, MIB, "MiB"),
    Target("one bulk stream beside 50 small connections: p99 over that alone", "fairness", "p99_times", 3, 3, False, 1, "times"),
    Target("rotation each second: p99 over that without", "rotation", "p99_times", None, 1.05, False, 1, "times"),
)  # fmt: skip
# Rows that no failure may touch, whatever their figures.
WITHOUT_FAILURE = (("rotation each second: failed connections and lost bytes", "rotation"),)


def verdicts(results):
    """Each target with what was measured: dictionaries with title, must, aim, figure, envoy, ratio, verdict."""
    rows = {row["key"]: row for row in results["rows"]}
    found = []
    for target in TARGETS:
        row = rows.get(target.row)
        value = row and (ratio if target.ratio else figure)(row, OURS, target.measure)
        line = {"title": target.title, "must": target.must, "aim": target.aim, "unit": target.unit, "figure": None, "ratio": None, "verdict": "not measured"}
        if value:
            line["figure"] = {name: one / target.scale for name, one in value.items()}
            line["ratio"] = ratio(row, OURS, target.measure)
            line["envoy"] = figure(row, REFERENCE, target.measure)
            line["envoy"] = line["envoy"] and line["envoy"]["median"] / target.scale
            reached = line["figure"]["median"]
            line["verdict"] = verdict(target, reached)
            if target.must is not None and reached <= target.must < line["figure"]["max"]:
                line["verdict"] += ", its spread reaches beyond"
        elif row and OURS in row["peers"] and row["peers"][OURS]["status"] == "error":
            line["verdict"] = "ERROR"
        found.append(line)
    for title, key in WITHOUT_FAILURE:
        row = rows.get(key)
        entry = row and row["peers"].get(OURS)
        line = {"title": title, "must": 0, "aim": 0, "unit": "failures", "figure": None, "ratio": None, "verdict": "not measured"}
        if entry and entry["runs"]:
            count = failures(entry)
            line["figure"] = {"median": count, "min": count, "max": count}
            other = row["peers"].get(REFERENCE)
            line["envoy"] = failures(other) if other else None
            line["verdict"] = "LOST" if count else "met"
        elif entry and entry["status"] == "error":
            line["verdict"] = "ERROR"
        found.append(line)
    return found


def verdict(target, reached):
    if target.must is None:
        return "aim reached" if reached <= target.aim else "aim not reached"
    if reached > target.must:
        return "LOST"
    return "aim reached" if reached <= target.aim < target.must else "met"


def problems(results):
    """Everything that makes the exit code 1, in words."""
    found = []
    for row in results["rows"]:
        for peer, entry in row["peers"].items():
            if entry["status"] == "error":
                found.append(f"{row['key']}, {peer}: {entry['reason'].splitlines()[0]}")
            elif peer == OURS and failures(entry):
                found.append(f"{row['key']}, {peer}: {failures(entry)} failed: {details(entry)}")
    return found


def details(entry):
    return "; ".join(dict.fromkeys(run["detail"].strip() for run in entry["runs"] if run.get("detail"))) or "without a word"
