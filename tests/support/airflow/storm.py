"""Midnight: TASKS tasks of DAGS DAGs start within SECONDS, each registers and makes one call. Says a line a task.

A scheduler forks a supervisor a task, which forks the task; each gives itself the title that Airflow 3.3 gives it."""
import ctypes, json, os, socket, sys, time, uuid

TASKS, DAGS, SECONDS = (int(os.environ[name]) for name in ("TASKS", "DAGS", "SECONDS"))
# Where the kernel reads the command line from; argv was made long enough for any title.
START, END = (int(field) for field in open("/proc/self/stat").read().rsplit(")", 1)[1].split()[45:47])


def retitle(title):
    """Writes over argv, as setproctitle does."""
    assert len(title) < END - START, "argv is too short for a title"
    ctypes.memset(START, 0, END - START)
    ctypes.memmove(START, title.encode(), len(title))


def ask(request):
    with socket.socket(socket.AF_UNIX) as stream:
        stream.settimeout(20)
        stream.connect(os.environ["REGISTRATION"])
        stream.sendall(json.dumps({"version": 1, **request}).encode() + b"\n")
        return json.loads(stream.makefile().readline())


def task(number, instance):
    start = time.monotonic()
    claim = {"op": "register", "instance": instance, "dag": f"dag_{number % DAGS}", "task": f"t{number}", "run": "scheduled__x", "try": 1}
    registered = ask(claim)
    told = time.monotonic()
    try:
        with socket.create_connection(("127.0.0.1", int(os.environ["PORT"])), timeout=30) as stream:
            stream.sendall(b"hello")
            answer = b""
            while len(answer) < 5 and (piece := stream.recv(5)):
                answer += piece
    except OSError as error:
        answer = type(error).__name__.encode()
    line = {"number": number, "registered": registered, "answer": answer.decode(), "register_ms": (told - start) * 1e3, "first_byte_ms": (time.monotonic() - told) * 1e3}
    os.write(1, json.dumps(line).encode() + b"\n")


def supervise(number, instance):
    pid = os.fork()
    if pid == 0:
        retitle(f"airflow worker -- {instance}")
        task(number, instance)
        os._exit(0)
    os.waitpid(pid, 0)


retitle("airflow scheduler")
begin, children = time.monotonic(), []
for number in range(TASKS):
    time.sleep(max(0, begin + SECONDS * number / TASKS - time.monotonic()))
    instance = str(uuid.uuid4())
    pid = os.fork()
    if pid == 0:
        retitle(f"airflow worker -- LocalExecutor: {instance}")
        supervise(number, instance)
        os._exit(0)
    children.append(pid)
for pid in children:
    os.waitpid(pid, 0)
