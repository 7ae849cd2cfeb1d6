"""A trigger speaks as its own task where ringfence leases addresses, and as the triggerer where it does not."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
from dataclasses import replace
from types import SimpleNamespace

import airflow
import pytest

from airflow_ringfence import doctor, leases, secrets
from airflow_ringfence.client import Refused, Route, TaskTry, Unreachable
from airflow_ringfence.secrets import RingfenceSecretsBackend

AIRFLOW_3 = not airflow.__version__.startswith("2.")
TRIGGERS_TELL = AIRFLOW_3 and tuple(map(int, airflow.__version__.split(".")[:2])) >= (3, 2)
TI = "01a20359-e6c5-7c3e-8c3a-0d2b8f5f2a10"
RUN = "scheduled__2026-11-24T00:00:00+00:00"
TRY = TaskTry("3.3.2", TI, "payroll", "wait", RUN, 1, -1, "task")
COMMON = Route("warehouse", address="127.0.0.1", port=25435)
URI = "postgres://etl@warehouse.virtual.consul:5432/dw"
REFUSED = {"ok": False, "error": "component airflow-triggerer may not lease", "remedy": "add leases = true"}


@pytest.fixture
def clock(monkeypatch):
    """The time of leases, and of nothing else."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.fixture
def trigger(monkeypatch):
    """This thread is a trigger's."""
    monkeypatch.setattr(secrets, "of_trigger", lambda: TRY)
    monkeypatch.setattr(doctor, "of_trigger", lambda: TRY)


@pytest.fixture
def refusing_by_exception(monkeypatch):
    class Denied(PermissionError):
        pass

    monkeypatch.setattr(secrets, "AccessDenied", Denied)
    return Denied


def connection(monkeypatch, uri=URI):
    monkeypatch.setenv("AIRFLOW_CONN_DW", uri)
    return RingfenceSecretsBackend().get_connection("dw")


def address(found):
    return found.host, found.port


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == leases.__name__]


def test_a_triggers_connection_leads_to_its_own_address(ringfence, monkeypatch, trigger, caplog):
    assert address(connection(monkeypatch)) == ("127.90.1.2", 15006)
    assert ringfence.operations() == ["routes", "lease"]
    asked = ringfence.requests[1]
    assert (asked["upstream"], asked["dag"], asked["instance"], asked["try"]) == ("warehouse", "payroll", TI, 1)
    assert not said(caplog)


def test_a_verified_certificate_keeps_its_name(ringfence, monkeypatch, trigger):
    found = connection(monkeypatch, f"{URI}?sslmode=verify-full")
    assert address(found) == ("warehouse.virtual.consul", 15006)
    assert found.extra_dejson == {"sslmode": "verify-full", "hostaddr": "127.90.1.2"}


def test_a_url_keeps_its_form_and_the_upstream_its_spelling(ringfence, monkeypatch, trigger):
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", json.dumps({"conn_type": "http", "host": "https://lake.virtual.consul/v1"}))
    assert RingfenceSecretsBackend().get_connection("lake").host == "https://127.90.1.2:15006/v1"
    assert ringfence.requests[-1]["upstream"] == "Lake"


@pytest.mark.parametrize(
    ("uri", "routes", "leads_to"),
    [
        ("postgres://u@ledger.virtual.consul/db", {}, ("/run/mesh/ledger", 5432)),
        ("postgres://u@db.example.com/db", {"db.example.com": "127.0.0.1:6000"}, ("127.0.0.1", 6000)),
        ("postgres://u@db.example.com/db", {}, ("db.example.com", None)),
    ],
)
def test_unix_sockets_fixed_addresses_and_other_hosts_need_no_lease(ringfence, monkeypatch, trigger, uri, routes, leads_to):
    monkeypatch.setenv("AIRFLOW_CONN_DW", uri)
    assert address(RingfenceSecretsBackend(routes=routes).get_connection("dw")) == leads_to
    assert "lease" not in ringfence.operations()


def test_outside_of_triggers_nothing_changes(ringfence, monkeypatch):
    assert address(connection(monkeypatch)) == ("127.0.0.1", 25435)
    assert ringfence.operations() == ["routes"]


def test_without_leases_a_trigger_speaks_as_the_triggerer_and_the_log_says_so_once(
    ringfence, monkeypatch, trigger, caplog, clock
):
    ringfence.answers["lease"] = REFUSED
    for _ in range(3):
        assert address(connection(monkeypatch)) == ("127.0.0.1", 25435)
        clock.seconds += leases.RETRY_SECONDS
    assert ringfence.operations().count("lease") == 3
    (text,) = said(caplog)
    assert "triggers speak as the triggerer: component airflow-triggerer may not lease: add leases = true." in text


def test_a_task_without_identity_keeps_its_own_address_and_is_told_once(ringfence, monkeypatch, trigger, caplog, clock):
    ringfence.answers["lease"].update(identity=None, denied="no rule matches", remedy="add a rule")
    for _ in range(2):
        assert address(connection(monkeypatch)) == ("127.90.1.2", 15006)
        clock.seconds += leases.FRESH_SECONDS
    assert said(caplog) == [
        "ringfence: the rules give the trigger of payroll.wait no mesh identity: no rule matches: add a rule"
    ]


def test_with_ringfence_away_a_trigger_is_refused(ringfence, monkeypatch, trigger, refusing_by_exception, caplog):
    assert address(connection(monkeypatch)) == ("127.90.1.2", 15006)
    leases.forget()
    ringfence.close()
    with pytest.raises(refusing_by_exception, match=r"'dw' names .*, and ringfence leases no address .*no socket"):
        connection(monkeypatch)
    assert not said(caplog)


def test_an_answer_holds_thirty_seconds_for_one_task_and_one_upstream(ringfence, clock):
    def count(task=TRY, upstream="warehouse"):
        leases.leased(task, upstream)
        return ringfence.operations().count("lease")

    assert [count(), count()] == [1, 1]
    assert [count(replace(TRY, try_number=2)), count(replace(TRY, map_index=0)), count(upstream="lake")] == [2, 3, 4]
    clock.seconds += leases.FRESH_SECONDS - 1
    assert count() == 4
    clock.seconds += 1
    assert count() == 5
    assert len(leases._kept) == 1, "what is old has gone"
    assert leases.FRESH_SECONDS <= 30


def test_a_refusal_holds_a_second_and_for_its_own_task_only(ringfence, clock):
    ringfence.answers["lease"] = REFUSED
    for _ in range(3):
        with pytest.raises(Refused, match="may not lease: add leases = true"):
            leases.leased(TRY, "warehouse")
    assert ringfence.operations() == ["lease"]
    ringfence.answers["lease"] = {"ok": True, "address": "127.90.1.3", "port": 15006}
    assert leases.leased(replace(TRY, try_number=2), "warehouse").route.address == "127.90.1.3"
    clock.seconds += 1
    assert leases.leased(TRY, "warehouse").route.address == "127.90.1.3"


def test_silence_holds_a_second_for_everybody(ringfence, clock):
    ringfence.answers["lease"] = b"not json\n"
    for upstream in ("warehouse", "lake", "warehouse"):
        with pytest.raises(Unreachable, match="not a JSON object"):
            leases.leased(TRY, upstream)
    assert ringfence.operations() == ["lease"]
    clock.seconds += 1
    with pytest.raises(Unreachable):
        leases.leased(TRY, "lake")
    assert ringfence.operations() == ["lease"] * 2


def test_threads_that_start_together_ask_once(ringfence):
    gate = threading.Barrier(8)

    def look_up():
        gate.wait()
        leases.leased(TRY, "warehouse")

    threads = [threading.Thread(target=look_up) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ringfence.operations() == ["lease"]


def test_a_request_that_is_too_long_is_no_reason_to_fail(ringfence, caplog):
    assert leases.own_route(replace(TRY, run="x" * 20_000), COMMON) == COMMON
    assert len(said(caplog)) == 1


def test_a_forked_child_asks_for_itself(ringfence):
    leases.leased(TRY, "warehouse")
    with leases._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if not leases._kept and leases._lock.acquire(blocking=False) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert leases._kept


def test_doctor_tells_in_a_trigger_whether_it_has_its_own_address(ringfence, trigger, clock):
    def found():
        return [(finding.result, finding.text) for finding in doctor.examine() if finding.check == "leases"]

    assert found() == [("ok", "this trigger of payroll.wait speaks as airflow-payroll (rule payroll) at 127.90.1.2:15006")]
    clock.seconds += leases.FRESH_SECONDS
    ringfence.answers["lease"].update(identity=None, denied="no rule")
    assert found() == [("hint", "this trigger of payroll.wait has an address of its own and no identity (no rule)")]
    clock.seconds += leases.FRESH_SECONDS
    ringfence.answers["lease"] = REFUSED
    ((result, text),) = found()
    assert result == "warning"
    assert text.endswith("speak as the triggerer: component airflow-triggerer may not lease: add leases = true")


def test_doctor_says_nothing_of_leases_elsewhere(ringfence):
    assert [finding for finding in doctor.examine() if finding.check == "leases"] == []
    assert "lease" not in ringfence.operations()


@pytest.mark.skipif(not AIRFLOW_3, reason="triggers of Airflow 2 tell nothing")
def test_airflows_own_triggerer_tells_each_trigger_apart(ringfence, monkeypatch, caplog):
    """Two triggers run at once in Airflow's `run_trigger`; each looks its Connection up in all three ways."""
    from airflow.jobs.triggerer_job_runner import TriggerRunner
    from airflow.triggers.base import BaseTrigger, TriggerEvent

    caplog.set_level(logging.INFO)
    monkeypatch.setenv("AIRFLOW_CONN_DW", URI)
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", "http://lake.virtual.consul/")
    together = asyncio.Event()

    class Waits(BaseTrigger):
        def serialize(self):
            return "tests.Waits", {}

        async def run(self):
            if self.trigger_id == 2:
                together.set()
            await together.wait()
            backend = RingfenceSecretsBackend()
            ways = await backend.aget_connection("dw"), await asyncio.to_thread(backend.get_connection, "dw")
            yield TriggerEvent([address(found) for found in (*ways, backend.get_connection("lake"))])

    def of(trigger_id):
        trigger = Waits()
        trigger.trigger_id = trigger_id
        trigger.task_instance = SimpleNamespace(
            id=TI, dag_id=f"dag{trigger_id}", task_id="wait", run_id=RUN, try_number=1, map_index=-1, context_carrier=None
        )
        return trigger

    async def main():
        runner = TriggerRunner()
        runner.triggers = {number: {"name": str(number), "events": 0, "is_watcher": False} for number in (1, 2)}
        await asyncio.gather(*(asyncio.create_task(runner.run_trigger(number, of(number))) for number in (1, 2)))
        return list(runner.events)

    events = asyncio.run(main())
    asked = sorted((request["dag"], request["upstream"]) for request in ringfence.requests if request["op"] == "lease")
    if TRIGGERS_TELL:
        assert asked == [("dag1", "Lake"), ("dag1", "warehouse"), ("dag2", "Lake"), ("dag2", "warehouse")]
        leads_to = [("127.90.1.2", 15006)] * 3
    else:
        assert asked == []
        leads_to = [("127.0.0.1", 25435)] * 2 + [("127.0.0.1", 25436)]
    payloads = [getattr(event, "event", None) or event[1] for event in events]
    assert [payload.payload for payload in payloads] == [leads_to] * 2
