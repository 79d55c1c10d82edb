"""Workers are changed while they are members: by an operator, and by other settings."""

import dataclasses
from typing import Any

import pytest
from control_doubles import GOOD, ScriptedWorker, server_info, until
from control_house import House
from test_control_membership import A, B, C, run

from sglfast._workers import DRAINING, READY
from sglfast.config import ServeConfig
from sglfast.control.membership import LeavingError
from sglfast.control.worker_spec import WorkerChange


def test_maintenance_and_back_whatever_the_health_says() -> None:
    async def test(made: House) -> None:
        async with ScriptedWorker({"/health": [GOOD], "/server_info": [server_info()]}) as worker:
            member = made.add(worker.url)
            await until(lambda: made.table.state(0) == READY, "ready")
            made.members.change(member, WorkerChange(state="draining"))
            assert made.table.state(0) == DRAINING
            checks = worker.hits["/health"]
            await until(lambda: worker.hits["/health"] > checks + 2, "it is checked on")
            assert (made.table.state(0), made.workers.health(0)) == (DRAINING, READY)
            made.members.change(member, WorkerChange(state="ready"))
            assert made.table.state(0) == READY
            made.members.change(member, WorkerChange(priority=9))
            assert member.spec.priority == 9
            assert "'fields': 'priority'" in made.seen.text

    run(test)


def test_a_key_is_used_at_the_next_check_and_never_said() -> None:
    async def test(made: House) -> None:
        member = made.add(A)
        assert made.workers.view(0).record.api_key == "sk-flag"
        made.members.change(member, WorkerChange(api_key="sk-own"))
        assert made.workers.view(0).record.api_key == "sk-own"
        made.members.change(member, WorkerChange(api_key=""))
        assert made.workers.view(0).record.api_key == "sk-flag"
        assert "sk-" not in made.seen.text

    run(test, worker_api_key="sk-flag")


def test_a_worker_that_leaves_cannot_be_changed() -> None:
    async def test(made: House) -> None:
        member = made.add(A)
        made.begin(member)
        made.members.remove(member)
        with pytest.raises(LeavingError, match="is being removed"):
            made.members.change(member, WorkerChange(state="ready"))
        made.end(0)
        await made.until_gone(member)

    run(test)


def test_other_settings_change_workers_rules_and_the_list() -> None:
    async def test(made: House) -> None:
        for url in (A, B):
            made.add(url)
        posted = made.add(C)
        made.members.apply(ServeConfig(worker_urls=(B, "http://127.0.0.1:4"), worker_api_key="sk-2", health_check_interval_secs=0.3))
        gone = made.members.by_url(A)
        assert gone is not None
        assert gone.is_leaving
        await made.until_gone(gone)
        assert sorted(member.spec.url for member in made.members.members) == [B, C, "http://127.0.0.1:4"]
        assert made.members.by_url(C) is posted, "who was not in the flags is none of their business"
        assert {view.record.api_key for view in made.workers.views} == {"sk-2"}

    run(test, worker_urls=(A, B))


def test_other_settings_change_what_workers_are_there_for() -> None:
    async def test(made: House) -> None:
        def apply(**changes: Any) -> None:
            made.config = dataclasses.replace(made.config, **changes)
            made.members.apply(made.config)

        def roles() -> list[tuple[str, str, int | None]]:
            return sorted((view.record.url, view.record.role, view.record.bootstrap_port) for view in made.workers.views)

        apply(worker_urls=(A,), prefill=(f"{B} 9000",), decode=(C,))
        await until(lambda: roles() == [(A, "regular", None), (B, "prefill", 9000), (C, "decode", None)], "all are there")
        kept = made.members.by_url(C)
        apply(prefill=(f"{B} none",), worker_urls=())
        await until(lambda: roles() == [(B, "prefill", None), (C, "decode", None)], "another port is another worker")
        assert made.members.by_url(C) is kept
        apply(prefill=(), decode=(B,))
        await until(lambda: roles() == [(B, "decode", None)], "another role, too")

    run(test)
