"""PostgreSQL, for Airflow's metadata and for the warehouse, and Redis: on loopback, each behind a sidecar of its own."""

from __future__ import annotations

import csv
import io
import os
import secrets
import subprocess
from pathlib import Path

from e2e.machine import PATH, Machine, wait

POSTGRES, REDIS = 25433, 26380
TRUTH = """
create table truth (at timestamptz not null default clock_timestamp(), dag text, task text, run text, try int, map_index int,
                    how text, port int);
create table stop (run text);
grant all on truth, stop to etl;
"""


class Postgres:
    """One server with the databases `airflow` and `warehouse`, and a user for each."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.bin = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
        self.passwords = {user: secrets.token_hex(12) for user in ("postgres", "airflow", "etl")}
        folder = machine.scratch / "postgres"
        folder.mkdir()
        (folder / "password").write_text(self.passwords["postgres"])
        subprocess.run(["chown", "-R", "postgres", str(folder)], check=True)
        init = f"initdb -D {folder}/data -A scram-sha-256 -U postgres -N --pwfile {folder}/password"
        machine.run("initdb", self._command(init), user="postgres")
        options = [
            f"-p{POSTGRES}",
            "-clisten_addresses=127.0.0.1",
            f"-cunix_socket_directories={folder}",
            "-cfsync=off",
            "-cmax_connections=200",
            "-clog_connections=on",
        ]
        self.process = machine.start("postgres", [self.bin / "postgres", "-D", folder / "data", *options], user="postgres")
        wait("PostgreSQL is ready", 20, lambda: self.query("select 1") == [["1"]])
        for user, database in (("airflow", "airflow"), ("etl", "warehouse")):
            self.query(f"create user {user} password '{self.passwords[user]}'")
            self.query(f"create database {database} owner {user}")
        self.query(TRUTH, "warehouse")

    def query(self, sql: str, database: str = "postgres") -> list[list[str]]:
        """Straight to the server, past the mesh: what is asked here is the other side's word."""
        words = f"psql -h 127.0.0.1 -p {POSTGRES} -U postgres -d {database} -v ON_ERROR_STOP=1 --csv -t -q -c"
        command = [*self._command(words), sql]
        env = {"PATH": PATH, "PGPASSWORD": self.passwords["postgres"]}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        if done.returncode != 0:
            raise RuntimeError(f"{sql}: {done.stderr}")
        return list(csv.reader(io.StringIO(done.stdout)))

    def _command(self, words: str) -> list[str]:
        """A program of the server's own version."""
        return [f"{self.bin}/{word}" if at == 0 else word for at, word in enumerate(words.split())]

    def fresh(self) -> None:
        """Empties both databases for the next deployment."""
        self.query("drop database airflow with (force)")
        self.query("create database airflow owner airflow")
        self.query("truncate truth, stop", "warehouse")


class Redis:
    """The broker, with a password."""

    def __init__(self, machine: Machine) -> None:
        self.password = secrets.token_hex(12)
        folder = machine.scratch / "redis"
        folder.mkdir()
        os.chown(folder, machine.user.pw_uid, machine.user.pw_gid)
        options = [
            "--port",
            str(REDIS),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--dir",
            str(folder),
            "--requirepass",
            self.password,
        ]
        self.process = machine.start("redis", ["redis-server", *options], user=machine.user.pw_name)
        wait("Redis is ready", 10, lambda: "PONG" in self._cli("ping"))

    def fresh(self) -> None:
        """Forgets everything."""
        self._cli("flushall")

    def _cli(self, *words: str) -> str:
        command = ["redis-cli", "-p", str(REDIS), *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env={"PATH": PATH, "REDISCLI_AUTH": self.password}
        ).stdout
