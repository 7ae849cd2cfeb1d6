"""The plan, and the rounds: each row's peers in turn, A B A B, so that each round of one stands beside a round of Envoy.

What goes wrong in a row for one peer ends that peer's part of the row, is kept with its reason, and stops nothing else. A pair
that has died is started again for the next row.
"""

import time

from .base import Failure, say
from .peers import OURS, PEERS, REFERENCE, YARDSTICKS, NotApplicable, Starter, has_resumption_flag
from .workloads import ROWS, SETTLE_S, SYSCALL_RUN_S, WARMUP_S
from .world import Apps, World

MAIN = (OURS, REFERENCE)
MAIN_RUNS, RUNS, QUICK_RUNS, OTHER_RUNS = 5, 3, 2, 2
QUICK_PEERS = ("ringfence", "envoy", "direct", "floor")
# Beside a run's own seconds: starting the load, and reading what it says.
RUN_OVERHEAD_S = 0.4
PAIR_START_S = 1.5
SHORTEST_LOAD_S = 1.0


class Session:
    def __init__(self, programs, ports, folder, binary, options, files):
        self.programs, self.ports, self.folder, self.binary, self.files = programs, ports, folder, binary, files
        self.options = options
        self.count_syscalls = not options.no_syscalls
        self.apps = Apps(programs, ports, folder)
        self.known_worlds, self.pairs, self.states, self.broken = {}, {}, {}, {}
        self.starter = Starter(programs, ports, folder, binary, self.world)
        self.facts = {}
        self.current = None
        self.resumption_flag = has_resumption_flag(binary)

    # --- plan ---

    def peers_of(self, row):
        for peer in self.options.peers:
            if peer in YARDSTICKS and not self.options.peers_named:
                if not row.yardsticks or (self.options.quick and not row.quick_yardsticks):
                    continue
            yield peer

    def runs_of(self, row, peer):
        if self.options.runs:
            return self.options.runs
        if self.options.quick:
            return QUICK_RUNS + (1 if row.main else 0)
        if peer in MAIN and row.main:
            return MAIN_RUNS
        if row.runs_others and peer not in MAIN:
            return row.runs_others
        return RUNS if peer in MAIN else OTHER_RUNS

    def rows(self):
        for row in ROWS:
            if row.workload in self.options.workloads and (row.quick or not self.options.quick):
                yield row

    def seconds_of(self, row):
        return row.quick_seconds if self.options.quick else row.seconds

    def estimate(self, row):
        seconds = max(self.seconds_of(row), SHORTEST_LOAD_S if row.seconds else 0) + row.extra_s + SETTLE_S * 2 + RUN_OVERHEAD_S
        total = 0
        for peer in self.peers_of(row):
            if row.kind in PEERS[peer].cannot:
                continue
            extras = (WARMUP_S + RUN_OVERHEAD_S + (SYSCALL_RUN_S + RUN_OVERHEAD_S if row.syscalls and self.count_syscalls else 0)) if row.seconds else 0
            total += self.runs_of(row, peer) * seconds + extras
        return total

    def print_plan(self):
        rows = list(self.rows())
        for row in rows:
            peers = ", ".join(f"{peer} x{self.runs_of(row, peer)}" for peer in self.peers_of(row))
            say(f"plan: {row.key}: about {self.estimate(row) / 60:.1f} min: {peers}")
        say(f"plan: {len(rows)} rows, about {self.total_estimate(rows) / 60:.0f} min")

    def total_estimate(self, rows):
        kinds = {(peer, row.kind) for row in rows for peer in self.peers_of(row) if row.kind != "idle"}
        return sum(self.estimate(row) for row in rows) + len(kinds) * PAIR_START_S

    # --- what runs ---

    def world(self, kind):
        if kind not in self.known_worlds:
            self.known_worlds[kind] = World(self.programs, self.ports, self.folder, self.binary, self.apps, kind)
        return self.known_worlds[kind]

    def pair(self, peer, kind):
        kind = self.kind_of(peer, kind)
        found = self.pairs.get((peer, kind))
        if found:
            try:
                found.check_alive()
                return found
            except Failure as failure:
                say(f"{peer} ({kind}) has died and is started again: {failure}")
                self.programs.stop(*found.all_programs())
                del self.pairs[(peer, kind)]
                self.states = {key: value for key, value in self.states.items() if key[1:] != (peer, kind)}
        # Its check goes through redis.
        self.apps.need("cache")
        before = len(self.programs.running)
        try:
            found = self.pairs[(peer, kind)] = self.starter.start(peer, kind)
        except BaseException:
            # What started before it failed serves nobody; the agents stay.
            agents = [world.agent for world in self.known_worlds.values()]
            self.programs.stop(*[one for one in self.programs.running[before:] if one not in agents])
            raise
        self.facts.setdefault(peer, {}).setdefault(kind, {}).update(found.facts)
        return found

    def kind_of(self, peer, kind):
        """Full handshakes need other processes only where a peer would resume."""
        if kind == "full" and (not PEERS[peer].resumes or peer in YARDSTICKS or (peer == OURS and not self.resumption_flag)):
            return "main"
        return kind

    def fresh(self, peer, row):
        self.apps.need(row.service)
        return self.starter.start(peer, row.kind)

    def state(self, row, pair):
        """What is known of a row on one pair: whether it is warm, its rate, its system calls."""
        return self.states.setdefault((row.key, pair.peer, pair.kind), {})

    # --- rounds ---

    def measure_all(self, finished):
        """Measures every row and hands each to `finished`."""
        rows = list(self.rows())
        total, done, started = self.total_estimate(rows), 0, time.monotonic()
        for row in rows:
            elapsed = time.monotonic() - started
            left = (total - done) * (elapsed / done if done else 1)
            say(f"{row.key}: {row.title} ({elapsed / 60:.1f} min gone, about {left / 60:.1f} min left)")
            finished(self.measure_row(row))
            done += self.estimate(row)

    def measure_row(self, row):
        entries = {peer: {"status": "ok", "reason": None, "runs": []} for peer in self.peers_of(row)}
        for number in range(max((self.runs_of(row, peer) for peer in entries), default=0)):
            for peer, entry in entries.items():
                if entry["status"] == "ok" and number < self.runs_of(row, peer):
                    self.measure_one(row, peer, entry, number)
            self.tell(row, entries, number)
        described = {"key": row.key, "workload": row.workload, "title": row.title, "unit": row.unit, "scale": row.scale, "cpu_unit": row.cpu_unit, "paced": row.paced}
        return described | {"note": row.note, "peers": entries}

    def measure_one(self, row, peer, entry, number):
        self.current = peer
        try:
            self.apps.need(row.service)
            if row.kind in PEERS[peer].cannot:
                raise NotApplicable(PEERS[peer].cannot[row.kind])
            if row.workload == "storm":
                self.apps.need("denied")
            pair = None if row.kind == "idle" else self.pair(peer, row.kind)
            counted = PEERS[peer].counted if row.workload.startswith("connect") else None
            before = counted(pair) if counted else None
            figures = row.run(self, row, pair, self.seconds_of(row))
            if counted:
                self.check_handshakes(row, peer, figures, before, counted(pair))
            elif row.workload.startswith("connect") and PEERS[peer].probed and number == 0:
                kind = self.kind_of(peer, row.kind)
                facts = PEERS[peer].probed(self.starter, kind)
                self.facts[peer][kind]["handshakes, of a logging pair with this configuration"] = facts
                self.judge(row, peer, facts)
            entry["runs"].append({"round": number} | figures)
        except NotApplicable as reason:
            entry |= {"status": "n/a", "reason": str(reason)}
        except (Failure, OSError, ValueError, LookupError, AttributeError) as failure:
            text = str(failure) if isinstance(failure, Failure) else repr(failure)
            entry |= {"status": "error", "reason": text}
            say(f"{row.key}: {peer}: ERROR: {text}")

    def check_handshakes(self, row, peer, figures, before, after):
        facts = {key: after[key] - before[key] for key in ("handshakes", "resumed")}
        facts["versions"] = {key: value - before["versions"].get(key, 0) for key, value in after["versions"].items() if value > before["versions"].get(key, 0)}
        figures |= {key: facts[key] for key in ("handshakes", "resumed")}
        self.facts[peer].setdefault(self.kind_of(peer, row.kind), {})[f"handshakes in {row.key}, last run"] = facts
        self.judge(row, peer, facts)

    def judge(self, row, peer, facts):
        """What is called a full handshake must be one. What should resume and does not is a fact, told in the report."""
        if facts["handshakes"] <= 0:
            raise Failure(f"the {peer} pair counts no handshakes in {row.key}; its counters have changed their names, mend peers.py")
        if row.workload == "connect" and facts["resumed"] and (peer != OURS or self.resumption_flag):
            raise Failure(f"{facts['resumed']} of {facts['handshakes']} handshakes of the {peer} pair were resumed in {row.key}, where none may be")

    def tell(self, row, entries, number):
        words = []
        ours, other = (next((run for run in entries.get(peer, {"runs": []})["runs"] if run["round"] == number), None) for peer in MAIN)
        for key, name in (("cpu_s", "CPU"), ("connection_bytes", "memory a connection"), ("p99_times", "p99 ratio")):
            if ours and other and ours.get(key) and other.get(key):
                per = (ours["count"] / other["count"]) if key == "cpu_s" else 1
                words.append(f"{name} {ours[key] / other[key] / per:.2f} of Envoy's")
        failed = {peer: entry["runs"][-1]["failures"] for peer, entry in entries.items() if entry["runs"] and entry["runs"][-1]["failures"]}
        words += [f"failures: {failed}"] if failed else []
        say(f"{row.key}: round {number + 1}: {', '.join(words) or 'done'}")
