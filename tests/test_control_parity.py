"""The judge of the parity loop: quick to distrust, slow to forgive, deaf to a few samples, and it names a cause."""

import json
import logging

import pytest

from sglfast import _counters as words
from sglfast._counters import Column, RankTable
from sglfast._workers import READY, WorkerTable
from sglfast.control.introspect import Findings
from sglfast.control.parity import WINDOW_LOOKS, WINDOW_SAMPLES, Blocks, ParityJudge, ParityWatch, judge_pool
from sglfast.control.parity_cause import Counts
from sglfast.control.workers import Workers
from sglfast.shm import PARITY_HIGH, PARITY_LOW, PARITY_OK, REASON_PAIRS, REASON_SINGLES, WorkerView, create, read_workers
from sglfast.wire.server_info import parse_server_info

INFO = b"""{"served_model_name": "m", "version": "0.5.23", "kv_events": {"publisher": "zmq", "endpoint_host": "*",
"endpoint_port_base": 5557, "topic": "", "block_size": 64, "dp_size": 1}}"""


def test_a_wrong_picture_is_seen_within_50_samples() -> None:
    judge = ParityJudge()
    for n in range(1, 51):
        if judge.feed(Counts(low=n)) == PARITY_LOW:
            break
    assert n <= 50


def test_a_few_samples_and_a_few_misses_mean_nothing() -> None:
    assert ParityJudge().feed(Counts(low=7)) == PARITY_OK
    judge = ParityJudge()
    for n in range(1, 400):
        assert judge.feed(Counts(exact=9 * n, high=n)) == PARITY_OK


def test_trust_comes_back_with_good_samples_and_not_before() -> None:
    judge = ParityJudge()
    assert judge.feed(Counts(high=60)) == PARITY_HIGH
    assert judge.feed(Counts(high=60, exact=20)) == PARITY_HIGH
    for n in range(40, 400, 20):
        judge.feed(Counts(high=60, exact=n))
    assert judge.verdict == PARITY_OK


def pool_of(*windows: Counts) -> list[ParityJudge]:
    judges = [ParityJudge() for _ in windows]
    for judge, counts in zip(judges, windows, strict=True):
        judge.feed(counts)
    judge_pool(judges)
    return judges


def verdicts(*windows: Counts) -> list[int]:
    return [judge.verdict for judge in pool_of(*windows)]


def test_many_workers_with_few_samples_are_judged_together() -> None:
    assert verdicts(*[Counts(low=4)] * 3) == [PARITY_LOW] * 3
    assert verdicts(*[Counts(high=2)] * 6) == [PARITY_HIGH] * 6
    assert verdicts(*[Counts(low=4)] * 2) == [PARITY_OK] * 2, "of so few, nothing can be said"
    assert verdicts(Counts(), Counts(low=1), Counts(low=5), Counts(low=6)) == [PARITY_OK, PARITY_OK, PARITY_LOW, PARITY_LOW]
    assert verdicts(Counts(low=7), Counts(low=7), Counts(exact=5, low=1)) == [PARITY_LOW, PARITY_LOW, PARITY_OK]


def test_what_one_worker_has_long_shown_says_little_of_the_others() -> None:
    assert verdicts(Counts(high=60), Counts(exact=60), Counts(high=2, exact=1)) == [PARITY_HIGH, PARITY_OK, PARITY_OK]
    assert verdicts(Counts(low=60), Counts(low=5)) == [PARITY_LOW, PARITY_LOW]
    assert verdicts(Counts(exact=400), Counts(low=7)) == [PARITY_OK, PARITY_OK]


def test_who_was_judged_by_the_pool_is_trusted_with_it_again_and_by_its_own_samples() -> None:
    judges = pool_of(*[Counts(low=4)] * 4)
    assert judges[0].feed(Counts(low=4, exact=16)) == PARITY_OK
    for judge in judges[1:3]:
        judge.feed(Counts(low=4, exact=400))
    judge_pool(judges)
    assert [judge.verdict for judge in judges] == [PARITY_OK, PARITY_OK, PARITY_OK, PARITY_LOW]
    judges[3].feed(Counts(low=4, exact=3))
    judge_pool(judges)
    assert judges[3].verdict == PARITY_OK


def test_workers_of_other_models_are_no_evidence(caplog: pytest.LogCaptureFixture) -> None:
    _, segment = create(max_workers=4, max_ranks=64, max_shards=1, capacity_blocks=1024)
    workers = Workers(WorkerTable(segment), 64, logging.getLogger("control"))
    for number in range(4):
        url = f"http://127.0.0.1:{9 + number}"
        workers.register(url)
        model = "m" if number < 2 else "n"
        workers.learn(number, Findings(model=model, facts=parse_server_info(INFO, url), has_spoken=True, problem=""))
    watch = ParityWatch(segment, workers, logging.getLogger("control"))
    column = Column(segment, 0)
    for number in range(4):
        column.add_worker(number, words.W_PARITY_LOW, 5)
    watch.look()
    assert caplog.records == []
    for number in range(2):
        column.add_worker(number, words.W_PARITY_LOW, 2)
    watch.look()
    assert sorted(record.__dict__["fields"]["worker"] for record in caplog.records) == ["http://127.0.0.1:10", "http://127.0.0.1:9"]


def test_blocks_published_meanwhile_are_those_of_the_window() -> None:
    judge = ParityJudge()
    judge.feed(Counts(), Blocks(10, 1))
    assert judge.before == Blocks()
    judge.feed(Counts(exact=1), Blocks(12, 2))
    assert judge.before == Blocks(10, 1)
    judge.feed(Counts(exact=61), Blocks(15, 3))
    for look in range(WINDOW_LOOKS - 1):
        assert judge.before == Blocks(10, 1), "of so many looks at least"
        judge.feed(Counts(exact=62 + look), Blocks(20 + look))
    assert judge.before == Blocks(12, 2), "of the looks that hold the last 50 samples"
    assert judge.counts.samples == 60 + WINDOW_LOOKS - 1, "the sums follow the window"


# ---- stores that are not published ----


def test_a_few_blocks_that_were_never_told_are_enough() -> None:
    judge = ParityJudge()
    assert judge.feed(Counts(exact=27, low=8, untold=3)) == PARITY_OK
    assert judge.feed(Counts(exact=27, low=8, untold=4)) == PARITY_LOW


def test_what_came_late_is_never_enough() -> None:
    judge = ParityJudge()
    for n in range(1, 100):
        assert judge.feed(Counts(exact=10 * n, low=5 * n)) == PARITY_OK


def test_few_among_many_are_not_enough() -> None:
    """Of 50 samples, 4 that were never told: some other thing, such as a copy that vLLM dropped."""
    judge = ParityJudge()
    for n in range(1, 100):
        assert judge.feed(Counts(exact=46 * n, low=4 * n, untold=4 * n)) == PARITY_OK


def test_a_worker_that_tells_everything_again_is_trusted_again() -> None:
    judge = ParityJudge()
    assert judge.feed(Counts(exact=20, low=10, untold=10)) == PARITY_LOW
    verdicts = []
    for n in range(1, 120):
        verdicts.append(judge.feed(Counts(exact=20 + n, low=10, untold=10)))
    assert verdicts[10] == PARITY_LOW
    assert verdicts[-1] == PARITY_OK
    assert verdicts.index(PARITY_OK) < WINDOW_SAMPLES + WINDOW_LOOKS
    assert PARITY_LOW not in verdicts[verdicts.index(PARITY_OK) :]


def test_the_verdict_on_many_workers_counts_what_was_never_told_too() -> None:
    assert verdicts(*[Counts(exact=4, low=2, untold=2)] * 4) == [PARITY_OK] * 4, "each has too little of its own"
    assert verdicts(*[Counts(exact=2, low=5, untold=4)] * 2, Counts(exact=7)) == [PARITY_LOW, PARITY_LOW, PARITY_OK]


def test_what_the_counters_say_of_untold_blocks_reaches_the_log_and_the_table(caplog: pytest.LogCaptureFixture) -> None:
    _, segment = create(max_workers=4, max_ranks=64, max_shards=1, capacity_blocks=1024)
    table = WorkerTable(segment)
    workers = Workers(table, 64, logging.getLogger("control"))
    url = "http://127.0.0.1:9"
    workers.register(url)
    workers.learn(0, Findings(model="m", facts=parse_server_info(INFO, url), has_spoken=True, problem=""))
    watch = ParityWatch(segment, workers, logging.getLogger("control"))
    column = Column(segment, 0)
    RankTable(segment).set(workers.view(0).rank_base, words.R_BLOCKS_STORED, 9)
    column.add_worker(0, words.W_PARITY_EXACT, 20)
    column.add_worker(0, words.W_PARITY_LOW, 6)
    column.add_worker(0, words.W_OVERLAP_BLOCKS, 90)
    watch.look()
    assert read_workers(table)[0].parity == PARITY_OK
    column.add_worker(0, words.W_PARITY_UNTOLD, 5)
    watch.look()
    assert read_workers(table)[0].parity == PARITY_LOW
    (record,) = caplog.records
    assert record.__dict__["fields"]["cause"].startswith("the worker leaves stored blocks out of its KV events")


# ---- the table, the log ----


@pytest.mark.parametrize("is_steered", [True, False])
def test_the_log_names_the_engine_that_ignores_its_rank(is_steered: bool, caplog: pytest.LogCaptureFixture) -> None:
    _, segment = create(max_workers=4, max_ranks=64, max_shards=1, capacity_blocks=1024)
    workers = Workers(WorkerTable(segment), 64, logging.getLogger("control"))
    url = "http://127.0.0.1:9"
    workers.register(url)
    facts = parse_server_info(INFO.replace(b'"dp_size": 1', b'"dp_size": 4'), url)
    workers.learn(0, Findings(model="m", facts=facts, has_spoken=True, problem=""))
    asked: list[WorkerView] = []
    told = ParityWatch(segment, workers, logging.getLogger("control"), is_steered=lambda view: bool(asked.append(view)) or is_steered)
    Column(segment, 0).add_worker(0, words.W_PARITY_HIGH, 60)
    told.look()
    assert [view.record.rank_ways for view in asked] == ["hhr-h"]
    (record,) = caplog.records
    assert ("ignores X-Data-Parallel-Rank" in record.__dict__["fields"]["cause"]) is is_steered


def test_the_verdict_reaches_the_worker_table_and_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="control")
    _, segment = create(max_workers=4, max_ranks=64, max_shards=1, capacity_blocks=1024)
    table = WorkerTable(segment)
    workers = Workers(table, 64, logging.getLogger("control"))
    url = "http://127.0.0.1:9"
    workers.register(url)
    workers.learn(0, Findings(model="m", facts=parse_server_info(INFO, url), has_spoken=True, problem=""))
    workers.set_state(0, READY)
    watch = ParityWatch(segment, workers, logging.getLogger("control"))
    column = Column(segment, 0)
    column.add_worker(0, words.W_PARITY_EXACT, 50)
    watch.look()
    assert read_workers(table)[0].parity == PARITY_OK
    assert caplog.records == []
    column.add_worker(0, words.W_PARITY_LOW, 80)
    RankTable(segment).set(0, words.R_GAPS, 2)  # a gap that replay has healed is no cause
    watch.look()
    watch.look()
    row = read_workers(table)[0]
    assert (row.parity, row.block_size, row.state) == (PARITY_LOW, 64, READY)
    assert len(caplog.records) == 1
    cause = caplog.records[0].__dict__["fields"]["cause"]
    assert "lost" not in cause
    assert workers.parity_cause(0) == cause
    column.add_worker(0, words.W_PARITY_EXACT, 500)
    watch.look()
    assert read_workers(table)[0].parity == PARITY_OK
    assert len(caplog.records) == 2
    assert workers.parity_cause(0) == ""


def test_blocks_are_believed_about_pairs_of_tokens(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="control")
    _, segment = create(max_workers=4, max_ranks=64, max_shards=1, capacity_blocks=1024)
    table, ranks = WorkerTable(segment), RankTable(segment)
    workers = Workers(table, 64, logging.getLogger("control"))
    url = "http://127.0.0.1:9"
    workers.register(url)
    watch = ParityWatch(segment, workers, logging.getLogger("control"))

    def learn(**fields: object) -> bool:
        body = json.dumps(json.loads(INFO) | {"speculative_algorithm": "EAGLE"} | fields).encode()
        workers.learn(0, Findings(model="m", facts=parse_server_info(body, url), has_spoken=True, problem=""))
        watch.look()
        return read_workers(table)[0].bigram

    assert learn()
    rank = workers.view(0).rank_base
    ranks.set(rank, words.R_REASON, REASON_SINGLES)
    assert learn()  # a row that another worker left
    ranks.set(rank, words.R_GENERATION, workers.view(0).generation)
    assert not learn()
    assert not learn()
    ranks.set(rank, words.R_REASON, REASON_PAIRS)
    assert not learn()  # ranks that contradict each other do not make it change every second
    ranks.set(rank, words.R_REASON, 0)
    assert not learn()
    assert [record.message for record in caplog.records] == [
        "its blocks are keyed by single tokens, other than it says: so they are looked up"
    ]
    assert learn(startup_time=5.0)  # started again, perhaps otherwise
    assert not learn(startup_time=5.0, speculative_algorithm=None)
    ranks.set(rank, words.R_REASON, REASON_PAIRS)
    assert learn(startup_time=5.0, speculative_algorithm=None)


def test_a_worker_that_reports_nothing_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="control")
    _, segment = create(max_workers=4, max_ranks=64, max_shards=1, capacity_blocks=1024)
    workers = Workers(WorkerTable(segment), 64, logging.getLogger("control"))
    for number in range(2):
        url = f"http://127.0.0.{number}:9"
        workers.register(url)
        workers.learn(number, Findings(model="m", facts=parse_server_info(INFO, url), has_spoken=True, problem=""))
    watch = ParityWatch(segment, workers, logging.getLogger("control"))
    column = Column(segment, 0)
    for number in range(2):
        column.add_worker(number, words.W_OK, 50)
        column.add_worker(number, words.W_OVERLAP_BLOCKS, 49)
    watch.look()
    assert caplog.records == [], "nothing to speak of was predicted"
    for number in range(2):
        column.add_worker(number, words.W_OVERLAP_BLOCKS)
    column.add_worker(1, words.W_PARITY_EXACT)
    watch.look()
    watch.look()
    (record,) = caplog.records
    assert "--enable-cache-report" in record.getMessage()
    assert record.__dict__["fields"] == {"worker": "http://127.0.0.0:9"}
