"""The ringfence processes, and what their connection logs say."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e2e.consul import Consul
from e2e.http import Answer, ask
from e2e.machine import Machine, Process, wait

# Plays systemd.
MANAGER = Path(__file__).parents[2] / "tests/support/systemd/manager.py"
# What it says of a process that is ready.
READY = '{"systemd": "ready"'


class Sidecar:
    """One ringfence process; it may be started again."""

    def __init__(
        self, machine: Machine, consul: Consul, binary: Path, name: str, admin: int, token: str, arguments: Sequence[str]
    ) -> None:
        self.machine, self.name, self.admin = machine, name, admin
        self.log = machine.logs / f"connections-{name}.jsonl"
        token_file = machine.scratch / f"token-{name}"
        token_file.write_text(token)
        token_file.chmod(0o600)
        common = [
            "-http-addr",
            consul.address,
            "-token-file",
            str(token_file),
            "-connection-log",
            str(self.log),
            "-workers",
            "2",
        ]
        self.command = [str(binary), "connect", *arguments, *common]
        self.process = self.start()

    def start(self, flags: Sequence[str] = ()) -> Process:
        """As its unit would start it, with RINGFENCE_FLAGS, but without a service manager that keeps its sockets."""
        command = [*self.command, "-admin-bind", f"127.0.0.1:{self.admin}", *flags]
        self.process = self.machine.start(f"ringfence-{self.name}", command, unit=self.unit)
        return self.process

    def start_kept(self) -> None:
        """As the main process of a unit whose sockets are kept and which is restarted: by a program that plays systemd."""
        folder = self.machine.scratch / f"unit-{self.name}"
        folder.mkdir(exist_ok=True)
        for leftover in folder.iterdir():
            leftover.unlink()
        command = self.machine.in_unit([*self.command, "-admin-bind", f"127.0.0.1:{self.admin}"], self.unit)
        self.process = self.machine.start(f"ringfence-{self.name}", [sys.executable, str(MANAGER), str(folder), *command])

    def tell_manager(self, number: signal.Signals) -> float:
        """SIGHUP restarts the unit, SIGUSR1 kills its process with SIGKILL. Gives the seconds until the next one was ready."""
        before = self.said(READY)
        os.kill(self.process.child.pid, number)
        return wait(f"the sidecar {self.name} is ready again", 60, lambda: self.said(READY) > before, 0.02)

    def stop_manager(self) -> None:
        """Ends the unit, whose sockets are kept no longer then."""
        self.process.child.terminate()
        self.process.child.wait(60)

    @property
    def unit(self) -> str:
        """Its unit."""
        return f"ringfence-{self.name}.service"

    def pids(self) -> list[int]:
        """The processes of its unit: two while one takes over from the other."""
        return [int(pid) for pid in (self.machine.unit(self.unit) / "cgroup.procs").read_text().split()]

    def stop(self, timeout: float) -> float:
        """SIGTERM to all of its unit, and SIGKILL after the timeout, as systemd does. Gives the seconds that it took."""
        began = time.monotonic()
        for pid in self.pids():
            os.kill(pid, signal.SIGTERM)
        while self.pids() and time.monotonic() - began < timeout:
            self.process.child.poll()
            time.sleep(0.05)
        self.machine.kill_unit(self.unit)
        self.process.child.wait()
        return time.monotonic() - began

    def serial_of(self, identity: str) -> str | None:
        """The serial number of the certificate that callers of this identity speak with."""
        views = self.ask("/snapshot").json()["identities"]
        return next((view["serial"] for view in views if view["name"] == identity), None)

    def said(self, text: str) -> int:
        """How often its own log has a text."""
        return self.process.log.read_text(errors="replace").count(text)

    def wait_ready(self, seconds: float = 30) -> float:
        """Until /ready says so."""

        def is_ready() -> bool | str:
            if not self.pids():
                self.process.assert_running()
            answer = self.ask("/ready")
            return True if answer.status == 200 else answer.body

        return wait(f"the sidecar {self.name} is ready", seconds, is_ready, 0.05)

    def ask(self, path: str) -> Answer:
        """The admin port."""
        return ask(f"http://127.0.0.1:{self.admin}{path}")

    def connections(self, upstream: str | None = None) -> list[dict[str, Any]]:
        """Every line of the log so far, of one upstream if that is named."""
        if not self.log.exists():
            return []
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
        return [line for line in lines if upstream is None or line["upstream"] == upstream]
