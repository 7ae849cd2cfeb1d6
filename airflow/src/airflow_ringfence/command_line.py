"""How the commands are called: as `airflow mesh ...` from Airflow 3.2 on, and as `ringfence-airflow ...` everywhere.

One table describes them for both. Imported whenever the `airflow` command starts: keep it free of imports that cost.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from airflow_ringfence import __version__, commands

GROUP = "mesh"
HELP = "Ask ringfence, the sidecar of this host, about this process, its routes and its denials"
PROGRAM = "ringfence-airflow"
# Airflow 3 gives the children of a task this address of the metadata database, with which `import airflow` itself fails.
DATABASE = "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"
DATABASE_DENIED = "airflow-db-not-allowed:"
DATABASE_EMPTY = "sqlite://"


@dataclass(frozen=True)
class Option:
    """One argument, as argparse takes it."""

    flags: tuple[str, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Command:
    """One command."""

    name: str
    help: str
    run: Callable[[argparse.Namespace], int]
    options: tuple[Option, ...]


JSON = Option(("--json",), {"action": "store_true", "help": "print JSON"})
COMMANDS = (
    Command("whoami", "Who ringfence takes this process for, and its identity", commands.whoami, (JSON,)),
    Command("routes", "The mesh services that this host reaches, and where", commands.routes, (JSON,)),
    Command(
        "explain",
        "Why a connection was denied, or what the rules would give to a task",
        commands.explain,
        (
            Option(("id",), {"nargs": "?", "default": None, "help": "the id of a denial, as its text and the log tell it"}),
            Option(("--dag",), {"help": "a dag_id"}),
            Option(("--task",), {"help": "a task_id"}),
            Option(("--to",), {"help": "the mesh service to be called"}),
            JSON,
        ),
    ),
    Command("doctor", "What is set up for the mesh here, and how to mend what is not", commands.doctor, (JSON,)),
    Command(
        "catalog",
        "Write what Airflow knows of its DAGs to a file for ringfence's rules",
        commands.catalog,
        (Option(("--out",), {"required": True, "help": "the file, as `catalog` in ringfence's rules names it"}), JSON),
    ),
)


def get_airflow_commands() -> list[Any]:
    """The group `mesh`, for Airflow's own command line."""
    from airflow.cli.cli_config import ActionCommand, Arg, GroupCommand

    subcommands = [
        ActionCommand(
            name=command.name,
            help=command.help,
            func=partial(_exit, command),
            args=[Arg(flags=option.flags, **option.settings) for option in command.options],
        )
        for command in COMMANDS
    ]
    return [GroupCommand(name=GROUP, help=HELP, subcommands=subcommands)]


def main(argv: Sequence[str] | None = None) -> int:
    """The script `ringfence-airflow`, which runs inside tasks too."""
    if os.environ.get(DATABASE, "").startswith(DATABASE_DENIED):
        os.environ[DATABASE] = DATABASE_EMPTY
    parser = argparse.ArgumentParser(prog=PROGRAM, description=f"{HELP}.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help, description=f"{command.help}.")
        subparser.set_defaults(run=command.run)
        for option in command.options:
            subparser.add_argument(*option.flags, **option.settings)
    args = parser.parse_args(argv)
    return int(args.run(args))


def _exit(command: Command, args: argparse.Namespace) -> None:
    """Airflow takes no exit status from a command, so a failure ends the process."""
    if status := command.run(args):
        sys.exit(status)
