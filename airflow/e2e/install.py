"""Virtual environments with real Airflow, and the provider of this tree in them.

Caches stay outside the tree, under RINGFENCE_CACHE (default /var/cache/ringfence): e2e-airflow-3.3 and e2e-airflow-2.11.
Half of one is never taken for a whole.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from e2e.machine import Failure

TREE = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("RINGFENCE_CACHE", "/var/cache/ringfence"))
PYTHON = os.environ.get("RINGFENCE_PYTHON", "/usr/bin/python3.11")
UV = "uv==0.13.9"
VERSIONS = {"3.3": "3.3.2", "2.11": "2.11.2"}
# Told by its version: since redis 8.1.0, which it does not take, a resolver goes back to an old one for Airflow 2.11 without
# that bound, and whose worker dies at its start of click 8.3. celery 5.7.0 lacks what this one imports.
CELERY = ["apache-airflow-providers-celery==3.26.0", "celery<5.7"]
PACKAGES = {name: [f"apache-airflow[postgres,celery,redis]=={full}", *CELERY] for name, full in VERSIONS.items()}


def ringfence(say: Callable[[str], None]) -> Path:
    """The binary, built if it is not there."""
    binary = Path(os.environ.get("RINGFENCE_BINARY", TREE / "target/release/ringfence"))
    if not binary.exists():
        say("cargo build --release --locked: a few minutes")
        _run(["cargo", "build", "--release", "--locked"], "ringfence cannot be built")
    return binary


def servers(say: Callable[[str], None]) -> None:
    """Consul, PostgreSQL and Redis, by scripts/setup where they are missing."""
    parts = ["cgroup"] if _is_consul_there() else ["consul", "cgroup"]
    has_postgres = any(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not (has_postgres and all(map(shutil.which, ("redis-server", "setpriv", "ip", "nft")))):
        parts.insert(0, "packages")
    say(f"scripts/setup {' '.join(parts)}")
    _run(["bash", str(TREE / "scripts/setup"), *parts], "scripts/setup failed")


def airflow(name: str, say: Callable[[str], None]) -> Path:
    """The environment of Airflow 3.3 or 2.11, with this tree's provider installed anew."""
    venv, wanted = CACHE / f"e2e-airflow-{name}", " ".join([*PACKAGES[name], UV])
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f".e2e-airflow-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        holds = venv / "holds"
        if not holds.exists() or holds.read_text() != wanted:
            say(f"installing {wanted}")
            shutil.rmtree(venv, ignore_errors=True)
            _run(
                [PYTHON, "-m", "venv", str(venv)],
                f"{PYTHON} cannot make a virtual environment: apt-get install python3.11-venv",
            )
            _run([str(venv / "bin/pip"), "install", "--quiet", "--disable-pip-version-check", UV], "uv cannot be installed")
            # Compiled now: the user that Airflow runs as may not write here, and would compile at every start.
            _pip(venv, ["--compile-bytecode", *PACKAGES[name]])
            holds.write_text(wanted)
        _pip(venv, ["--no-deps", "--reinstall", "--compile-bytecode", str(TREE / "airflow")])
    return venv


def _is_consul_there() -> bool:
    binary = CACHE / "consul-1.8.7/usr/bin/consul"
    return (
        binary.exists() and "1.8.7" in subprocess.run([binary, "version"], capture_output=True, text=True, check=False).stdout
    )


def _pip(venv: Path, arguments: list[str]) -> None:
    command = [str(venv / "bin/uv"), "pip", "install", "--quiet", "--python", str(venv / "bin/python"), *arguments]
    _run(command, f"{' '.join(arguments)} cannot be installed")


def _run(command: list[str], complaint: str) -> None:
    done = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Failure(f"{complaint}:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
