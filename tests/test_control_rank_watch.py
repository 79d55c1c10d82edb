"""Refusals of ranks, as shards count them: who is asked again, and how often at most."""

from control_doubles import remembering_log
from shared_memory import shared_segment
from test_control_workers import facts, spoken

from sglfast._counters import W_RANK_REFUSED, Column
from sglfast._workers import WorkerTable
from sglfast.control.rank_watch import PAUSE_S, RankWatch
from sglfast.control.workers import Workers


def test_once_for_many_refusals_and_once_in_a_while() -> None:
    with shared_segment(max_shards=2) as (_, segment):
        log, seen = remembering_log()
        workers = Workers(WorkerTable(segment), 64, log)
        asked: list[int] = []
        watch = RankWatch(segment, workers, asked.append, log)
        columns = [Column(segment, shard) for shard in range(2)]
        for number in range(3):
            workers.register(f"http://w{number}")
        for idx in (0, 1):
            workers.learn(idx, spoken(facts(ranks=4, rank_ways="hhr")))

        def look(at_s: float, *refusals: int) -> list[int]:
            for idx in refusals:
                columns[idx % 2].add_worker(idx, W_RANK_REFUSED)
            watch.look(at_s)
            found = asked[:]
            asked.clear()
            return found

        columns[0].add_worker(0, W_RANK_REFUSED)  # of the slot's former worker
        assert look(10.0) == []
        assert look(10.1, 1, 1, 1) == [1]
        assert look(10.2) == []
        assert look(10.3, 0, 2) == [0], "who is told no rank refuses none"
        assert look(10.2 + PAUSE_S / 2, 1) == []
        assert look(10.1 + PAUSE_S) == [1], "it is not forgotten meanwhile"
        assert look(20.0) == []
        assert look(20.1, 0, 1) == [0, 1]
        workers.learn(0, spoken(facts(ranks=1, rank_ways="hhr")))
        assert look(25.0, 0) == [0], "shards wait for that, also when it has been asked just now"
        workers.remove(1)
        assert look(30.0, 1) == []
        assert seen.text.count("refuses a data-parallel rank") == 6
