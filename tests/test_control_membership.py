"""Workers come, drain, go and come again, while shards and index are slow, quick or dead; what is left of them each time."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from control_doubles import until
from control_house import House, house

from sglfast import _counters as words
from sglfast._counters import Totals
from sglfast._workers import DRAINING, JOINING
from sglfast.control.membership import WAITING, AlreadyMemberError
from sglfast.control.worker_spec import WorkerChange
from sglfast.control.workers import TableFullError

A, B, C = (f"http://127.0.0.1:{port}" for port in (1, 2, 3))  # nothing listens there


def run(test: Callable[[House], Awaitable[None]], **settings: Any) -> None:
    async def inside() -> None:
        async with house(**settings) as made:
            await test(made)

    asyncio.run(inside())


def test_a_worker_joins_and_is_found_by_id_and_by_url() -> None:
    async def test(made: House) -> None:
        member = made.add(A, model_id="given", api_key="sk-1")
        assert made.members.by_id(member.worker_id) is member
        assert made.members.by_url(A) is member
        assert made.members.by_url(B) is None
        assert made.members.by_id("x") is None
        view = made.workers.view(member.worker_idx)
        assert (view.record.model, view.record.api_key, view.state) == ("given", "sk-1", JOINING)
        assert "sk-1" not in made.seen.text
        assert made.seen.text.count("worker added") == 1

    run(test)


def test_the_same_server_twice_is_refused_whatever_its_url_looks_like() -> None:
    async def test(made: House) -> None:
        member = made.add("http://host:80")
        for url in ("http://host:80", "http://host"):
            with pytest.raises(AlreadyMemberError, match="already exists") as caught:
                made.add(url)
            assert caught.value.member is member
        made.add("http://host:81")
        assert made.members.changes.additions["duplicate"] == 2

    run(test)


def test_a_full_table_refuses_and_has_room_again_after_a_removal() -> None:
    async def test(made: House) -> None:
        first = made.add(A)
        made.add(B)
        with pytest.raises(TableFullError, match="--max-workers 2"):
            made.add(C)
        assert [member.spec.url for member in made.members.members] == [A, B]
        made.members.remove(first)
        await made.until_released(0)
        again = made.add(C)
        assert again.worker_idx == 0
        assert made.workers.view(0).generation == 2

    run(test, max_workers=2)


def test_a_worker_is_drained_before_it_goes() -> None:
    async def test(made: House) -> None:
        member = made.add(A)
        made.begin(member, shard=0)
        made.begin(member, shard=1)
        made.members.remove(member)
        assert made.table.state(0) == DRAINING
        made.members.remove(member)  # once more changes nothing
        made.end(0, shard=0)
        await asyncio.sleep(0.1)
        assert made.members.by_id(member.worker_id) is member, "one request is left"
        assert made.members.inflight(member) == 1
        made.end(0, shard=1)
        await made.until_gone(member)
        assert made.table.read(0) is None
        assert made.members.changes.removals == {"drained": 1}
        assert "worker removed {'worker': 'http://127.0.0.1:1'" in made.seen.text
        assert made.seen.text.count("worker is being removed") == 1

    run(test)


def test_no_worker_goes_while_a_shard_may_still_give_it_a_request() -> None:
    async def test(made: House) -> None:
        made.sees = {0, 1}  # shard 1 is in the middle of a choice, by the table as it was
        member = made.add(A)
        made.members.remove(member)
        await asyncio.sleep(0.1)
        assert made.members.by_id(member.worker_id) is member
        made.begin(member, shard=1)  # there it comes
        made.sees = {0, 1, 2}
        await asyncio.sleep(0.1)
        assert made.members.by_id(member.worker_id) is member
        made.end(0, shard=1)
        await made.until_gone(member)
        assert made.members.changes.removals == {"drained": 1}

    run(test)


def test_a_dead_shard_holds_nobody_up() -> None:
    async def test(made: House) -> None:
        made.sees = {0, 1}
        member = made.add(A)
        made.begin(member, shard=1)
        made.members.remove(member)
        await asyncio.sleep(0.05)
        assert made.members.by_id(member.worker_id) is member
        Totals(made.segment).retire(1)  # as the supervisor does
        made.segment.process_died(2)
        await made.until_gone(member)
        await made.until_released(0)

    run(test)


@pytest.mark.parametrize("when", ["at once", "while it drains"])
def test_a_forced_removal_does_not_wait_and_its_slot_is_not_given_away_before_the_last_request_ends(when: str) -> None:
    async def test(made: House) -> None:
        member = made.add(A)
        made.begin(member)
        if when == "while it drains":
            made.members.remove(member)
            await asyncio.sleep(0.05)
        made.members.remove(member, is_forced=True)
        await made.until_gone(member)
        assert made.members.changes.removals == {"cut": 1}
        assert "'cut_requests': 1" in made.seen.text
        await asyncio.sleep(0.1)
        other = made.add(B)
        assert other.worker_idx == 1, "slot 0 still counts a request"
        made.end(0)
        await made.until_released(0)
        assert made.loads.requests(0) == made.loads.tokens(0) == 0

    run(test)


def test_the_drain_timeout_cuts() -> None:
    async def test(made: House) -> None:
        member = made.add(A)
        made.begin(member)
        made.members.remove(member)
        await made.until_gone(member)
        assert made.members.changes.removals == {"cut": 1}
        made.end(0)
        await made.until_released(0)

    run(test, worker_drain_timeout_secs=0.1)


def test_an_index_that_is_late_keeps_the_ranks_for_a_while() -> None:
    async def test(made: House) -> None:
        made.sees = {1, 2}
        member = made.add(A)
        made.members.remove(member)
        await made.until_gone(member)
        await asyncio.sleep(0.1)
        assert made.workers._ranks.free == 63, "the rank may still have blocks in the tree"
        made.sees = {0, 1, 2}
        await made.until_released(0)
        assert made.workers._ranks.free == 64

    run(test)


def test_counters_begin_anew_for_the_next_worker_of_a_slot() -> None:
    async def test(made: House) -> None:
        member = made.add(A)
        made.begin(member)
        made.end(0)
        assert made.totals.of(0)[words.W_OK] == made.totals.of(0)[words.W_REQUESTS] == 1
        made.members.remove(member)
        await made.until_released(0)
        other = made.add(B)
        assert other.worker_idx == 0
        assert made.totals.of(0) == [0] * len(made.totals.of(0))
        made.begin(other, shard=1)
        row = made.totals.of(0)
        assert (row[words.W_INFLIGHT_REQUESTS], row[words.W_INFLIGHT_TOKENS], row[words.W_REQUESTS], row[words.W_OK]) == (1, 100, 1, 0)
        made.end(0, shard=1)
        Totals(made.segment).retire(1)  # a shard's death moves counts, it makes none
        assert made.totals.of(0)[words.W_OK] == 1

    run(test)


# ---- the same URL again ----


def test_a_url_that_is_added_during_its_removal_waits_for_its_end() -> None:
    async def test(made: House) -> None:
        first = made.add(A)
        made.begin(first)
        made.members.remove(first)
        second = made.add(A, model_id="m2", priority=1)
        assert second.worker_idx == WAITING
        assert made.members.by_url(A) is second
        assert made.members.by_id(first.worker_id) is first
        assert [member.worker_id for member in made.members.members] == [first.worker_id, second.worker_id]
        with pytest.raises(AlreadyMemberError) as caught:
            made.add(A)
        assert caught.value.member is second
        made.members.change(second, WorkerChange(priority=3, state="draining"))
        made.end(0)
        await until(lambda: second.worker_idx != WAITING, "it joins")
        assert second.worker_idx == 0
        view = made.workers.view(0)
        assert (view.generation, view.record.model, view.state) == (2, "m2", DRAINING)
        assert second.spec.priority == 3
        assert made.members.by_id(first.worker_id) is None

    run(test, max_workers=1)


def test_a_worker_that_waits_can_be_removed_again() -> None:
    async def test(made: House) -> None:
        first = made.add(A)
        made.begin(first)
        made.members.remove(first)
        second = made.add(A)
        made.members.remove(second)
        assert made.members.by_id(second.worker_id) is None
        assert made.members.by_url(A) is first
        third = made.add(A)
        made.end(0)
        await until(lambda: third.worker_idx == 0, "the third joins")
        assert made.members.changes.removals == {"waiting": 1, "drained": 1}

    run(test)


def test_a_url_has_one_owner_even_while_the_slot_of_the_last_one_is_still_busy() -> None:
    async def test(made: House) -> None:
        first = made.add(A)
        made.begin(first)
        made.members.remove(first, is_forced=True)
        await made.until_gone(first)
        second = made.add(A)  # the first one is gone for the operator, its slot is not
        assert second.worker_idx == WAITING
        made.members.remove(second)
        assert made.members.by_url(A) is None
        third = made.add(A)
        made.end(0)
        await until(lambda: third.worker_idx == 0, "the third joins")
        assert [member.worker_id for member in made.members.members] == [third.worker_id]
        assert made.members.by_url(A) is third

    run(test)


# ---- all at once ----


def test_random_comings_and_goings_lose_nothing(rng: random.Random) -> None:
    """Slots, ranks, counters and tasks are all back after 400 random steps with requests in between."""

    async def test(made: House) -> None:
        urls = [f"http://127.0.0.1:{port}" for port in range(1, 6)]
        busy: list[tuple[int, int]] = []
        for _ in range(400):
            step = rng.random()
            members = list(made.members.members)
            if step < 0.35:
                with contextlib.suppress(AlreadyMemberError, TableFullError):
                    made.add(rng.choice(urls))
            elif step < 0.6 and members:
                made.members.remove(rng.choice(members), is_forced=rng.random() < 0.3)
            elif step < 0.8:
                there = [member for member in members if member.worker_idx != WAITING and not member.is_leaving]
                if there:
                    member, shard = rng.choice(there), rng.randrange(2)
                    made.begin(member, shard)
                    busy.append((member.worker_idx, shard))
            elif busy:
                made.end(*busy.pop(rng.randrange(len(busy))))
            else:
                await asyncio.sleep(0.003)
            taken = [member.worker_idx for member in made.members.members if member.worker_idx != WAITING]
            assert len(taken) == len(set(taken))
            places = [member.spec.url for member in made.members.members if not member.is_leaving]
            assert len(places) == len(set(places))
        for member in made.members.members:
            made.members.remove(member)
        while busy:
            made.end(*busy.pop())
        await until(lambda: len(made.workers._free_slots) == 4 and not made.members.members, f"all is free\n{made.seen.text}")
        assert made.workers._ranks.free == 64
        assert made.watch.size == 0
        assert [made.loads.requests(idx) for idx in range(4)] == [0] * 4

    run(test)


def test_close_in_the_middle_of_removals_leaves_no_task() -> None:
    async def test(made: House) -> None:
        member = made.add(A)
        made.begin(member)
        made.members.remove(member)
        await asyncio.sleep(0.02)

    run(test)
