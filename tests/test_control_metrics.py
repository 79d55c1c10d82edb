"""The text of /metrics, read back with Prometheus' own parser, against what was written into shared memory."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from control_doubles import remembering_log
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from shared_memory import shared_segment

from sglfast import _counters as words
from sglfast._breaker import OPEN, Breakers
from sglfast._counters import Column, RankTable, Totals
from sglfast._hashtree import TreeWriter
from sglfast._predicted import KEEP, Predictions, PredictionWriter
from sglfast._segment import SERVING, Segment
from sglfast._workers import READY, WorkerTable
from sglfast.control.introspect import Findings
from sglfast.control.metrics import DECISIONS, Metrics, WorkerChanges
from sglfast.control.roles import Named
from sglfast.control.worker_totals import WorkerTotals
from sglfast.control.workers import Workers
from sglfast.edge.policy import DECISIONS as EDGE_DECISIONS
from sglfast.errors import REASON_INDEX
from sglfast.shm import RANK_REASONS
from sglfast.wire.server_info import KvEndpoint, WorkerFacts

A, B = "http://10.0.0.1:30000", "http://10.0.0.2:30000"


class Scrape:
    """Samples by name and labels."""

    def __init__(self, text: bytes) -> None:
        self.families: dict[str, Metric] = {family.name: family for family in text_string_to_metric_families(text.decode())}
        self.samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self.families.values()
            for sample in family.samples
        }  # fmt: skip

    def get(self, name: str, **labels: str) -> float:
        return self.samples[f"sglfast_{name}", tuple(sorted(labels.items()))]


@pytest.fixture
def segment() -> Iterator[Segment]:
    with shared_segment(max_shards=3) as (_, segment):
        yield segment


@pytest.fixture
def workers(segment: Segment) -> Workers:
    """A publishes KV events on two ranks and is ready; B says nothing and is joining."""
    workers = Workers(WorkerTable(segment), 64, remembering_log()[0])
    workers.register(A)
    workers.register(B)
    kv = KvEndpoint("zmq", "10.0.0.1", 5557, "", 64, 2, None)
    workers.learn(0, Findings(WorkerFacts('m"1\\', kv, 2, None, None, False, None, None, 64), 'm"1\\', True, ""))
    workers.set_state(0, READY)
    return workers


def scrape(segment: Segment, workers: Workers) -> Scrape:
    return Scrape(Metrics(segment, lambda: workers.views).render())


def test_counters_of_all_shards_are_summed_and_outlive_their_shard(segment: Segment, workers: Workers) -> None:
    for shard in range(2):
        column = Column(segment, shard)
        column.add(words.S_CONNECTIONS, 5)
        column.begin(0, 700, EDGE_DECISIONS.index("cache_hit"))
        column.begin(0, 300, EDGE_DECISIONS.index("cache_hit"))
        column.prefilled(0, 300)
        column.end(0, 0, words.W_BUSY, 1234)
        column.answered(5)
        column.add(words.S_REASONS + REASON_INDEX["upstream_timeout"])
        column.observe(1_500, 3_000_000)
        column.add_worker(0, words.W_PROMPT_BLOCKS, 10)
        column.add_worker(0, words.W_OVERLAP_BLOCKS, 7)
    seen = scrape(segment, workers)
    assert seen.get("requests_total") == 4
    assert seen.get("inflight_requests") == 2
    assert seen.get("connections") == 10
    assert seen.get("responses_total", **{"class": "5xx"}) == 2
    assert seen.get("responses_total", **{"class": "2xx"}) == 0
    assert seen.get("router_errors_total", code="upstream_timeout") == 2
    assert seen.get("router_errors_total", code="bad_request") == 0
    assert seen.get("decisions_total", decision="cache_hit") == 4
    assert seen.get("worker_requests_total", worker=A, mode="plain", outcome="busy") == 2
    assert seen.get("worker_requests_total", worker=A, mode="plain", outcome="ok") == 0
    assert seen.get("worker_selected_requests_total", worker=A) == 4
    assert seen.get("worker_inflight_requests", worker=A) == 2
    assert seen.get("worker_inflight_tokens", worker=A) == 1400
    assert seen.get("worker_sent_bytes_total", worker=A) == seen.get("sent_bytes_total") == 2468
    assert seen.get("worker_prompt_blocks_total", worker=A) == 20
    assert seen.get("worker_overlap_blocks_total", worker=A) == 14
    assert seen.get("worker_overlap_blocks_total", worker=B) == 0
    Totals(segment).retire(1)
    after = scrape(segment, workers)
    assert (after.get("requests_total"), after.get("inflight_requests"), after.get("connections")) == (4, 1, 5)
    assert (after.get("worker_inflight_tokens", worker=A), after.get("worker_requests_total", worker=A, mode="plain", outcome="busy")) == (
        700,
        2,
    )


def test_histograms_are_cumulative_and_in_seconds(segment: Segment, workers: Workers) -> None:
    column = Column(segment, 2)
    for ttft_us in (900, 1_000, 1_001, 500_000_000):
        column.observe(ttft_us, 2 * ttft_us)
    seen = scrape(segment, workers)
    assert seen.families["sglfast_ttft_seconds"].type == "histogram"
    assert seen.get("ttft_seconds_bucket", le="0.001") == 2
    assert seen.get("ttft_seconds_bucket", le="0.0025") == 3
    assert seen.get("ttft_seconds_bucket", le="400") == 3
    assert seen.get("ttft_seconds_bucket", le="+Inf") == seen.get("ttft_seconds_count") == 4
    assert seen.get("ttft_seconds_sum") == pytest.approx(500.002901)
    assert seen.get("request_duration_seconds_sum") == pytest.approx(1000.005802)
    buckets = [value for (name, _), value in seen.samples.items() if name == "sglfast_ttft_seconds_bucket"]
    assert len(buckets) == words.HISTOGRAM_BUCKETS


def test_workers_and_states(segment: Segment, workers: Workers) -> None:
    seen = scrape(segment, workers)
    assert seen.get("worker_up", worker=A, model='m"1\\') == 1
    assert seen.get("worker_up", worker=B, model="") == 0
    states = ("joining", "ready", "unhealthy", "draining")
    assert [seen.get("workers", state=state, mode="plain") for state in states] == [1, 1, 0, 0]
    assert {seen.get("workers", state=state, mode=mode) for state in states for mode in ("prefill", "decode")} == {0}


def test_workers_that_come_drain_and_go(segment: Segment, workers: Workers) -> None:
    workers.set_draining(0, True)
    changes = WorkerChanges(additions=Counter(success=3, duplicate=2), removals=Counter(drained=1))
    text = Metrics(segment, lambda: workers.views, changes=changes).render()
    seen = Scrape(text)
    assert seen.get("worker_state", worker=A, state="draining") == seen.get("worker_state", worker=B, state="joining") == 1
    assert (seen.get("worker_up", worker=A, model='m"1\\'), seen.get("workers", state="draining", mode="plain")) == (0, 1)
    assert [seen.get("worker_registrations_total", result=name) for name in ("success", "failed", "duplicate")] == [3, 0, 2]
    assert [seen.get("worker_removals_total", how=name) for name in ("drained", "cut", "waiting")] == [1, 0, 0]
    workers.remove(0)
    assert A.encode() not in Metrics(segment, lambda: workers.views).render()


def test_the_next_worker_of_a_slot_begins_at_0(segment: Segment, workers: Workers) -> None:
    Column(segment, 0).add_worker(0, words.W_OK, 7)
    totals = WorkerTotals(segment)
    totals.begin(0)
    Column(segment, 1).add_worker(0, words.W_OK, 2)
    seen = Scrape(Metrics(segment, lambda: workers.views, totals=totals).render())
    assert seen.get("worker_requests_total", worker=A, mode="plain", outcome="ok") == 2


def test_breakers_retries_and_aborts(segment: Segment, workers: Workers) -> None:
    column, breakers = Column(segment, 0), Breakers(segment, 0, failure_threshold=1, open_secs=0.0)
    generation = WorkerTable(segment).read(0)[0]  # type: ignore[index]
    assert breakers.failed(0, generation, False, 1.0) == OPEN
    column.add_worker(0, words.W_BREAKER_OPENED)
    for word, count in ((words.S_RETRIES, 4), (words.S_RETRIES_EXHAUSTED, 1), (words.S_STALE, 2), (words.S_ABORTS, 3)):
        column.add(word, count)
    seen = scrape(segment, workers)
    assert (seen.get("breaker_state", worker=A), seen.get("breaker_state", worker=B)) == (1, 0)
    assert [seen.get("breaker_transitions_total", worker=A, to=to) for to in ("open", "half_open", "closed")] == [1, 0, 0]
    assert [seen.get(f"{name}_total") for name in ("retries", "retries_exhausted", "stale_requests", "abort_requests")] == [4, 1, 2, 3]
    breakers.wake(0, 2.0)
    assert scrape(segment, workers).get("breaker_state", worker=A) == 2


def test_roles_and_why_decode_workers_were_chosen(segment: Segment, workers: Workers) -> None:
    idx = workers.register("http://p:1", named=Named("prefill", 8998, True))
    workers.set_state(workers.register("http://d:1", named=Named("decode")), READY)
    column = Column(segment, 0)
    column.add_worker(idx, words.W_OK, 3)
    for word, count in ((words.S_AFFINITY_SAME_HOST, 5), (words.S_AFFINITY_BREAKER, 1), (words.S_AFFINITY_LOAD, 2)):
        column.add(word, count)
    seen = scrape(segment, workers)
    assert seen.get("worker_requests_total", worker="http://p:1", mode="prefill", outcome="ok") == 3
    assert seen.get("worker_requests_total", worker="http://d:1", mode="decode", outcome="ok") == 0
    assert (seen.get("workers", state="ready", mode="decode"), seen.get("workers", state="joining", mode="prefill")) == (1, 1)
    outcomes = ("same_host_picked", "fallback_breaker", "fallback_load_imbalance")
    assert [seen.get("decode_affinity_total", outcome=outcome) for outcome in outcomes] == [5, 1, 2]


def test_ranks_and_tree(segment: Segment, workers: Workers) -> None:
    ranks = RankTable(segment)
    rank = workers.views[0].rank_base + 1
    for word, value in {
        words.R_STATE: words.RANK_DEGRADED, words.R_REASON: 5, words.R_EVENTS: 70, words.R_GAPS: 2, words.R_GIVE_UPS: 1,
        words.R_OWNED_BLOCKS: 3, words.R_LAST_EVENT_MS: 1_700_000_000_500,
    }.items():  # fmt: skip
        ranks.set(rank, word, value)
    writer = TreeWriter(segment)
    writer.reset()
    writer.store(rank, 0, b"".join(i.to_bytes(8, "little") for i in (1, 2, 3)))
    seen = scrape(segment, workers)
    at = {"worker": A, "rank": "1"}
    assert seen.get("kv_rank_state", **at) == words.RANK_DEGRADED
    assert seen.get("kv_rank_reason", **at, reason=RANK_REASONS[5]) == 1
    assert (seen.get("kv_events_total", **at), seen.get("kv_gaps_total", **at), seen.get("kv_give_ups_total", **at)) == (70, 2, 1)
    assert (seen.get("kv_rank_blocks", **at), seen.get("kv_last_event_timestamp_seconds", **at)) == (3, 1_700_000_000.5)
    assert seen.get("kv_events_total", worker=A, rank="0") == 0
    assert seen.get("kv_rank_state", worker=B, rank="0") == words.RANK_BLIND
    assert ("sglfast_kv_events_total", (("rank", "0"), ("worker", B))) not in seen.samples, "B publishes none"
    assert (seen.get("kv_blocks"), seen.get("kv_capacity_blocks"), seen.get("kv_index_starts_total")) == (3, 1000, 1)


def test_load_of_ranks_that_are_told(segment: Segment, workers: Workers) -> None:
    rank = workers.views[0].rank_base + 1
    for shard, tokens in ((0, 100), (2, 11)):
        Column(segment, shard).begin_rank(rank, tokens)
    asked = Metrics(segment, lambda: workers.views, is_steered=lambda view: view.record.url == A).render()
    seen = Scrape(asked)
    loads = [
        (seen.get("rank_inflight_requests", worker=A, rank=rank), seen.get("rank_inflight_tokens", worker=A, rank=rank)) for rank in "01"
    ]
    assert loads == [(0, 0), (2, 111)]
    assert b'rank_inflight_requests{rank="0",worker="http://10.0.0.2' not in asked
    assert not [name for name, _ in scrape(segment, workers).samples if "rank_inflight" in name], "no series without steering"


def test_processes(segment: Segment, workers: Workers) -> None:
    segment.state = SERVING
    segment.process_start(1, os.getpid(), 0)
    segment.process_ready(1)
    segment.process_died(2)
    seen = scrape(segment, workers)
    assert seen.get("state") == 1
    assert [seen.get("process_up", process=name) for name in ("index", "shard0", "shard1", "shard2")] == [0, 1, 0, 0]
    assert [seen.get("process_restarts_total", process=f"shard{i}") for i in range(3)] == [0, 1, 0]
    assert seen.get("process_heartbeat_age_seconds", process="shard0") > 1e9
    status = Path("/proc/self/status").read_text()
    resident_bytes = int(status.partition("VmRSS:")[2].split()[0]) * 1024
    assert seen.get("process_resident_memory_bytes", process="control") == pytest.approx(resident_bytes, rel=0.2)
    assert seen.get("process_cpu_seconds_total", process="shard0") == pytest.approx(sum(os.times()[:2]), rel=0.2, abs=0.1)


def test_the_page_for_users_of_sglang_router_names_metrics_that_there_are(segment: Segment, workers: Workers) -> None:
    names = set(re.findall(r"`(sglfast_\w+)`", (Path(__file__).parent.parent / "docs" / "sglang-router.md").read_text()))
    text = Metrics(segment, lambda: workers.views).render().decode()
    assert len(names) >= 12
    assert names <= set(re.findall(r"^# HELP (\w+) ", text, re.MULTILINE))


def test_names_and_helps(segment: Segment, workers: Workers) -> None:
    text = Metrics(segment, lambda: workers.views).render()
    assert text.endswith(b"\n")
    for family in Scrape(text).families.values():
        assert family.name.startswith("sglfast_")
        assert family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")
    types = [line for line in text.splitlines() if line.startswith(b"# TYPE")]
    assert len(types) == len(set(types)) == len(Scrape(text).families)


def test_decisions_are_those_of_the_edge() -> None:
    assert DECISIONS == EDGE_DECISIONS


def test_scrapes_take_a_tenth_of_controls_time_at_most(segment: Segment, workers: Workers) -> None:
    times = iter([0.0, 0.1, 0.2, 1.09, 1.11, 1.12])  # begun, done, two scrapes within 10 x 0.1 s, begun, done
    metrics = Metrics(segment, lambda: workers.views, clock=lambda: next(times))
    first = metrics.render()
    Column(segment, 0).add(words.S_CONNECTIONS_TOTAL)
    assert metrics.render() is first
    assert metrics.render() is first
    assert Scrape(metrics.render()).get("connections_accepted_total") == 1


def test_predictions() -> None:
    """What shards told, what became of it, and what they could not tell."""
    with shared_segment(prediction_blocks=8) as (_, segment):
        shard, writer = Predictions(segment, 0), PredictionWriter(segment)
        writer.own(0, 1)
        keys = b"".join(number.to_bytes(8, "little") for number in range(1, 21))
        shard.put(KEEP, 0, 1, keys)
        shard.put(KEEP, 0, 2, keys)
        writer.drain()
        writer.trim(3)
        while shard.put(KEEP, 0, 1, keys):
            pass
        Column(segment, 1).add(words.S_PREDICTED, 4)
        found = scrape(segment, Workers(WorkerTable(segment), 64, remembering_log()[0]))
        results = [found.get("predictions_total", result=result) for result in ("applied", "refused", "dropped")]
        assert results == [1, 1, 1]
        assert [found.get("prediction_forgotten_blocks_total", reason=reason) for reason in ("evicted", "trimmed")] == [12, 5]
        assert found.get("predicted_choices_total") == 4
