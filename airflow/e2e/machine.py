"""What the machine lends to a run: a scratch folder, a network of its own, users, and processes in cgroups.

Every process lies in a cgroup below `ringfence-e2e-PID.slice`, in the place and under the name of its systemd unit, so that
ringfence meets what systemd would have made. The kernel ends all of them at once by that slice, which a guardian does when this
process is gone, however it went.

Invariant: nothing is ended that was not started here.
"""

from __future__ import annotations

import ctypes
import json
import os
import pwd
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

CLONE_NEWNET = 0x4000_0000
# What a user may not reach but by ringfence; each try is counted.
WALL = """
table inet e2e {{
    counter past {{ }}
    chain outgoing {{
        type filter hook output priority 0;
        meta skuid {uid} tcp dport {{ {ports} }} tcp flags & (syn | ack) == syn counter name past reject with tcp reset
    }}
}}
"""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# Dying processes hold a cgroup and a user for a moment longer than the kernel lists them: both are tried until they go.
GUARDIAN = """
import pathlib, subprocess, sys, time, shutil
slice, scratch, user = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
kept = sys.stdin.read() == "keep"
deadline = time.monotonic() + 15
def until(done):
    while not done() and time.monotonic() < deadline: time.sleep(0.05)
def is_slice_gone():
    try:
        for path in [*sorted((path for path in slice.rglob("*") if path.is_dir()), reverse=True), slice]: path.rmdir()
    except OSError:
        pass
    return not slice.exists()
def is_user_gone():
    return subprocess.run(["userdel", user], stderr=subprocess.DEVNULL).returncode in (0, 6)
(slice / "cgroup.kill").write_text("1")
until(is_slice_gone)
if not kept: shutil.rmtree(scratch, ignore_errors=True)
until(is_user_gone)
for what, left in ((slice, slice.exists()), (f"the user {user}", not is_user_gone())):
    if left: print(f"scripts/airflow-e2e: {what} could not be removed", file=sys.stderr)
"""


class Failure(Exception):
    """The run cannot go on. The text says why and what to do."""


class Process:
    """One process that was started here."""

    def __init__(self, name: str, child: subprocess.Popen[bytes], log: Path) -> None:
        self.name, self.child, self.log = name, child, log

    def tail(self, lines: int = 15) -> str:
        """The last lines that it wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def assert_running(self) -> None:
        """Fails with its last words if it has ended."""
        if self.child.poll() is not None:
            raise Failure(f"{self.name} ended with {self.child.returncode}; {self.log}:\n{self.tail()}")


class Machine:
    """See the module."""

    def __init__(self, keep: bool, say: Callable[[str], None]) -> None:
        if os.geteuid() != 0:
            raise Failure(
                "this needs root: cgroups of tasks, a network of its own, and users for Airflow and PostgreSQL; use sudo"
            )
        self.say = say
        self.scratch = Path(tempfile.mkdtemp(prefix="ringfence-e2e-"))
        self.scratch.chmod(0o755)
        self.logs = self.scratch / "logs"
        self.logs.mkdir()
        self.keep = keep
        self.has_own_network = self.is_walled = False
        self.slice = _cgroup_mount() / f"ringfence-e2e-{os.getpid()}.slice"
        self.slice.mkdir()
        self.user = _make_user(f"ringfence-e2e-{os.getpid()}")
        command = [sys.executable, "-c", GUARDIAN, str(self.slice), str(self.scratch), self.user.pw_name]
        # A session of its own: Ctrl-C is for this process, and the guardian cleans up after it.
        self.guardian = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def own_network(self) -> None:
        """Leaves the machine's network for an empty one: fixed ports are free in it, and nothing gets out."""
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
            self.say(f"no network of its own ({os.strerror(ctypes.get_errno())}); the machine's is used")
            return
        self.has_own_network = True
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)

    def wall(self, ports: Sequence[int]) -> None:
        """Shuts the user out of these ports, where the network is the run's own, and tries that it holds."""
        if not self.has_own_network:
            return
        rules = WALL.format(uid=self.user.pw_uid, ports=", ".join(map(str, ports)))
        done = subprocess.run(["nft", "-f", "-"], input=rules, text=True, capture_output=True, check=False)
        if done.returncode != 0:
            raise Failure(f"nft cannot shut Airflow out of {ports}: {done.stderr.strip()}")
        self.is_walled = True
        for port in ports:
            before = self.tries_past()
            script = f"import socket; print(socket.socket().connect_ex(('127.0.0.1', {port})))"
            said = self.run("a try past ringfence", [sys.executable, "-c", script], user=self.user.pw_name).strip()
            if said == "0" or self.tries_past() != before + 1:
                raise Failure(
                    f"a try past ringfence to port {port}: connect gives {said}, counted {self.tries_past() - before}"
                )

    def tries_past(self) -> int:
        """How many connections the wall has rejected so far."""
        command = ["nft", "-j", "list", "counter", "inet", "e2e", "past"]
        listed = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["nftables"]
        return sum(int(entry["counter"]["packets"]) for entry in listed if "counter" in entry)

    def unit(self, name: str) -> Path:
        """The cgroup of a unit."""
        path = self.slice / name
        path.mkdir(exist_ok=True)
        return path

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        unit: str = "servers.service",
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Process:
        """Starts a process in a unit's cgroup, as a user."""
        log = self.logs / f"{name}.log"
        with log.open("ab") as output:
            child = subprocess.Popen(
                self.in_unit(command, unit, user),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={"PATH": PATH, "LANG": "C.UTF-8", **(env or {})},
                cwd=cwd or self.scratch,
                start_new_session=True,
            )
        return Process(name, child, log)

    def run(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        unit: str = "servers.service",
        user: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> str:
        """Runs a command to its end; its output."""
        done = subprocess.run(
            self.in_unit(command, unit, user),
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
            timeout=timeout,
            env={"PATH": PATH, "LANG": "C.UTF-8", **(env or {})},
            cwd=self.scratch,
        )
        if done.returncode != 0:
            said = f"{done.stdout[-2000:]}{done.stderr[-3000:]}"
            raise Failure(f"{name} ended with {done.returncode}: {shlex.join(map(str, command))}\n{said}")
        return done.stdout

    def kill_unit(self, name: str) -> None:
        """Ends all that lies in a unit's cgroup."""
        unit = self.unit(name)
        (unit / "cgroup.kill").write_text("1")
        wait("the unit is empty", 10, lambda: not (unit / "cgroup.procs").read_text())

    def end(self) -> None:
        """Ends everything. The guardian does it, and waits."""
        assert self.guardian.stdin is not None
        self.guardian.stdin.write(b"keep" if self.keep else b"")
        self.guardian.stdin.close()
        self.guardian.wait()
        if self.keep:
            self.say(f"kept: {self.scratch}")

    def in_unit(self, command: Sequence[str | Path], unit: str, user: str | None = None) -> list[str]:
        """The command with which it runs in a unit's cgroup, as a user."""
        procs = self.unit(unit) / "cgroup.procs"
        words = [str(word) for word in command]
        if user is not None:
            entry = pwd.getpwnam(user)
            words = ["setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups", "--", *words]
        return ["/bin/sh", "-c", f'echo $$ > {shlex.quote(str(procs))} && exec "$@"', "sh", *words]


def wait(what: str, seconds: float, condition: Callable[[], object], pause: float = 0.1) -> float:
    """Waits until the condition is true, or fails with its last words. Gives the seconds that it took."""
    began = time.monotonic()
    last: object = None
    while time.monotonic() - began < seconds:
        try:
            last = condition()
            if last is True or (last and not isinstance(last, str)):
                return time.monotonic() - began
        except Failure:
            raise
        except Exception as error:
            last = error
        time.sleep(pause)
    raise Failure(f"{what}: not within {seconds:g} s; last: {last}")


def _cgroup_mount() -> Path:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if " - cgroup2 " in line:
            return Path(line.split()[4])
    raise Failure("no cgroup v2 is mounted: scripts/setup cgroup")


def _make_user(name: str) -> pwd.struct_passwd:
    command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", name]
    subprocess.run(command, check=True, capture_output=True)
    return pwd.getpwnam(name)
