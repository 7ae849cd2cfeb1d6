"""One process of an Airflow 3.3 host with LocalExecutor: scheduler, supervisor or task, told apart by STAGE.

Each starts the next with the title that Airflow gives it; the task then runs the test's CODE with the functions below. Read
from stdin, so that the title is the whole command line."""
import json, os, signal, socket, subprocess, sys

SOURCE = os.environ["SOURCE"]
STAGE = os.environ["STAGE"]
INSTANCE = os.environ["INSTANCE"]


def child(title, stage, **more):
    """A child with this title that reads this same file."""
    with open(SOURCE) as source:
        return subprocess.Popen([title], executable="/usr/bin/python3", stdin=source, env={**os.environ, "STAGE": stage, **more})


def say(value):
    print(json.dumps(value), flush=True)


def ask(request):
    """One question on the registration socket."""
    with socket.socket(socket.AF_UNIX) as stream:
        stream.settimeout(5)
        stream.connect(os.environ["REGISTRATION"])
        stream.sendall(json.dumps({"version": 1, **request}).encode() + b"\n")
        return json.loads(stream.makefile().readline())


def register(dag, task="load", run="scheduled__2026-11-24", instance=INSTANCE, **more):
    claim = {"op": "register", "airflow": "3.3.2", "instance": instance, "dag": dag, "task": task, "run": run, "try": 1, "map_index": -1}
    return ask({**claim, **more})


def call(port, message=b"hello", want=None, host="127.0.0.1"):
    """What comes back for `message`, as text; an error's name if none does."""
    try:
        with socket.create_connection((host, int(port)), timeout=20) as stream:
            stream.sendall(message)
            found = b""
            while want is None or len(found) < want:
                piece = stream.recv(65536)
                if not piece:
                    break
                found += piece
            return found.decode("latin-1")
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def echo(port, message=b"hello", host="127.0.0.1"):
    return call(port, message, len(message), host)


def lease(dag, upstream="warehouse", **more):
    """An address for a task that runs in this very process."""
    return ask({"op": "lease", "upstream": upstream, "dag": dag, "task": "wait", "run": "scheduled__x", "try": 1, **more})


def startup(port):
    """How libpq begins: TLS, if the server will; then the startup packet."""
    try:
        with socket.create_connection(("127.0.0.1", int(port)), timeout=20) as stream:
            stream.sendall((8).to_bytes(4, "big") + (80877103).to_bytes(4, "big"))
            if stream.recv(1) != b"N":
                return "no answer to SSLRequest"
            packet = (196608).to_bytes(4, "big") + b"user\0airflow\0\0"
            stream.sendall((len(packet) + 4).to_bytes(4, "big") + packet)
            found = b""
            while piece := stream.recv(65536):
                found += piece
            return found.decode("latin-1")
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def in_child(code):
    """Runs code in a forked child and waits for it."""
    pid = os.fork()
    if pid == 0:
        exec(code, globals())
        sys.stdout.flush()
        os._exit(0)
    os.waitpid(pid, 0)


def in_daemon(code):
    """Runs code in a double-forked child in a session of its own, whose parent is init by then."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if os.fork() == 0:
            while os.getppid() == pid:
                pass
            exec(code, globals())
            sys.stdout.flush()
            os.write(write, b"x")
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write)
    os.read(read, 1)


signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
if STAGE == "scheduler":
    child(f"airflow worker -- LocalExecutor: {INSTANCE}", "supervisor").wait()
elif STAGE == "supervisor":
    child(f"airflow worker -- {INSTANCE}", "task").wait()
elif STAGE == "task":
    exec(os.environ["CODE"], globals())
