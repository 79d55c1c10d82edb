"""The text of /metrics: what shared memory and /proc say at the moment of the scrape.

Runs in: control; nothing is counted here. Contract: names start with `sglfast_` and end with their unit; counters survive the death of a
    shard (its column is folded into the totals), those of a KV rank begin anew with its event stream.
Format: Prometheus text 0.0.4. Rendering costs about 5 us a line, so a text is served again for ten times as long as it took to make:
    scrapes take a tenth of control's time at most, however many come.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from sglfast import __version__, _workers
from sglfast import _counters as words
from sglfast._breaker import Breakers
from sglfast._counters import RankTable, Totals
from sglfast._hashtree import TreeReader
from sglfast._predicted import dropped_total
from sglfast._predicted import totals as prediction_totals
from sglfast._segment import Segment
from sglfast.control.kv_state import rank_states
from sglfast.control.worker_totals import WorkerTotals
from sglfast.errors import REASONS
from sglfast.shm import DECISIONS, WorkerView

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_RESTING = 10  # a text is served for this many times its rendering time
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_BOUNDS = [f"{bound_us / 1e6:g}" for bound_us in words.BUCKETS_US] + ["+Inf"]

# word -> (name without `_total`, help)
_SHARD_COUNTERS = {
    words.S_REQUESTS: ("requests", "Requests handed to a worker; one that fails over counts once for each worker."),
    words.S_CONNECTIONS_TOTAL: ("connections_accepted", "Client connections accepted."),
    words.S_BYTES_IN: ("received_bytes", "Bytes received from clients."),
    words.S_BYTES_OUT: ("sent_bytes", "Bytes of workers' answers sent to clients."),
    words.S_UPSTREAM_CONNECTS: ("upstream_connects", "Connections opened to workers."),
    words.S_RESENDS: ("upstream_resends", "Requests sent again because a pooled connection died before an answer."),
    words.S_CLIENT_GONE: ("client_disconnects", "Requests whose client left before the answer was complete."),
    words.S_RETRIES: ("retries", "Attempts beyond a request's first."),
    words.S_RETRIES_EXHAUSTED: ("retries_exhausted", "Requests that failed although they had more than one attempt."),
    words.S_STALE: ("stale_requests", "Requests ended because they lasted longer than --stale-request-timeout-secs."),
    words.S_ABORTS: ("abort_requests", "Workers told by /abort_request to end a request."),
    words.S_STREAMS_CUT: ("answers_cut", "Answers that ended in the middle because of their worker."),
    words.S_UNUSUAL_HEADS: ("unusual_heads", "Request heads that were left to the slow, full HTTP parser."),
    words.S_QUEUED: ("queued_requests", "Requests that had to wait for their turn."),
    words.S_PROMPT_TOKENS: ("prompt_tokens", "Prompt tokens counted by the router."),
    words.S_PREDICTED: ("predicted_choices", "Choices of a worker that was sent more of the prompt than its KV events say."),
}
_SHARD_GAUGES = {
    words.S_CONNECTIONS: ("connections", "Open client connections."),
    words.S_INFLIGHT: ("inflight_requests", "Requests that a worker has and has not finished."),
    words.S_PERMITS: ("admitted_requests", "Requests in flight that count under --max-concurrent-requests."),
    words.S_BODY_BYTES: (
        "request_body_bytes",
        "Bytes of request bodies that are held, whole or not yet; --max-buffered-bytes bounds them.",
    ),
    words.S_WAITING: ("waiting_requests", "Requests that wait for their turn."),
}
_CLASSES = {
    "2xx": words.S_RESPONSES_2XX, "3xx": words.S_RESPONSES_3XX, "4xx": words.S_RESPONSES_4XX, "5xx": words.S_RESPONSES_5XX,
}  # fmt: skip
_OUTCOMES = {
    "ok": words.W_OK, "client_error": words.W_CLIENT_ERRORS, "busy": words.W_BUSY, "error": words.W_ERRORS,
    "cancelled": words.W_CANCELLED,
}  # fmt: skip
_AFFINITY = {
    "same_host_picked": words.S_AFFINITY_SAME_HOST,
    "fallback_breaker": words.S_AFFINITY_BREAKER,
    "fallback_load_imbalance": words.S_AFFINITY_LOAD,
}
_MODES = {"regular": "plain", "prefill": "prefill", "decode": "decode"}  # as sgl-router calls them
_BREAKER_TRANSITIONS = {"open": words.W_BREAKER_OPENED, "half_open": words.W_BREAKER_HALF_OPENED, "closed": words.W_BREAKER_CLOSED}
_PARITY = {
    "exact": words.W_PARITY_EXACT,
    "too_high": words.W_PARITY_HIGH,
    "too_low": words.W_PARITY_LOW,
    "came_since": words.W_PARITY_CAME,
    "went_since": words.W_PARITY_WENT,
}
_WORKER_COUNTERS = {
    words.W_REQUESTS: ("worker_selected_requests", "Requests handed to the worker."),
    words.W_BYTES_OUT: ("worker_sent_bytes", "Bytes of the worker's answers sent to clients."),
    words.W_CONNECT_ERRORS: ("worker_connect_errors", "Connections that the worker did not take."),
    words.W_RANK_REFUSED: ("worker_rank_refusals", "Requests whose data-parallel rank, chosen by the router, the worker refused."),
    words.W_PARITY_UNTOLD: ("worker_kv_untold", "Of too_low: answers that found blocks of which no KV event had told, nor did later ones."),
    words.W_PARITY_OVER: ("worker_kv_overstated", "Of too_low: answers that report more cached tokens than a cache can have."),
    words.W_PROMPT_BLOCKS: ("worker_prompt_blocks", "KV blocks of the prompts given to the worker."),
    words.W_OVERLAP_BLOCKS: ("worker_overlap_blocks", "Those of them that the KV index believed to be in the worker's cache."),
}
_WORKER_GAUGES = {
    words.W_INFLIGHT_REQUESTS: ("worker_inflight_requests", "Requests that the worker has and has not finished."),
    words.W_INFLIGHT_TOKENS: ("worker_inflight_tokens", "Uncached prompt tokens sent to the worker and not yet answered."),
    words.W_CONNECTIONS: ("worker_connections", "Open connections to the worker."),
}
_RANK_GAUGES = {
    words.L_INFLIGHT_REQUESTS: ("rank_inflight_requests", "Requests that were steered to the rank and are not finished."),
    words.L_INFLIGHT_TOKENS: ("rank_inflight_tokens", "Uncached prompt tokens steered to the rank and not yet answered."),
}
_RANK_COUNTERS = {
    words.R_BATCHES: ("kv_event_batches", "Batches of KV events applied."),
    words.R_EVENTS: ("kv_events", "KV events applied."),
    words.R_BLOCKS_STORED: ("kv_blocks_stored", "Blocks in the rank's stored events."),
    words.R_BLOCKS_REMOVED: ("kv_blocks_removed", "Blocks in the rank's removed events."),
    words.R_GAPS: ("kv_gaps", "Holes in the rank's sequence numbers."),
    words.R_DUPLICATES: ("kv_duplicate_batches", "Batches dropped because they had been applied."),
    words.R_RESTARTS: ("kv_restarts", "Restarts of the engine seen in the event stream."),
    words.R_UNDECODED: ("kv_undecoded_events", "KV events that could not be decoded."),
    words.R_REPLAYS: ("kv_replays", "Replays of missed events asked for."),
    words.R_GIVE_UPS: ("kv_give_ups", "Times when lost events could not be had again and the rank's blocks were cleared."),
}
_STATES = {_workers.JOINING: "joining", _workers.READY: "ready", _workers.UNHEALTHY: "unhealthy", _workers.DRAINING: "draining"}


@dataclass(slots=True)
class WorkerChanges:
    """How often workers came, by result, and went, by how."""

    additions: Counter[str] = field(default_factory=Counter)
    removals: Counter[str] = field(default_factory=Counter)


class Metrics:
    """Renders. views: the workers as they are now; clock: seconds, for how long a text is served again.

    totals: the workers' counters since they got their slots; changes: how often workers came and went; lost_lines: of control's log;
    parity_cause: why a worker's predictions are wrong, by its slot; is_steered:
    whether requests tell a worker which of its ranks they are for.
    """

    def __init__(
        self,
        segment: Segment,
        views: Callable[[], Sequence[WorkerView]],
        clock: Callable[[], float] = time.monotonic,
        *,
        totals: WorkerTotals | None = None,
        changes: WorkerChanges | None = None,
        lost_lines: Callable[[], int] = lambda: 0,
        parity_cause: Callable[[int], str] = lambda _: "",
        is_steered: Callable[[WorkerView], bool] = lambda _: False,
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        totals, changes = totals or WorkerTotals(segment), changes or WorkerChanges()
        self._registry.register(RouterCollector(segment, views, totals, changes, lost_lines, parity_cause, is_steered))
        self._clock = clock
        self._text = b""
        self._good_until_s = float("-inf")

    def render(self) -> bytes:
        """The text, made anew unless the last one is still good."""
        begun_s = self._clock()
        if begun_s >= self._good_until_s:
            self._text = generate_latest(self._registry)
            done_s = self._clock()
            self._good_until_s = done_s + _RESTING * (done_s - begun_s)
        return self._text


class RouterCollector(Collector):
    """All metrics of the router, read at each collection."""

    def __init__(
        self,
        segment: Segment,
        views: Callable[[], Sequence[WorkerView]],
        worker_totals: WorkerTotals,
        changes: WorkerChanges,
        lost_lines: Callable[[], int],
        parity_cause: Callable[[int], str],
        is_steered: Callable[[WorkerView], bool],
    ) -> None:
        self._is_steered = is_steered
        self._lost_lines = lost_lines
        self._parity_cause = parity_cause
        self._segment = segment
        self._views = views
        self._worker_totals = worker_totals
        self._changes = changes
        self._totals = Totals(segment)
        self._ranks = RankTable(segment)
        self._tree = TreeReader(segment)
        self._breakers = Breakers(segment)

    def collect(self) -> Iterable[Metric]:
        """The families, in the order of the text."""
        yield _gauge("build_info", "Version of the router; always 1.", [({"version": __version__}, 1)])
        yield _gauge("state", "State of the router: 0 starting, 1 serving, 2 draining, 3 stopped.", [({}, self._segment.state)])
        yield from self._of_shards()
        yield from self._of_workers()
        yield from self._of_ranks()
        yield from self._of_tree()
        yield from self._of_processes()

    def _of_shards(self) -> Iterable[Metric]:
        totals = self._totals.shard()
        for word, (name, text) in _SHARD_GAUGES.items():
            yield _gauge(name, text, [({}, max(0, totals[word]))])
        for word, (name, text) in _SHARD_COUNTERS.items():
            yield _counter(name, text, [({}, totals[word])])
        lost = totals[words.S_LOG_LINES_LOST] + self._lost_lines()
        yield _counter("log_lines_lost", "Log lines that were not written: the log is read too slowly or not at all.", [({}, lost)])
        yield _counter("queue_wait_seconds", "Time that requests have waited for their turn.", [({}, totals[words.S_QUEUE_WAIT_US] / 1e6)])
        rows = [({"class": name}, totals[word]) for name, word in _CLASSES.items()]
        yield _counter("responses", "Answers to clients by class of status, the router's own included.", rows)
        rows = [({"code": reason.code}, totals[words.S_REASONS + i]) for i, reason in enumerate(REASONS)]
        yield _counter("router_errors", "Answers that the router made itself because of a failure, by x-router-error-code.", rows)
        rows = [({"decision": name}, totals[words.S_DECISIONS + i]) for i, name in enumerate(DECISIONS)]
        yield _counter("decisions", "Choices of a worker, by why it was chosen.", rows)
        rows = [({"outcome": name}, totals[word]) for name, word in _AFFINITY.items()]
        yield _counter("decode_affinity", "Choices of a decode worker by host: the prefill worker's, or why not there.", rows)
        rows = [({"result": "keyed"}, totals[words.S_PROMPTS_KEYED]), ({"result": "unkeyed"}, totals[words.S_PROMPTS_UNKEYED])]
        yield _counter("prompts", "Prompts looked up in the KV index (keyed) or not (unkeyed).", rows)
        yield _histogram("ttft_seconds", "Time from a whole request to the first byte of a good answer's body.", totals, words.S_TTFT)
        yield _histogram("request_duration_seconds", "Time from a whole request to the end of a good answer.", totals, words.S_DURATION)

    def _of_workers(self) -> Iterable[Metric]:
        views = self._views()
        labels = [{"worker": view.record.url} for view in views]
        modes = [_MODES[view.record.role] for view in views]
        totals = [self._worker_totals.of(view.worker_idx) for view in views]
        rows = [
            ({"worker": view.record.url, "model": view.record.model or ""}, float(view.state == _workers.READY)) for view in views
        ]  # fmt: skip
        yield _gauge("worker_up", "1 when the worker takes new requests.", rows)
        states = [(view.state, mode) for view, mode in zip(views, modes, strict=True)]
        rows = [
            ({"state": name, "mode": mode}, float(states.count((state, mode))))
            for state, name in _STATES.items()
            for mode in _MODES.values()
        ]
        yield _gauge("workers", "Workers by state and by what they do of a request.", rows)
        each = [({**label, "state": _STATES[view.state]}, 1.0) for label, view in zip(labels, views, strict=True)]
        yield _gauge("worker_state", "The worker's state; always 1.", each)
        rows = [({"result": result}, self._changes.additions[result]) for result in ("success", "failed", "duplicate")]
        yield _counter("worker_registrations", "Workers that were added, by how that ended; failed: not ready in time.", rows)
        rows = [({"how": how}, self._changes.removals[how]) for how in ("drained", "cut", "waiting")]
        yield _counter("worker_removals", "Workers that were removed: after their requests, in their midst, or before they joined.", rows)
        requests = [
            ({**label, "mode": mode, "outcome": outcome}, row[word])
            for label, mode, row in zip(labels, modes, totals, strict=True)
            for outcome, word in _OUTCOMES.items()
        ]
        yield _counter("worker_requests", "Requests that have left the worker, by outcome (busy: 429 and 503).", requests)
        circuits = [(label, float(self._breakers.state(view.worker_idx))) for label, view in zip(labels, views, strict=True)]
        yield _gauge("breaker_state", "Circuit breaker of the worker: 0 closed, 1 open, 2 half-open.", circuits)
        changes = [
            ({**label, "to": state}, row[word])
            for label, row in zip(labels, totals, strict=True)
            for state, word in _BREAKER_TRANSITIONS.items()
        ]
        yield _counter("breaker_transitions", "Changes of the worker's circuit breaker, by what it became.", changes)
        samples = [
            ({**label, "result": result}, row[word]) for label, row in zip(labels, totals, strict=True) for result, word in _PARITY.items()
        ]
        yield _counter("worker_kv_predictions", "Answers by how the predicted cached tokens compare with those reported.", samples)
        for word, (name, text) in _WORKER_GAUGES.items():
            yield _gauge(name, text, [(label, max(0, row[word])) for label, row in zip(labels, totals, strict=True)])
        for word, (name, text) in _WORKER_COUNTERS.items():
            yield _counter(name, text, [(label, row[word]) for label, row in zip(labels, totals, strict=True)])

    def _of_ranks(self) -> Iterable[Metric]:
        states: list[tuple[dict[str, str], float]] = []
        reasons: list[tuple[dict[str, str], float]] = []
        followed: list[tuple[dict[str, str], list[int]]] = []
        loads: list[tuple[dict[str, str], list[int]]] = []
        for view in self._views():
            is_steered = self._is_steered(view)
            for rank in rank_states(self._ranks, view, self._parity_cause(view.worker_idx)):
                label = {"worker": view.record.url, "rank": str(rank.rank)}
                states.append((label, rank.state))
                if rank.reason:
                    reasons.append(({**label, "reason": rank.reason}, 1))
                if view.block_size:
                    followed.append((label, self._ranks.row(view.rank_base + rank.rank)))
                if is_steered:
                    loads.append((label, self._totals.rank(view.rank_base + rank.rank)))
        yield _gauge("kv_rank_state", "Trust in the KV index of a rank: 0 blind, 1 syncing, 2 exact, 3 degraded.", states)
        yield _gauge("kv_rank_reason", "Why the KV index of a rank is not exact; always 1.", reasons)
        yield _gauge(
            "kv_rank_blocks", "Blocks that the KV index holds of a rank.", [(label, row[words.R_OWNED_BLOCKS]) for label, row in followed]
        )
        missing = [(label, row[words.R_MISSING]) for label, row in followed]
        yield _gauge("kv_missing_batches", "Batches of KV events that were published and are not applied yet: they are replayed.", missing)
        seen = [(label, row[words.R_LAST_EVENT_MS] / 1000) for label, row in followed]
        yield _gauge("kv_last_event_timestamp_seconds", "Unix time of the rank's last KV event, 0 = none yet.", seen)
        for word, (name, text) in _RANK_GAUGES.items():
            yield _gauge(name, text, [(label, max(0, row[word])) for label, row in loads])
        for word, (name, text) in _RANK_COUNTERS.items():
            yield _counter(name, text, [(label, row[word]) for label, row in followed])

    def _of_tree(self) -> Iterable[Metric]:
        stats = self._tree.stats()
        yield _gauge("kv_blocks", "Blocks in the KV index, each counted once however many ranks hold it.", [({}, stats["live_blocks"])])
        yield _gauge("kv_capacity_blocks", "Blocks that the KV index holds at most.", [({}, stats["capacity_blocks"])])
        yield _counter("kv_index_evicted_blocks", "Blocks dropped because the KV index was full.", [({}, stats["evicted_total"])])
        predicted = prediction_totals(self._segment)
        results = {"applied": predicted["records"], "refused": predicted["refused"], "dropped": dropped_total(self._segment)}
        rows = [({"result": result}, count) for result, count in results.items()]
        yield _counter("predictions", "What shards told the index of prompts that they sent (dropped: the ring was full).", rows)
        rows = [({"reason": reason}, predicted[reason]) for reason in ("evicted", "trimmed")]
        yield _counter("prediction_forgotten_blocks", "Beginnings of prompts forgotten: for others, or beyond a worker's share.", rows)
        yield _counter("kv_index_starts", "Times that the KV index began from an empty tree.", [({}, stats["generation"])])

    def _of_processes(self) -> Iterable[Metric]:
        now_ms = time.time() * 1000
        names = ["index", *(f"shard{shard}" for shard in range(self._segment.max_shards))]
        rows = [({"process": name}, self._segment.process_info(slot)) for slot, name in enumerate(names)]
        yield _gauge("process_up", "1 when the process serves.", [(label, float(ready and pid > 0)) for label, (pid, *_, ready) in rows])
        yield _counter("process_restarts", "Deaths of the process.", [(label, restarts) for label, (_, _, _, restarts, _) in rows])
        ages = [(label, max(0.0, now_ms - beat_ms) / 1000) for label, (pid, _, beat_ms, _, _) in rows if pid]
        yield _gauge("process_heartbeat_age_seconds", "Time since the process last said that it is alive.", ages)
        pids = [({"process": "control"}, os.getpid()), *((label, pid) for label, (pid, *_) in rows if pid)]
        used = [(label, usage) for label, pid in pids if (usage := _usage_of(pid)) is not None]
        resident = [(label, resident_bytes) for label, (resident_bytes, _) in used]
        yield _gauge("process_resident_memory_bytes", "Resident memory of the process, shared memory included.", resident)
        cpu = [(label, cpu_s) for label, (_, cpu_s) in used]
        yield _counter("process_cpu_seconds", "User and system CPU time of the process, in seconds.", cpu)


def _gauge(name: str, text: str, rows: Iterable[tuple[dict[str, str], float]]) -> Metric:
    """A gauge; rows: (labels, value). Label dicts may be shared between families: that saves a third of the time."""
    family = GaugeMetricFamily(f"sglfast_{name}", text)
    for labels, value in rows:
        family.add_sample(family.name, labels, value)
    return family


def _counter(name: str, text: str, rows: Iterable[tuple[dict[str, str], float]]) -> Metric:
    """A counter; `_total` is added to its name."""
    family = CounterMetricFamily(f"sglfast_{name}", text)
    sample_name = f"{family.name}_total"
    for labels, value in rows:
        family.add_sample(sample_name, labels, value)
    return family


def _histogram(name: str, text: str, totals: Sequence[int], first_word: int) -> Metric:
    """A histogram from its words: a count for each bucket, then the count of all and their sum in microseconds."""
    counts = totals[first_word : first_word + words.HISTOGRAM_BUCKETS]
    buckets: list[tuple[str, float]] = []
    so_far = 0
    for bound, count in zip(_BOUNDS, counts, strict=True):
        so_far += count
        buckets.append((bound, so_far))
    family = HistogramMetricFamily(f"sglfast_{name}", text)
    family.add_metric([], buckets, totals[first_word + words.HISTOGRAM_BUCKETS + 1] / 1e6)
    return family


def _usage_of(pid: int) -> tuple[int, float] | None:
    """(resident bytes, CPU seconds) of a process, None when it is gone. Source: proc(5), statm and stat."""
    try:
        resident_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (OSError, IndexError):
        return None
    return resident_pages * _PAGE_BYTES, (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
