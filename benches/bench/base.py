"""Programs, ports, waiting, and the one kind of failure.

Everything that is started here is ended by its process id, in reverse, however the benchmark ends; should the benchmark be
killed, the kernel ends it. What cannot work raises `Failure`, whose text names the thing, the value and the remedy.
"""

import ctypes
import dataclasses
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CACHE = pathlib.Path(os.environ.get("RINGFENCE_CACHE", "/var/cache/ringfence"))
ENVOY = CACHE / "envoy-1.40" / "envoy"
CONSUL = CACHE / "consul-1.8.7" / "usr" / "bin" / "consul"
PLOT_PYTHON = CACHE / "bench-venv" / "bin" / "python"

READY_TIMEOUT_S = 30
STOP_TIMEOUT_S = 5
LOAD_TIMEOUT_S = 120
HTTP_TIMEOUT_S = 5
POLL_S = 0.02
LAST_LINES = 12
# 10,000 held connections are 20,000 files in a sidecar.
FILES_WANTED = 65_536
PORTS = range(20_500, 32_700)
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


class Failure(Exception):
    """Something that makes a measurement worthless; the text says what and what to do."""


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived."""

    def __init__(self, number):
        super().__init__(signal.Signals(number).name)
        self.number = number


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def target():
    return pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))


def raise_file_limit():
    """As many open files as 10,000 connections need, for everything that is started; returns how many there may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (FILES_WANTED, hard):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))
            return wanted
        except (ValueError, OSError):
            continue
    return soft


class Ports:
    """Free ports of loopback below those that the system gives to clients. Each is handed out once."""

    def __init__(self):
        self.next = PORTS.start + os.getpid() * 64 % (len(PORTS) - 2_048)

    def take(self):
        for _ in PORTS:
            port = self.next
            self.next = port + 1 if port + 1 in PORTS else PORTS.start
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                    return port
                except OSError:
                    continue
        raise Failure(f"no free port in {PORTS.start}..{PORTS.stop}; end what holds them")


@dataclasses.dataclass
class Program:
    """A started program and where its output goes."""

    name: str
    process: subprocess.Popen
    log: pathlib.Path

    def last_words(self):
        lines = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        return "\n  ".join(lines) or "(no output)"

    def check_alive(self):
        if self.process.poll() is not None:
            raise Failure(f"{self.name} ended with {self.process.returncode}; its last words:\n  {self.last_words()}")


class Programs:
    """All that was started, in order."""

    def __init__(self, folder):
        self.folder = folder
        self.running = []
        self.started = 0

    def start(self, name, command, cpus=None, output=None, stdin=subprocess.DEVNULL, user=None, more=None):
        """Starts `command` on `cpus`, as `user` where the benchmark is root, with the environment `more`."""
        self.started += 1
        log = self.folder / f"{name.replace(' ', '-').replace('/', '-')}-{self.started}.log"
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("CONSUL_", "CONNECT_", "PG"))}
        environment |= {"NO_COLOR": "1", "LC_ALL": "C.UTF-8"} | (more or {})

        def in_child():
            LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if cpus:
                os.sched_setaffinity(0, cpus)

        with open(log, "wb") as file:
            process = subprocess.Popen(
                [str(word) for word in command],
                stdin=stdin,
                stdout=output or file,
                stderr=file,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=in_child,
                user=user,
                group=user,
                extra_groups=[] if user else None,
            )
        program = Program(name, process, log)
        self.running.append(program)
        return program

    def run(self, name, command, timeout_s=LOAD_TIMEOUT_S, accept=(0,), **more):
        """Runs to the end and returns what it wrote to stdout."""
        output = self.folder / f"{name.replace(' ', '-')}.out"
        with open(output, "wb") as file:
            program = self.start(name, command, output=file, **more)
        try:
            program.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.stop(program)
            raise Failure(f"{name} was not done after {timeout_s} s; what it goes through stands still, or ask for less work a run") from None
        self.running.remove(program)
        text = output.read_text(errors="replace")
        if program.process.returncode not in accept:
            raise Failure(f"{name} ended with {program.process.returncode}: {text[-800:].strip()}\n  {program.last_words()}")
        program.log.unlink(missing_ok=True)
        return text

    def stop(self, *programs):
        """Ends these, by process id, the last started first."""
        mine = [program for program in reversed(self.running) if program in programs]
        for program in mine:
            if program.process.poll() is None:
                program.process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for program in mine:
            try:
                program.process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                say(f"{program.name} does not end on SIGTERM; it is killed")
                program.process.kill()
                program.process.wait()
            self.running.remove(program)

    def stop_all(self):
        self.stop(*self.running)


def wait_for(what, program, test, timeout_s=READY_TIMEOUT_S):
    """Asks `test` until it says yes; what it raises last is named when it never does."""
    deadline = time.monotonic() + timeout_s
    last = "no answer"
    while time.monotonic() < deadline:
        program.check_alive()
        try:
            if test():
                return
        except (OSError, ValueError) as error:
            last = getattr(error, "reason", None) or error
        time.sleep(POLL_S)
    raise Failure(f"{what} is not ready after {timeout_s} s ({last}); last words of {program.name}:\n  {program.last_words()}")


def get(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=HTTP_TIMEOUT_S) as answer:
        return answer.read().decode()


def put(port, path, body=b"", method="PUT"):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body, method=method)
    with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as answer:
        return answer.read().decode()


def is_listening(port):
    """Whether something listens on the port, without connecting: a connection would disturb iperf3, and count."""
    wanted = f"0100007F:{port:04X}"
    lines = pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1] == wanted and line.split()[3] == "0A" for line in lines)


def secret(path, text):
    """Writes what only we may read, in one step, so that a reader sees the old or the new."""
    part = path.with_name(f".{path.name}.part")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="ascii") as file:
        file.write(text)
    part.rename(path)


def first_line(*command):
    """The first line that a command prints, or None when it fails or is not there."""
    try:
        done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    lines = (done.stdout + done.stderr).strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
