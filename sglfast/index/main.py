"""The index process: one per router. Follows the worker table, keeps a subscriber per rank, owns the only tree writer.

Runs in: index (`python -m sglfast.index.main`, started by control with inherited descriptors, see sglfast.boot).
Contract: when there was an index before it, it takes over that one's tree and says so. A rank's blocks stay, as hints, if its
    stream is still the one that was followed; they count as exact again when the stream shows that nothing was missed
    (index/stream), and are cleared when it shows otherwise. So it is for blocks keyed by tokens, if the map of their engine's hashes
    is there, too (index/key_maps). Of a worker that goes, or comes back with other endpoints, ranks or blocks, all ranks are cleared
    before their numbers are used again. It ends on SIGTERM and when control is gone.
"""

import contextlib
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable

import zmq

from sglfast import _counters as words
from sglfast import open_files
from sglfast._blockhash import xxh3
from sglfast._counters import RANK_BLIND, RankTable
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast._keymap import KeyMap
from sglfast._segment import Segment
from sglfast._workers import WorkerTable
from sglfast.boot import Boot, boot_child, hear
from sglfast.errors import ConfigError
from sglfast.index.file_room import FileRoom, files_of, is_for_lack_of_files
from sglfast.index.held import Limits
from sglfast.index.key_maps import KeyMaps
from sglfast.index.listener import Listener, listen_endpoint
from sglfast.index.predictions import PredictionKeeper
from sglfast.index.rank import RankIndex, TreeLock, clear_rank
from sglfast.index.rank_note import Noted, noted
from sglfast.index.subscriber import Endpoints, Subscriber
from sglfast.index.token_route import UNTOLD_GROUP
from sglfast.index.worker_streams import endpoint_of, stream_of
from sglfast.logs import set_level, setup_logs
from sglfast.shm import (
    REASON_NO_DESCRIPTORS,
    REASON_NO_EVENTS,
    REASON_NOT_LISTENING,
    REASON_SAME_TOPIC,
    WorkerView,
    read_workers,
)
from sglfast.wire.server_info import KvEndpoint

INDEX_SLOT = 0
_TICK_S = 0.05
_HEARTBEAT_S = 0.5
_STOP_S = 1.0
# A rank has at most a SUB, a DEALER, the two ends of a monitor and the two sockets of a listener, each with a descriptor or two.
_SOCKETS_A_RANK = 6


class Index:
    """Everything the index process owns. `sync` follows the worker table, `close` lets go of all."""

    def __init__(
        self,
        segment: Segment,
        log: logging.Logger,
        limits: Limits | None = None,
        kv_listen: str | None = None,
        predictions: PredictionKeeper | None = None,
        maps_fd: int | None = None,
        file_limit: Callable[[], int | None] | None = None,
    ) -> None:
        """file_limit: see FileRoom."""
        self._segment = segment
        self._room = FileRoom(file_limit)
        self._maps = KeyMaps(maps_fd, segment, log)
        self._predictions = predictions
        self._log = log
        self._limits = limits
        self._table = WorkerTable(segment)
        self._ranks = RankTable(segment)
        self._tree = TreeLock(TreeWriter(segment))
        self._followed: dict[int, tuple[WorkerView, list[Subscriber]]] = {}
        self._kv_listen = kv_listen
        self._listeners: dict[str, Listener] = {}
        self._version = -1
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.max_sockets = 64 + _SOCKETS_A_RANK * segment.max_ranks
        # Rows of the rank table that an index process before this one left, by rank; empty after the first `sync`.
        self._inheritance: dict[int, list[int]] = self._inherit()

    def _inherit(self) -> dict[int, list[int]]:
        was_there = TreeReader(self._segment).stats()["generation"] > 0
        writer, n_ranks = self._tree.writer, self._segment.max_ranks
        n_blocks = writer.adopt() if was_there else -1
        if n_blocks < 0:
            writer.reset()
            for rank in range(n_ranks):
                self._ranks.clear(rank)
            if was_there:
                self._log.error("the KV index of the process before this one is damaged: it starts from an empty tree")
            return {}
        self._log.warning("the KV index goes on with the %d blocks of the process before this one, as far as the streams allow", n_blocks)
        return {rank: self._ranks.row(rank) for rank in range(n_ranks)}

    def _resume(self, rank: int, identity: int) -> tuple[Noted | None, KeyMap]:
        """Where the stream was left, None when the rank begins empty (and then it is empty); its map of engine hashes."""
        row = self._inheritance.pop(rank, None)
        note = None if row is None else noted(row, identity)
        key_map, is_left = self._maps.take(rank, identity, is_left=note is not None and note.mapped_blocks > 0)
        if note is not None and (is_left or not note.mapped_blocks):
            return note, key_map
        if row is not None:
            self._forget(rank)
        return None, key_map

    def _forget(self, rank: int) -> None:
        """Clear what a former process left; without a note of it first, for the case that this one is killed meanwhile."""
        self._ranks.clear(rank)
        clear_rank(self._tree, rank, self._beat)

    def sync(self) -> bool:
        """Follow the worker table; True when it had changed. Cheap when it had not."""
        version = self._table.version()
        if version == self._version:
            return False
        views = {view.worker_idx: view for view in read_workers(self._table)}
        gone = [idx for idx, (view, _) in self._followed.items() if idx not in views or stream_of(views[idx]) != stream_of(view)]
        self._drop(gone)
        for idx, view in views.items():
            if idx in self._followed:
                before, subscribers = self._followed[idx]
                if view.bigram != before.bigram:
                    for subscriber in subscribers:
                        subscriber.expect(is_bigram=view.bigram)
                self._followed[idx] = (view, subscribers)
            else:
                self._followed[idx] = (view, self._follow(view))
        for rank in self._inheritance:  # nobody's now
            self._forget(rank)
            self._maps.take(rank, 0, is_left=False)
        self._inheritance = {}
        self.retry()
        if self._predictions is not None:
            self._predictions.ready()
        self._version = version
        self._segment.process_saw(INDEX_SLOT, version)
        return True

    def publish_sizes(self) -> None:
        """Owned blocks of all ranks: eviction changes them without an event of the rank's own."""
        for _, subscribers in self._followed.values():
            for subscriber in subscribers:
                subscriber.publish_size()

    def close(self) -> None:
        """Stop all threads and close all sockets."""
        self._predictions = None  # what is known of workers without events is for the next index
        all_ended = self._drop(list(self._followed))
        for listener in self._listeners.values():
            all_ended &= listener.close(_STOP_S)
        self._listeners = {}
        if all_ended:
            self._context.term()

    def _follow(self, view: WorkerView) -> list[Subscriber]:
        endpoint = endpoint_of(view)
        subscribers: list[Subscriber] = []
        if self._predictions is not None:
            row = self._inheritance.get(view.rank_base)
            was_there = row is not None and row[words.R_GENERATION] == view.generation
            self._predictions.own(view.rank_base, view.dp_size, view.generation, has_events=endpoint is not None, was_there=was_there)
        is_told = False
        for worker_rank in range(view.dp_size):
            subscriber, why = self._follow_rank(view, endpoint, worker_rank, len(subscribers))
            if subscriber is not None:
                subscribers.append(subscriber)
                continue
            if why == REASON_NO_DESCRIPTORS:
                self._room.wait((view.worker_idx, worker_rank), time.monotonic())
                if not is_told:
                    self._log.error(
                        "rank %d of %s is not followed: %d ranks need %d open files, this process may have %s; raise the limit (ulimit -n)",
                        *(worker_rank, view.record.url, self._segment.max_ranks, files_of(self._segment.max_ranks), self._room.limit),
                    )
                is_told = True
            self._leave(view, worker_rank, why)
        return subscribers

    def retry(self) -> None:
        """Try to follow the ranks for which there were too few open files, when it is time to. Cheap when it is not."""
        now_s = time.monotonic()
        for waiting in self._room.due(now_s):
            worker_idx, worker_rank = waiting
            view, subscribers = self._followed[worker_idx]
            subscriber, why = self._follow_rank(view, endpoint_of(view), worker_rank, 0)
            if subscriber is not None:
                subscribers.append(subscriber)
                continue
            if why == REASON_NO_DESCRIPTORS:
                self._room.wait(waiting, now_s)
            self._leave(view, worker_rank, why)  # also then: a try that got as far as the sockets has cleared the row

    def _leave(self, view: WorkerView, worker_rank: int, why: int) -> None:
        """A rank is not followed. why: position in RANK_REASONS."""
        rank = view.rank_base + worker_rank
        self._resume(rank, 0)
        self._ranks.clear(rank)
        self._ranks.set(rank, words.R_GENERATION, view.generation)
        self._ranks.set(rank, words.R_REASON, why)
        self._ranks.set(rank, words.R_STATE, RANK_BLIND)

    def _follow_rank(self, view: WorkerView, endpoint: KvEndpoint | None, worker_rank: int, n_more: int) -> tuple[Subscriber | None, int]:
        """(its subscriber, 0), or (None, why not: position in RANK_REASONS). n_more: ranks followed beside those of `_followed`."""
        rank = view.rank_base + worker_rank
        live, why = self._live_endpoint(view, endpoint, worker_rank)
        if endpoint is None or live is None:
            return None, why
        if not self._room.has_for(sum(len(subscribers) for _, subscribers in self._followed.values()) + n_more + 1):
            return None, REASON_NO_DESCRIPTORS
        log = logging.LoggerAdapter(self._log, {"fields": {"worker": view.record.url, "rank": worker_rank}})
        identity = xxh3(repr((stream_of(view), worker_rank)).encode()) or 1
        note, key_map = self._resume(rank, identity)
        index = RankIndex(
            self._tree,
            rank,
            block_size=view.block_size,
            is_bigram=view.bigram,
            log=log,
            key_route=view.key_route,
            model=view.record.model or "",
            key_map=key_map,
            main_group=UNTOLD_GROUP if note is None else note.main_group,
        )
        is_shared = view.record.kv_connects_out
        endpoints = Endpoints(live, endpoint.replay_endpoint(worker_rank), endpoint.topic.encode(), is_shared)
        try:
            subscriber = Subscriber(
                self._context,
                endpoints,
                index,
                self._ranks,
                generation=view.generation,
                log=log,
                limits=self._limits,
                identity=identity,
                resume=None if note is None else note.resume,
            )
        except OSError as error:
            if not is_for_lack_of_files(error):
                raise
            index.release()
            self._forget(rank)
            return None, REASON_NO_DESCRIPTORS
        subscriber.start()
        log.info("following KV events")
        return subscriber, 0

    def _live_endpoint(self, view: WorkerView, endpoint: KvEndpoint | None, worker_rank: int) -> tuple[str | None, int]:
        """(where to connect for a rank's live events, 0), or (None, why not: position in RANK_REASONS)."""
        if endpoint is None:
            return None, REASON_NO_EVENTS
        url, port = view.record.url, endpoint.port_base + worker_rank
        if not view.record.kv_connects_out:
            live = endpoint.live_endpoint(worker_rank)
            if live is None:
                self._log.error("rank %d of %s would publish on port %d: not followed", worker_rank, url, port)
            return live, 0 if live else REASON_NO_EVENTS
        if self._kv_listen is None:
            self._log.error("%s connects its KV events out to %s:%d: start the router with --kv-listen", url, endpoint.host, port)
            return None, REASON_NOT_LISTENING
        for other, _ in self._followed.values():
            if other.worker_idx != view.worker_idx and other.record.kv_connects_out and other.record.kv_topic == endpoint.topic:
                self._log.error("%s and %s both connect out with topic %r: not told apart", url, other.record.url, endpoint.topic)
                return None, REASON_SAME_TOPIC
        try:
            place = listen_endpoint(self._kv_listen, worker_rank)
            if place not in self._listeners:
                self._listeners[place] = Listener(self._context, place, self._log)
        except (ConfigError, OSError, zmq.ZMQError) as error:
            self._log.error("no KV events of rank %d of %s: %s", worker_rank, url, error)
            return None, REASON_NO_DESCRIPTORS if is_for_lack_of_files(error) else REASON_NOT_LISTENING
        return self._listeners[place].inner, 0

    def _beat(self) -> None:
        """Behind a turn of what may take seconds."""
        self._segment.process_heartbeat(INDEX_SLOT, _now_ms())

    def _drop(self, worker_idxs: list[int]) -> bool:
        """Stop following workers and clear their ranks; False when a thread did not end in time."""
        dropped = [self._followed.pop(idx) for idx in worker_idxs]
        for _, subscribers in dropped:
            for subscriber in subscribers:
                subscriber.stop()
        for _, subscribers in dropped:
            for subscriber in subscribers:
                subscriber.wipe(self._beat)
        deadline_s = time.monotonic() + _STOP_S
        all_ended = True
        for view, subscribers in dropped:
            self._room.forget(view.worker_idx)
            for subscriber in subscribers:
                if subscriber.join(max(0.0, deadline_s - time.monotonic())):
                    self._room.freed()
                else:
                    all_ended = False
                    self._maps.abandon(subscriber.rank)
            for worker_rank in range(view.dp_size):
                self._ranks.clear(view.rank_base + worker_rank)
        if dropped and self._predictions is not None:
            self._predictions.disown([view.rank_base + rank for view, _ in dropped for rank in range(view.dp_size)])
        if not all_ended:
            self._log.error("a KV event thread did not end within %g s; it has no access to the tree any more", _STOP_S)
        return all_ended


def serve(boot: Boot, log: logging.Logger) -> None:
    """Run until SIGTERM, or until control closes its end of the socket."""
    segment = boot.segment
    stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    previous = signal.signal(signal.SIGTERM, lambda *_: os.eventfd_write(stop_fd, 1))
    segment.process_start(INDEX_SLOT, os.getpid(), _now_ms())
    predictions = _keeper(boot, log)
    index = Index(segment, log, kv_listen=boot.config.kv_listen, predictions=predictions, maps_fd=boot.maps_fd, file_limit=open_files.limit)
    try:
        index_loop(index, boot, stop_fd, log)
    finally:
        segment.process_ready(INDEX_SLOT, False)
        if predictions is not None and not predictions.close(_STOP_S):
            log.error("the thread of the predictions did not end within %g s", _STOP_S)
        index.close()
        signal.signal(signal.SIGTERM, previous)
        os.close(stop_fd)


def _keeper(boot: Boot, log: logging.Logger) -> PredictionKeeper | None:
    """What keeps the predictions, None when there are none."""
    config = boot.config
    if not boot.segment.prediction_blocks:
        return None
    return PredictionKeeper(boot.segment, config.prediction_worker_blocks, log, keeps_all=config.tokenizer_path is None)


def index_loop(index: Index, boot: Boot, stop_fd: int, log: logging.Logger) -> None:
    """Follow the worker table and keep the heartbeat."""
    segment = boot.segment
    poller = select.poll()
    poller.register(stop_fd, select.POLLIN)
    poller.register(boot.control, select.POLLIN)
    is_ready = False
    beat_at_s = 0.0
    while True:
        try:
            index.sync()
        except RuntimeError as error:
            log.warning("the worker table cannot be read now: %s", error)
        else:
            index.retry()
            if not is_ready:
                segment.process_ready(INDEX_SLOT)
                is_ready = True
        if time.monotonic() >= beat_at_s:
            beat_at_s = time.monotonic() + _HEARTBEAT_S
            segment.process_heartbeat(INDEX_SLOT, _now_ms())
            index.publish_sizes()
        for fd, _ in poller.poll(_TICK_S * 1000):
            if fd == stop_fd:
                log.info("the index stops")
                return
            with contextlib.suppress(BlockingIOError):
                heard = hear(boot.control)
                if isinstance(heard, str):
                    log.info("%s, the index stops", heard)
                    return
                set_level(heard.log_level)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def main(argv: list[str]) -> int:
    """Entry of the process; returns its exit code."""
    boot = boot_child(argv)
    log = setup_logs("index", boot.config.log_level, boot.config.log_format)
    open_files.raise_limit()
    with boot.control:
        serve(boot, log)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
