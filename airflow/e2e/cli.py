"""The command line."""

from __future__ import annotations

import argparse
import signal
import sys

from e2e import install, story
from e2e.machine import Failure, Machine
from e2e.report import Report

EXAMPLES = """\
examples:
  scripts/airflow-e2e                                 everything: Airflow 3.3 and 2.11, LocalExecutor and CeleryExecutor
  scripts/airflow-e2e --ci                            the part that CI runs: 3.3, LocalExecutor, the two DAGs and the intention
  scripts/airflow-e2e --airflow 3.3 --executor celery --keep

It needs root on a Debian 12 machine with cgroup v2 and io_uring, and installs what is missing: Consul, PostgreSQL and Redis by
scripts/setup, Airflow into RINGFENCE_CACHE (default /var/cache/ringfence). RINGFENCE_BINARY names another ringfence than
target/release/ringfence. Everything else lives in a scratch folder, in a network of its own, and ends with this command.
Airflow runs as a user without rights (ringfence-e2e-PID, made for the run).

exit code: 0 all ok, 1 a check failed, 69 it could not be run to its end
"""


def main() -> int:
    """Runs what was asked for."""
    arguments = _arguments()
    report = Report(arguments.json)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
    plan = story.Plan.of(arguments.airflow, arguments.executor, arguments.ci)
    machine = None
    try:
        machine = Machine(arguments.keep, report.say)
        report.say(f"scratch: {machine.scratch}")
        story.tell(machine, report, plan)
    except (Failure, RuntimeError, OSError) as error:
        report.check("it ran to its end", False, str(error))
        report.finish(plan.in_words())
        return 69
    except KeyboardInterrupt:
        return 130
    finally:
        if machine is not None:
            machine.end()
    report.finish(plan.in_words())
    return 0 if report.passed() else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/airflow-e2e",
        description=__doc__
        and "Runs real Airflow behind ringfence in a real Consul mesh and checks what each task could reach, as whom.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--airflow", choices=[*install.VERSIONS, "both"], default="both", help="which Airflow (default: both)")
    parser.add_argument(
        "--executor", choices=["local", "celery", "both"], default="both", help="which executor (default: both)"
    )
    parser.add_argument("--ci", action="store_true", help="Airflow 3.3, LocalExecutor, without restart and rotation")
    parser.add_argument("--keep", action="store_true", help="keep the scratch folder with all logs")
    parser.add_argument(
        "--json", action="store_true", help="the result as one JSON object on standard output, progress on standard error"
    )
    return parser.parse_args()
