"""The judge of the parity loop: quick to distrust, slow to forgive, deaf to a few samples, and it names a cause."""

import json
import logging

import pytest

from sglfast import _counters as words
from sglfast._counters import Column, RankTable
from sglfast._workers import READY, WorkerTable
from sglfast.control.introspect import Findings
from sglfast.control.parity import Counts, ParityJudge, ParityWatch, likely_cause
from sglfast.control.workers import Workers
from sglfast.shm import PARITY_HIGH, PARITY_LOW, PARITY_OK, REASON_PAIRS, REASON_SINGLES, create, read_workers
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


@pytest.mark.parametrize(
    ("verdict", "lost", "dp_size", "word"),
    [
        (PARITY_LOW, 0, 1, "template"),
        (PARITY_LOW, 3, 1, "lost"),
        (PARITY_HIGH, 1, 1, "lost"),
        (PARITY_HIGH, 0, 1, "salts"),
        (PARITY_HIGH, 0, 4, "over its 4 data-parallel ranks"),
        (PARITY_HIGH, 2, 4, "lost"),
    ],
)
def test_the_cause_is_named(verdict: int, lost: int, dp_size: int, word: str) -> None:
    assert word in likely_cause(verdict, lost, dp_size)


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
    column.add_worker(0, words.W_PARITY_LOW, 60)
    RankTable(segment).set(0, words.R_GAPS, 2)
    watch.look()
    watch.look()
    row = read_workers(table)[0]
    assert (row.parity, row.block_size, row.state) == (PARITY_LOW, 64, READY)
    assert len(caplog.records) == 1
    assert "lost" in str(caplog.records[0].__dict__["fields"]["cause"])
    column.add_worker(0, words.W_PARITY_EXACT, 500)
    watch.look()
    assert read_workers(table)[0].parity == PARITY_OK
    assert len(caplog.records) == 2


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
