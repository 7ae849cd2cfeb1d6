"""The commands print for people and, with --json, for programs; what goes wrong is a sentence and an exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import airflow
import pytest

from airflow_ringfence.command_line import COMMANDS, get_airflow_commands, main

VERSION = tuple(map(int, airflow.__version__.split(".")[:2]))
DENIAL = {
    "id": "d-7f",
    "identity": "airflow-etl",
    "to": "warehouse",
    "why": "intention deny",
    "remedy": "allow it",
    "cut": False,
}
EXPLANATION = {
    "identity": None,
    "rules": [{"rule": "payroll", "match": False, "failed": "dag"}, {"rule": "rule-2", "match": True}],
    "warnings": [],
}


@pytest.fixture
def admin(monkeypatch):
    """ringfence's admin port with one denial; yields HOST:PORT and the paths that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            known = {"/denials/d-7f": json.dumps(DENIAL), "/denials/page": "<html>"}
            body = known.get(self.path, "").encode()
            self.send_response(500 if self.path.endswith("broken") else 200 if body else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("RINGFENCE_ADMIN", f"http://{address}")
    yield address, asked
    server.shutdown()
    server.server_close()


def test_whoami_prints_what_ringfence_says(ringfence, capsys):
    ringfence.answers["whoami"]["caller"] = {
        "who": "task",
        "dag": "payroll",
        "try": 1,
        "identity": "airflow-payroll",
        "denied": None,
    }
    assert main(["whoami"]) == 0
    assert capsys.readouterr().out == "who: task\ndag: payroll\ntry: 1\nidentity: airflow-payroll\n"
    assert main(["whoami", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["denied"] is None


def test_routes_are_a_table(ringfence, capsys):
    assert main(["routes"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "warehouse  127.0.0.1:25435",
        "Lake       127.0.0.1:25436",
        "ledger     unix:/run/mesh/ledger/.s.PGSQL.5432",
        "queue      unix:/run/mesh/queue.sock",
    ]
    assert main(["routes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0] == {"service": "warehouse", "address": "127.0.0.1", "port": 25435}
    ringfence.answers["routes"]["routes"] = []
    assert main(["routes"]) == 0
    assert capsys.readouterr().out == "no mesh service is reachable from here\n"


def test_explain_tells_what_the_rules_would_give(ringfence, capsys):
    ringfence.answers["explain"] = {"ok": True, "explanation": EXPLANATION}
    assert main(["explain", "--dag", "d", "--task", "t", "--to", "warehouse"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "rules:",
        "  -",
        "    rule: payroll",
        "    match: no",
        "    failed: dag",
        "  -",
        "    rule: rule-2",
        "    match: yes",
        "warnings: none",
    ]
    assert main(["explain", "--json", "--dag", "d", "--task", "t", "--to", "warehouse"]) == 0
    assert json.loads(capsys.readouterr().out) == EXPLANATION


def test_explain_fetches_a_denial_by_its_id(admin, capsys):
    assert main(["explain", "d-7f"]) == 0
    assert capsys.readouterr().out.splitlines()[3:] == ["why: intention deny", "remedy: allow it", "cut: no"]
    assert main(["explain", "d-7f", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == DENIAL


def test_the_admin_port_is_the_one_that_ringfence_names(ringfence, admin, monkeypatch, capsys):
    monkeypatch.delenv("RINGFENCE_ADMIN")
    ringfence.answers["routes"]["admin"] = admin[0]
    assert main(["explain", "d-7f"]) == 0


@pytest.mark.parametrize(
    ("identifier", "says"),
    [
        ("gone", "keeps no denial 'gone'"),
        ("page", "did not answer with JSON"),
        ("broken", "answered 500"),
        ("../x", "keeps no denial"),
    ],
)
def test_a_denial_that_cannot_be_told_is_a_sentence(admin, capsys, identifier, says):
    assert main(["explain", identifier]) == 1
    assert says in capsys.readouterr().err
    assert admin[1][-1].count("/") == 2


def test_an_absent_admin_port_is_a_sentence(socket_path, monkeypatch, capsys):
    monkeypatch.setenv("RINGFENCE_ADMIN", "127.0.0.1:1")
    assert main(["explain", "d-7f"]) == 1
    assert "no answer from ringfence's admin port 127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [[], ["--dag", "d"], ["d-7f", "--dag", "d", "--task", "t", "--to", "s"], ["d-7f", "--to", "s"]]
)
def test_half_a_question_is_a_usage_error(socket_path, capsys, words):
    assert main(["explain", *words]) == 2
    assert "either the ID of a denial, or --dag, --task and --to together" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["whoami", "routes"])
def test_without_ringfence_a_command_fails_with_the_remedy(socket_path, capsys, command):
    assert main([command]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"ringfence: no socket at {socket_path}: start `ringfence connect")


@pytest.mark.parametrize("words", [["--help"], *([command.name, "--help"] for command in COMMANDS)])
def test_every_command_has_help(capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    assert "usage: ringfence-airflow" in capsys.readouterr().out


def test_airflow_gets_the_same_commands():
    (group,) = get_airflow_commands()
    assert group.name == "mesh"
    assert [command.name for command in group.subcommands] == ["whoami", "routes", "explain", "doctor", "catalog"]


def run(*words, **environment):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **environment}
    return subprocess.run(words, env=environment, text=True, capture_output=True, timeout=120, check=False)


def test_the_installed_script_runs(ringfence):
    done = run("ringfence-airflow", "routes")
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "warehouse  127.0.0.1:25435"), done.stderr


def test_doctor_runs_inside_a_task_where_airflow_denies_the_database(ringfence):
    done = run("ringfence-airflow", "doctor", AIRFLOW__DATABASE__SQL_ALCHEMY_CONN="airflow-db-not-allowed:///")
    assert done.returncode == 0, done.stderr
    assert "ok       plugin: Airflow has loaded the listener" in done.stdout
    assert "the database's Connections were not looked at" in done.stdout


@pytest.mark.skipif(VERSION < (3, 2), reason="providers vend commands from Airflow 3.2 on")
def test_airflows_own_command_line_has_the_group(ringfence, socket_path):
    done = run("airflow", "mesh", "routes", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.index("[") :])[0]["service"] == "warehouse"
    ringfence.close()
    done = run("airflow", "mesh", "whoami")
    assert done.returncode == 1
    assert f"ringfence: no socket at {socket_path}" in done.stderr
