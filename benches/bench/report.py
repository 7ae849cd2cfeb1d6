"""report.md out of results: first the targets, then what was compared, then a table a workload with all peers.

Every figure is a median with its spread, and beside it its ratio to Envoy. What could not run has a row with the reason.
"""

import json
import subprocess

from .base import PLOT_PYTHON, ROOT, Failure
from .figures import (
    KIB, MIB, OURS, REFERENCE, TARGETS, added, curve, details, failures, figure, is_worse, problems, ratio, verdicts,
)  # fmt: skip

# Measures that say who wins, in the table of wins and losses.
JUDGED = {"cpu": "CPU", "rate": "throughput", "p50": "p50", "p99": "p99", "p999": "p99.9", "connection_bytes": "memory a connection", "process_bytes": "idle process", "switches": "voluntary switches", "syscalls": "system calls"}
SVG = {"ratios": "CPU to Envoy's", "latency": "Latency by percentile", "memory": "Memory over connections"}
PLOT_TIMEOUT_S = 60


def number(value):
    if value is None:
        return "-"
    size = abs(value)
    return f"{value:,.0f}" if size >= 1_000 else f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.005 or not size else f"{value:.2g}"


def bound(value):
    """A target of the design; nothing must be reached where it is None."""
    return "-" if value is None else f"{value:g}"


def spread_text(value, scale=1):
    if not value:
        return "-"
    middle, least, most = (number(value[name] * scale) for name in ("median", "min", "max"))
    return middle if least == most else f"{middle} ({least}..{most})"


def ratio_text(value):
    if not value:
        return "-"
    return f"**{value['median']:.2f}** ({value['min']:.2f}..{value['max']:.2f})"


def cell(row, peer, measure, scale=1):
    """A figure and, behind it, its ratio to Envoy."""
    value = figure(row, peer, measure)
    if not value:
        return "-"
    times = ratio(row, peer, measure)
    text = spread_text(value, scale)
    return text if not times or peer == REFERENCE else f"{text}; x{times['median']:.2f}"


def table(head, lines):
    align = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (head, align, *lines)]


def markdown(results):
    machine, options = results["machine"], results["options"]
    versions = results["versions"]
    dirty = " with uncommitted changes" if results["dirty"] else ""
    out = [
        "# ringfence beside Envoy and others",
        "",
        f"Measured {results['time']}, {'quick' if options['quick'] else 'full'} run of {results['minutes']:.1f} minutes, commit {results['commit'] or 'unknown'}{dirty}, on",
        f"{machine['cpus']} x {machine['cpu_model']}, {machine['memory_gib']:.0f} GiB, kernel {machine['kernel']}, TCP {machine['tcp_congestion_control']}; load average at start {machine['load_average']:.2f}.",
        "",
        "Each peer is a pair of sidecars with one worker each, pinned to the first and the last CPU, between the same clients and",
        "servers. Rounds are interleaved A B A B. A figure is the median of its rounds with (least..most); a ratio is taken round by",
        "round over Envoy as Consul configures it (`envoy`). Absolute figures depend on the machine: read the ratios.",
        "",
    ]
    if not results["complete"]:
        out += ["🔴 **The run was interrupted: rows that it did not reach are missing.**", ""]
    broken = problems(results)
    if broken:
        out += ["## What failed", ""] + [f"- 🔴 {escaped(line)}" for line in broken] + [""]
    out += must_reach(results) + won_and_lost(results) + pictures(results) + workload_tables(results) + peers_table(results)
    out += ["## Versions", ""] + [f"- {name}: {text}" for name, text in versions.items()]
    out += ["", f"Options: `{json.dumps(options)}`. Every single run is in results.json; `scripts/bench --compare` reads it.", ""]
    return "\n".join(out)


def must_reach(results):
    lines = []
    for line in verdicts(results):
        mark = {"LOST": "🔴 **LOST**", "ERROR": "🔴 **ERROR**"}.get(line["verdict"], line["verdict"])
        value = spread_text(line["figure"])
        envoy = "1" if line["unit"] == "of Envoy's" else number(line.get("envoy"))
        times = line["ratio"]["median"] if line["ratio"] else None
        lines.append([line["title"], bound(line["must"]), bound(line["aim"]), value, envoy, number(times), line["unit"], mark])
    return ["## Must reach", ""] + table(["work", "must reach", "aim", "ringfence", "Envoy", "ratio to Envoy", "unit", "verdict"], lines) + [""]


def won_and_lost(results):
    won, lost = [], []
    for row in results["rows"]:
        for measure, name in JUDGED.items():
            value = ratio(row, OURS, measure)
            if not value or (measure == "rate" and row["paced"]):
                continue
            beyond = value["min"] > 1 if value["median"] > 1 else value["max"] < 1
            cells = [row["title"], name, ratio_text(value), "one round: unknown" if value["min"] == value["max"] else "yes" if beyond else "within its spread"]
            (lost if is_worse(measure, value["median"]) else won).append((abs(value["median"] - 1), cells))
    out = []
    head = ["work", "measure", "ringfence to Envoy", "beyond its spread"]
    for title, lines in (("Lost to Envoy", lost), ("Won against Envoy", won)):
        lines.sort(key=lambda line: -line[0])
        out += [f"## {title}: {len(lines)} of {len(won) + len(lost)}", ""]
        out += (table(head, [cells for _, cells in lines]) if lines else ["Nothing."]) + [""]
    return out


def pictures(results):
    shown = [f"![{text}]({name}.svg)" for name, text in SVG.items() if plot_data(results)[name]]
    return ["## Pictures", "", *shown, ""] if shown else []


def workload_tables(results):
    out = []
    workload = None
    for row in results["rows"]:
        if row["workload"] != workload:
            workload = row["workload"]
            out += [f"## {workload}", ""]
        out += [f"### {row['title']} (`{row['key']}`)", ""]
        out += [row["note"] + ".", ""] if row["note"] else []
        out += row_table(row) + [""]
    return out


def columns(row):
    """(head, cell of a peer) for each measure that anybody has in this row."""
    unit, scale = row["unit"], row["scale"]
    has = lambda *names: any(figure(row, peer, name) for peer in row["peers"] for name in names)
    found = []
    if has("cpu"):
        found.append((f"CPU, {row['cpu_unit']} a {unit}", lambda peer: spread_text(figure(row, peer, "cpu"), scale)))
        found.append(("CPU to Envoy's", lambda peer: ratio_text(ratio(row, peer, "cpu")) if figure(row, peer, "cpu") else "-"))
        found.append(("of it user", lambda peer: f"{figure(row, peer, 'user_share')['median']:.0%}" if figure(row, peer, "user_share") else "-"))
    if row["workload"] == "idle":
        found.append(("held", lambda peer: ", ".join(dict.fromkeys(f"{run['connections']:,}" for run in row["peers"][peer]["runs"]))))
    if has("process_bytes"):
        found.append(("idle process, MiB", lambda peer: cell(row, peer, "process_bytes", 1 / MIB)))
        found.append(("of it anonymous, MiB", lambda peer: cell(row, peer, "process_anonymous", 1 / MIB)))
    if has("connection_bytes"):
        found.append(("a connection in one sidecar, KiB", lambda peer: cell(row, peer, "connection_bytes", 1 / KIB)))
        found.append(("of it anonymous, KiB", lambda peer: cell(row, peer, "connection_anonymous", 1 / KIB)))
    if has("machine_bytes"):
        found.append(("a connection in the whole machine, kernel and load included, KiB", lambda peer: cell(row, peer, "machine_bytes", 1 / KIB)))
    if has("growth_bytes"):
        found.append(("most memory beyond the start, both sidecars, MiB", lambda peer: cell(row, peer, "growth_bytes", 1 / MIB)))
    if row["workload"] not in ("idle",):
        found.append((f"{unit} a second" if unit == "GB" else f"{unit}s a second", lambda peer: cell(row, peer, "rate")))
    if has("p99_times"):
        name = "without rotation" if row["workload"] == "rotation" else "alone"
        key = "still_p99" if row["workload"] == "rotation" else "alone_p99"
        found.append((f"p99 over that {name}, times", lambda peer: cell(row, peer, "p99_times")))
        found.append((f"p99 {name}, ms", lambda peer: cell(row, peer, key, 1e-3)))
    for source, words in (("", ""), ("connect_", "first answer ")):
        if has(f"{source}p50"):
            for name, title in (("p50", "p50"), ("p90", "p90"), ("p99", "p99"), ("p999", "p99.9")):
                found.append((f"{words}{title}, ms", lambda peer, key=source + name: cell(row, peer, key, 1e-3)))
            if "direct" in row["peers"]:
                for name in ("p50", "p99"):
                    found.append((f"{words}{name} added to direct, ms", lambda peer, key=source + name: spread_text(added(row, peer, key), 1e-3) if peer != "direct" else "0"))
    if has("switches"):
        found.append((f"voluntary switches a {unit}", lambda peer: cell(row, peer, "switches")))
    if has("syscalls"):
        found.append((f"system calls a {unit}", lambda peer: cell(row, peer, "syscalls")))
    if has("resumed_share"):
        found.append(("resumed", lambda peer: f"{figure(row, peer, 'resumed_share')['median']:.0%}" if figure(row, peer, "resumed_share") else "-"))
    if any("denied" in run for entry in row["peers"].values() for run in entry["runs"]):
        found.append(("denied as they should be", lambda peer: ", ".join(str(run.get("denied", "-")) for run in row["peers"][peer]["runs"])))
    if any("rotations_seen" in run for entry in row["peers"].values() for run in entry["runs"]):
        found.append(("rotations asked / contexts or snapshots taken", lambda peer: ", ".join(f"{run['turned']}/{run['rotations_seen']}" for run in row["peers"][peer]["runs"])))
    return found


def row_table(row):
    shown = columns(row)
    lines, apart = [], []
    for peer, entry in row["peers"].items():
        if entry["status"] == "n/a":
            apart.append(f"- {peer}: not applicable: {escaped(entry['reason'])}")
            continue
        if entry["status"] == "error":
            apart.append(f"- 🔴 **{peer}: ERROR**: {escaped(entry['reason'])}")
        if not entry["runs"]:
            lines.append([peer, *["ERROR"] * len(shown), "ERROR"])
            continue
        failed = failures(entry)
        last = f"🔴 {failed}: {escaped(details(entry))}" if failed else "0"
        lines.append([f"**{peer}**" if peer == OURS else peer, *[text(peer) for _, text in shown], last])
    out = table(["peer", *[head for head, _ in shown], "failures"], lines) if lines else []
    return out + ([""] if out and apart else []) + apart


def peers_table(results):
    lines = []
    for peer, known in results["peers"].items():
        facts = "; ".join(f"{kind}: {json.dumps(one, ensure_ascii=False)}" for kind, one in known["facts"].items() if one)
        lines.append([peer, known["title"], known["checks"], escaped(facts) or "-"])
    return ["## What was compared", "", *[f"- {note}" for note in results["notes"]], ""] + table(["peer", "what", "what is verified", "what it says of itself"], lines) + [""]


def escaped(text):
    return " ".join(str(text).split()).replace("|", "\\|")


# --- plots --------------------------------------------------------------------------------------------------------------------


def plot_data(results):
    must = {target.row: target.must for target in TARGETS if target.ratio and target.measure == "cpu"}
    bars, curves, memory = [], [], {}
    for row in results["rows"]:
        found = {peer: ratio(row, peer, "cpu") for peer in row["peers"] if peer != REFERENCE}
        found = {peer: value for peer, value in found.items() if value}
        if found:
            bars.append({"title": row["title"], "ratios": found, "must": must.get(row["key"])})
        lines = {peer: curve(row, peer) for peer in row["peers"]}
        lines = {peer: line["curve"] for peer, line in lines.items() if line and len(line["curve"]) > 2}
        if lines:
            curves.append({"title": row["title"], "curves": lines})
        if row["workload"] == "idle":
            for peer in row["peers"]:
                base, each = figure(row, peer, "process_bytes"), figure(row, peer, "connection_bytes")
                if base and each:
                    count = row["peers"][peer]["runs"][0]["connections"]
                    points = memory.setdefault(peer, [])
                    if not points:
                        points.append([0, base["median"] / MIB])
                    points.append([count, (base["median"] + each["median"] * count) / MIB])
    return {"ratios": bars, "latency": curves, "memory": memory}


def draw(results, folder):
    data = folder / ".plots.json"
    data.write_text(json.dumps(plot_data(results)))
    try:
        command = [PLOT_PYTHON, ROOT / "benches" / "bench" / "plots.py", data, folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PLOT_TIMEOUT_S, check=False)
        if done.returncode != 0:
            raise Failure(f"plots could not be drawn: {done.stderr.strip().splitlines()[-1:] or done.returncode}; run scripts/setup bench, then scripts/bench --render")
    except OSError as error:
        raise Failure(f"plots could not be drawn: {error}; run scripts/setup bench, then scripts/bench --render") from None
    finally:
        data.unlink(missing_ok=True)


def write(results, folder):
    """results.json, report.md and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(results))
    draw(results, folder)
