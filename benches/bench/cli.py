"""The command line of scripts/bench: measure, compare two results, or write the report of one again.

Exit codes: 0 measured, and nothing of ringfence failed; 1 a row is an error, ringfence failed operations, or a comparison
found a regression; 2 the command line is wrong; 130 or 143 interrupted, with what was measured so far written down.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

from . import base, compare, figures, report
from .account import field
from .base import CONSUL, ENVOY, PLOT_PYTHON, ROOT, Failure, Interrupted, Ports, Programs, first_line, say, target
from .peers import PEERS, REFERENCE
from .session import QUICK_PEERS, RUNS, Session
from .workloads import ROWS, WORKLOADS
from .world import harness

PROG = "scripts/bench"
RESULTS = "results.json"
EXAMPLES = """examples:
  scripts/bench --quick                                  ringfence and Envoy, the rows with targets: under 5 minutes
  scripts/bench                                          all peers, all workloads: under 60 minutes
  scripts/bench --workload request --workload bulk       these workloads, all peers
  scripts/bench --peer ringfence --workload connect --runs 7
  scripts/bench --compare target/bench/OLD/results.json  the newest result against OLD; exit code 1 if worse
  scripts/bench --render target/bench/OLD/results.json   write report.md and the plots of OLD again

Everything listens on loopback below port 32768 and is ended, by its process id, however this ends. Envoy is always measured:
every figure is read as a ratio to it. Nothing else should run meanwhile.

exit codes: 0 measured, nothing of ringfence failed; 1 a row is an error, ringfence failed operations, or --compare found a
regression; 2 the command line is wrong; 130 or 143 interrupted (what was measured so far is written)
"""


def arguments(words):
    parser = argparse.ArgumentParser(prog=PROG, description="Measures pairs of sidecars in turn on the same work and writes a report.", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the rows with targets alone, ringfence and Envoy, few runs: under 5 minutes")
    parser.add_argument("--peer", action="append", dest="peers", choices=list(PEERS), help="this peer, beside Envoy; may be repeated (default all)")
    parser.add_argument("--workload", action="append", dest="workloads", choices=WORKLOADS, help="this workload; may be repeated (default all)")
    parser.add_argument("--runs", type=at_least_one, metavar="N", help=f"rounds of each row (default: by its weight, {RUNS} for most)")
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER", help="where the report goes (default target/bench/<UTC time>)")
    parser.add_argument("--ringfence", type=pathlib.Path, metavar="FILE", help="measure this binary instead of building one")
    parser.add_argument("--no-build", action="store_true", help="take the binaries in target/release as they are")
    parser.add_argument("--no-syscalls", action="store_true", help="leave out the short runs that count system calls")
    parser.add_argument("--plan", action="store_true", help="print the plan and its estimated time, and measure nothing")
    parser.add_argument("--compare", type=pathlib.Path, metavar="OLD.json", help="list what is worse in the newest result than in OLD.json")
    parser.add_argument("--with", type=pathlib.Path, dest="new", metavar="NEW.json", help="with --compare: this result instead of the newest")
    parser.add_argument("--render", type=pathlib.Path, metavar=RESULTS, help="write report.md and the plots of this result again, beside it or in --out")
    options = parser.parse_args(words)
    if options.new and not options.compare:
        parser.error("--with names the newer result of --compare; give --compare OLD.json too")
    if options.compare and options.render:
        parser.error("--compare and --render are two commands; give one of them")
    options.peers_named = bool(options.peers)
    chosen = options.peers or (QUICK_PEERS if options.quick else list(PEERS))
    options.peers = [peer for peer in PEERS if peer in chosen or peer == REFERENCE]
    options.workloads = options.workloads or list(WORKLOADS)
    if options.quick and not any(row.quick for row in ROWS if row.workload in options.workloads):
        parser.error(f"--quick has no row of {', '.join(options.workloads)}; leave --quick out")
    return options


def at_least_one(text):
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"`{text}` is no whole number from 1 to 100")
    return int(text)


def main(words=None):
    options = arguments(words)
    try:
        if options.compare:
            return compare_command(options)
        if options.render:
            return render_command(options)
    except Failure as failure:
        print(f"{PROG}: FAILED: {failure}", file=sys.stderr)
        return 1
    return measure_command(options)


# --- compare and render -------------------------------------------------------------------------------------------------------


def load(path):
    try:
        results = json.loads(path.read_text())
        results["rows"], results["machine"]
        return results
    except OSError as error:
        raise Failure(f"{path} cannot be read: {error.strerror}; name a {RESULTS} of an earlier run") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Failure(f"{path} is no result of {PROG}: {error!r}; name a {RESULTS} of an earlier run") from None


def newest():
    found = sorted((target() / "bench").glob(f"*/{RESULTS}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise Failure(f"no {RESULTS} under {target() / 'bench'}; run {PROG} first or name one by --with")
    return found[-1]


def compare_command(options):
    path = options.new or newest()
    if path.resolve() == options.compare.resolve():
        raise Failure(f"{path} would be compared with itself; name another by --with")
    old, new = load(options.compare), load(path)
    worse, better, missing = compare.regressions(old, new)
    print(f"old: {options.compare} ({old['time']}, {old['commit']}), new: {path} ({new['time']}, {new['commit']})")
    if old["machine"]["cpu_model"] != new["machine"]["cpu_model"] or old["machine"]["kernel"] != new["machine"]["kernel"]:
        print("WARNING: the two were measured on different machines or kernels; ratios may differ for that reason alone")
    for title, lines in (("WORSE", worse), ("better", better), ("not compared", missing)):
        print(f"{title}: {len(lines)}")
        for line in lines:
            print(f"  {line}")
    return 1 if worse else 0


def render_command(options):
    results = load(options.render)
    folder = options.out or options.render.parent
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(report.markdown(results))
    report.draw(results, folder)
    say(f"{folder / 'report.md'} is written again")
    return 0


# --- measure ------------------------------------------------------------------------------------------------------------------


def interrupted(number, _frame):
    raise Interrupted(number)


def measure_command(options):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    folder = pathlib.Path(tempfile.mkdtemp(prefix="ringfence-bench-"))  # mode 0700: it holds keys
    programs = Programs(folder)
    code, results, session, started = 1, None, None, time.monotonic()
    try:
        binary = prepare(options)
        files = base.raise_file_limit()
        session = Session(programs, Ports(), folder, binary, options, files)
        session.print_plan()
        if options.plan:
            return 0
        warn_if_busy()
        results = describe(options, binary, session)
        started = time.monotonic()
        session.measure_all(results["rows"].append)
        results["complete"] = True
        code = 1 if figures.problems(results) else 0
    except Interrupted as stop:
        say(f"{stop}: ending what was started")
        code = 128 + stop.number
    except Failure as failure:
        print(f"{PROG}: FAILED: {failure}", file=sys.stderr)
    except Exception:  # a defect of the harness: what was measured so far is written all the same
        traceback.print_exc()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        programs.stop_all()
        shutil.rmtree(folder, ignore_errors=True)
    if not results or not results["rows"]:
        return code
    results["minutes"] = (time.monotonic() - started) / 60
    results["peers"] = {peer: {"title": PEERS[peer].title, "checks": PEERS[peer].checks, "facts": session.facts.get(peer, {})} for peer in options.peers}
    try:
        report.write(results, out_folder(options, results))
    except (Failure, OSError) as failure:
        print(f"{PROG}: FAILED: {failure}", file=sys.stderr)
        code = code or 1
    tell(results, out_folder(options, results))
    return code


def out_folder(options, results):
    return options.out or target() / "bench" / results["time"].replace(":", "").replace("-", "")


def tell(results, folder):
    for line in figures.verdicts(results):
        value = line["figure"]
        text = f"{value['median']:.2f} ({value['min']:.2f}..{value['max']:.2f}) {line['unit']}" if value else "-"
        say(f"{line['verdict']:>12}: {line['title']}: {text}, must reach {report.bound(line['must'])}, aim {report.bound(line['aim'])}")
    for line in figures.problems(results):
        say(f"FAILED: {line}")
    say(f"{results['minutes']:.1f} minutes; the report is {folder / 'report.md'}")


def prepare(options):
    """Installs what is missing, builds, and returns the path of ringfence."""
    wanted = ["redis-server", "redis-benchmark", "iperf3", "openssl"]
    parts = ["packages"] if any(not shutil.which(tool) for tool in wanted) or not list(pathlib.Path("/usr/lib/postgresql").glob("*/bin/pgbench")) else []
    more = ["haproxy", "nginx", "wrk", "perf"]
    parts += ["bench"] if any(not shutil.which(tool) for tool in more) or not os.access(PLOT_PYTHON, os.X_OK) else []
    parts += [] if os.access(ENVOY, os.X_OK) else ["envoy"]
    parts += ["consul"] if "consul" in options.peers and not os.access(CONSUL, os.X_OK) else []
    if parts and not options.plan:
        setup = ROOT / "scripts" / "setup"
        if subprocess.run([setup, *parts], stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False).returncode != 0:
            raise Failure(f"{setup} {' '.join(parts)} failed; its last line says why")
    binary = target() / "release" / "ringfence"
    if options.ringfence:
        binary = options.ringfence.resolve()
    elif not options.no_build and not options.plan:
        build("--bin", "ringfence")
    if not os.access(binary, os.X_OK):
        raise Failure(f"{binary} is no program; leave --ringfence and --no-build out to build one")
    if not options.no_build and not options.plan:
        try:
            build("-p", "ringfence-bench")
        except Failure as failure:
            # Rows that need it become errors with their own words; the others can still be measured.
            say(f"{failure}; what needs bench-load and bench-relay will be an error")
    return binary


def build(*words):
    command = [os.environ.get("CARGO", "cargo"), "build", "--release", *words]
    say(" ".join(command))
    if subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False).returncode != 0:
        raise Failure(f"{' '.join(command)} failed; its output is above")


def warn_if_busy():
    average, cpus = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if average > cpus / 4:
        say(f"WARNING: load average {average:.2f} on {cpus} CPUs: something else is running, and the figures will scatter")


def describe(options, binary, session):
    """All of a result but its rows."""
    cpuinfo = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    meminfo = pathlib.Path("/proc/meminfo")
    machine = {
        "cpu_model": models[0] if models else "unknown CPU",
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": os.uname().release,
        "tcp_congestion_control": pathlib.Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text(encoding="ascii").strip(),
        "memory_gib": field(meminfo, "MemTotal:") / 1_048_576,
        "load_average": os.getloadavg()[0],
    }
    pg = sorted(pathlib.Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    versions = {
        "ringfence": first_line(binary, "--version"),
        "envoy": (first_line(ENVOY, "--version") or "").rpartition("version: ")[2],
        "consul": first_line(CONSUL, "version"),
        "haproxy": first_line("haproxy", "-v"),
        "nginx": first_line("nginx", "-v"),
        "redis": first_line("redis-server", "--version"),
        "iperf3": first_line("iperf3", "--version"),
        "wrk": wrk_version(),
        "postgresql": first_line(pg[-1], "--version") if pg else None,
        "openssl": first_line("openssl", "version"),
        "perf": first_line("perf", "--version"),
        "python": sys.version.split()[0],
        "matplotlib": first_line(PLOT_PYTHON, "-c", "import matplotlib; print(matplotlib.__version__)"),
        "rustc": first_line("rustc", "--version"),
        "harness": "built from this tree" if harness_is_there() else "missing",
    }
    words = {"quick": options.quick, "peers": options.peers, "workloads": options.workloads, "runs": options.runs, "ringfence": str(options.ringfence) if options.ringfence else None}
    return {
        "format": 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine,
        "versions": {name: text or "missing" for name, text in versions.items()},
        "commit": first_line("git", "rev-parse", "--short=12", "HEAD"),
        "dirty": bool(first_line("git", "status", "--porcelain")),
        "options": words,
        "notes": notes(session),
        "complete": False,
        "rows": [],
    }


def wrk_version():
    done = subprocess.run(["wrk", "-v"], capture_output=True, text=True, check=False) if shutil.which("wrk") else None
    return (done.stdout + done.stderr).strip().splitlines()[0] if done else None


def harness_is_there():
    try:
        return bool(harness("bench-load"))
    except Failure:
        return False


def notes(session):
    flag = "is given `-tls-resumption off`" if session.resumption_flag else "has no flag for resumption: the same pair serves `connect` and `connect-resumed`"
    return [
        f"`connect`: Envoy's session keys and tickets, HAProxy's and nginx's session reuse are off; ringfence {flag}.",
        "Certificates of all but `consul` come from one embedded agent; the client's sidecar holds `client`'s, the server's one for each service.",
        "The limit of 1,024 connections an upstream, which Consul leaves in force and both Envoy and ringfence obey, is lifted for both: 2,000 flows or 10,000 connections would not be held.",
        "CPU is the kernel's account of all threads of both sidecars, in nanoseconds (schedstat); user and system are split by 10 ms ticks. What the kernel does for sockets in softirq counts for whoever runs.",
        "System calls are counted by perf in a short run of their own. An `io_uring_enter` is one call however much it carries.",
        "Percentiles of redis-benchmark are drawn straight between the steps that it prints; its loop is closed, so a slow peer is asked less. bench-load with a rate is open loop.",
        "Memory is VmRSS: user memory, not what the kernel holds for sockets and rings; the column for the whole machine has that too, with the load's own.",
    ]  # fmt: skip
