"""What the kernel says that processes have used: CPU, voluntary context switches, memory, and entries into the kernel.

CPU is the sum of the threads' schedstat, in nanoseconds. Threads that ended in between are missing there; the process's
utime and stime hold them, and count where they say notably more. Those two, in ticks of 10 ms, also give the share of user
and system. Memory is what /proc says: VmRSS, and of it the anonymous pages. What the kernel holds for sockets and rings is in
neither; the change of the machine's available memory is given beside it.
"""

import dataclasses
import os
import pathlib
import shutil
import signal
import threading
import time

from .base import Failure

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# Ticks round each process's figure; only a larger difference means that a thread ended.
ENDED_THREADS_TICKS = 3
PERF_ATTACH_S = 0.25
SAMPLE_S = 0.1


@dataclasses.dataclass
class Usage:
    """Used so far by some processes, in seconds and numbers; or between two such moments."""

    threads_s: float = 0
    user_s: float = 0
    system_s: float = 0
    switches: int = 0

    def since(self, before):
        return Usage(
            self.threads_s - before.threads_s,
            self.user_s - before.user_s,
            self.system_s - before.system_s,
            self.switches - before.switches,
        )

    def cpu_s(self, processes):
        ticked = self.user_s + self.system_s
        return ticked if ticked - self.threads_s > ENDED_THREADS_TICKS * TICK_S * processes else self.threads_s


def family(pid):
    """The process and all its descendants."""
    found, queue = [], [pid]
    while queue:
        one = queue.pop()
        found.append(one)
        for children in pathlib.Path(f"/proc/{one}/task").glob("*/children"):
            try:
                queue += [int(child) for child in children.read_text().split()]
            except OSError:
                continue  # the thread ended meanwhile
    return found


def usage(pids):
    total = Usage()
    for pid in pids:
        process = pathlib.Path(f"/proc/{pid}")
        # The name in brackets may hold blanks: count the fields after it. 14 and 15 are utime and stime.
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        total.user_s += int(fields[11]) * TICK_S
        total.system_s += int(fields[12]) * TICK_S
        for thread in (process / "task").iterdir():
            try:
                total.threads_s += int((thread / "schedstat").read_text().split()[0]) / 1e9
                total.switches += field(thread / "status", "voluntary_ctxt_switches:")
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended meanwhile
    return total


def field(file, name):
    for line in file.read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    return 0


def memory(pids):
    """Bytes resident, and of them anonymous, in these processes together."""
    resident = anonymous = 0
    for pid in pids:
        status = pathlib.Path(f"/proc/{pid}/status")
        resident += field(status, "VmRSS:") * 1024
        anonymous += field(pathlib.Path(f"/proc/{pid}/smaps_rollup"), "Pss_Anon:") * 1024
    return {"resident": resident, "anonymous": anonymous}


def available():
    """Bytes that the whole machine could still give."""
    return field(pathlib.Path("/proc/meminfo"), "MemAvailable:") * 1024


class MemoryWatch:
    """Samples the resident memory of processes in the background; `most` is the greatest seen."""

    def __init__(self, pids):
        self.pids = pids
        self.most = self.before = memory(pids)["resident"]
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.sample, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()

    def sample(self):
        while not self.ended.wait(SAMPLE_S):
            try:
                self.most = max(self.most, sum(field(pathlib.Path(f"/proc/{pid}/status"), "VmRSS:") * 1024 for pid in self.pids))
            except OSError:
                return


class SyscallCount:
    """Counts what processes ask of the kernel while the block runs. It slows them down: never while CPU is measured."""

    def __init__(self, programs, pids):
        if not shutil.which("perf"):
            raise Failure("perf is missing, so system calls cannot be counted; run scripts/setup bench")
        self.programs, self.output = programs, programs.folder / "perf.out"
        self.command = ["perf", "stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "-o", self.output, "-p", ",".join(map(str, pids))]
        self.count = None

    def __enter__(self):
        self.output.unlink(missing_ok=True)
        self.perf = self.programs.start("perf", self.command)
        time.sleep(PERF_ATTACH_S)
        self.perf.check_alive()
        return self

    def __exit__(self, kind, *_):
        self.perf.process.send_signal(signal.SIGINT)
        self.perf.process.wait(10)
        self.programs.running.remove(self.perf)
        if kind:
            return
        lines = self.output.read_text().splitlines() if self.output.exists() else []
        counts = [line.split(",")[0] for line in lines if "raw_syscalls" in line]
        if len(counts) != 1 or not counts[0].isdigit():
            raise Failure(f"perf counted no system calls: {' '.join(lines)[-300:] or self.perf.last_words()}; it needs root and tracefs")
        self.count = int(counts[0])
