"""The sockets of one rank: a thread that reads the live stream, asks for replays and lets `stream` decide.

Runs in: index, one thread a rank; started and stopped by `main`.
Contract: the thread owns its sockets and closes them itself; `stop` makes it leave its poll at once. A rank that is slow, mute or dead
    holds up no other: they share the ZMQ context and, for the time of one batch, the tree's lock. Reconnecting is ZMQ's own
    work; the socket monitor tells about it. Not so after a breach of its protocol, or a message that is too large: a connection that
    does not come back within _REOPEN_S is made anew with sockets of its own. Live messages are read to the end before a notice of
    the monitor is acted upon, so that nothing of an old connection is taken for the new one's.
    Each replay request has a DEALER of its own: answers to an earlier request die with its socket.
Source: spec/kv_events.md 1.1, 1.2, 1.6.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from sglfast import _counters as words
from sglfast._counters import RANK_DEGRADED, RANK_EXACT, RankTable
from sglfast._kvsocket import LiveSocket
from sglfast.errors import KvEventError
from sglfast.index.held import Limits
from sglfast.index.live import Run
from sglfast.index.rank import RankIndex
from sglfast.index.rank_note import RankNote
from sglfast.index.sink import Outcome, Resume
from sglfast.index.stream import RankStream
from sglfast.wire.frames import parse_live, parse_replay, replay_request

_ROUND_MESSAGES = 1000
# How much is read before it is applied, or one message; what holds many blocks is written in turns (RankIndex.apply_run).
_RUN_BYTES = 256 << 10
# A wake-up costs as much as 50 messages: where many come, we sleep until there are some. One that comes alone is never kept waiting.
_NAP_S, _BUSY_BELOW_S = 0.0005, 0.00025
_RESTART_DELAY_S = 1.0
_REOPEN_S = 10.0
# A stream of nonsense clears its rank hundreds of times a second: so many lines of it are written in so many seconds.
_TOLD_CLEARS, _TOLD_IN_S = 10, 10.0
# A batch of 65,536 blocks of 1024 tokens would be 256 MiB; nothing real comes near.
_MAX_MESSAGE_BYTES = 256 << 20
_NOTICES = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a rank publishes: ZMQ endpoints (`tcp://host:port`), replay None when it is not offered, and the topic prefix.

    is_shared: other workers' messages arrive there, too (index/listener); ours have exactly this topic.
    """

    live: str
    replay: str | None
    topic: bytes
    is_shared: bool = False


def connect(source: zmq.Socket[bytes], endpoint: str) -> None:
    """Connect a SUB or DEALER to an engine, with the options that both need."""
    source.setsockopt(zmq.LINGER, 0)
    source.setsockopt(zmq.RCVHWM, 0)  # a burst must wait in our memory, the publisher would drop it
    source.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
    source.setsockopt(zmq.RECONNECT_IVL, 100)
    source.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    # A host that died without a word is noticed after 30 + 3 * 10 s.
    source.setsockopt(zmq.TCP_KEEPALIVE, 1)
    source.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    source.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
    source.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    if endpoint.startswith("tcp://["):
        source.setsockopt(zmq.IPV6, 1)
    source.connect(endpoint)


class Subscriber:
    """Follows one rank. Applies to `index`, publishes state and counters in the rank's row of shared memory."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoints: Endpoints,
        index: RankIndex,
        ranks: RankTable,
        *,
        generation: int,
        log: logging.LoggerAdapter[logging.Logger],
        limits: Limits | None = None,
        identity: int = 0,
        resume: Resume | None = None,
    ) -> None:
        self._context = context
        self._endpoints = endpoints
        self._index = index
        self._ranks = ranks
        self._log = log
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._is_stopping = threading.Event()
        self._dealer: zmq.Socket[bytes] | None = None
        self._poller = zmq.Poller()
        self._published: dict[int, int] = {}
        self._n_read = 0  # live messages, in this round
        self._busy_until_s = 0.0  # a message that comes before this is one of many
        self._clears_from_s = -_TOLD_IN_S  # of the present spell of _TOLD_IN_S
        self._clears = 0  # in it
        self._is_down = False  # the connection was lost, as far as the notices tell
        self._reopen_at_s: float | None = None  # if it has not come back by then
        self._stream = RankStream(self, has_replay=endpoints.replay is not None, limits=limits, resume=resume)
        self._limits = limits
        self._thread = threading.Thread(target=self._run, name=f"kv-rank-{index.rank}", daemon=True)
        ranks.clear(index.rank)
        ranks.set(index.rank, words.R_GENERATION, generation)
        self._note = RankNote(ranks, index, identity)
        self._save()
        self.publish()

    @property
    def rank(self) -> int:
        """Which rank of the tree it writes."""
        return self._index.rank

    def expect(self, *, is_bigram: bool) -> None:
        """See RankIndex; the rank's row follows at once, before `stop`."""
        self._index.expect(is_bigram=is_bigram)
        os.eventfd_write(self._wake_fd, 1)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Tell the thread to leave; returns at once. Nothing of this rank is found, nor reaches the tree, after this call; then `wipe`."""
        self._is_stopping.set()
        self._note.unsave()
        self._index.retire()
        os.eventfd_write(self._wake_fd, 1)

    def wipe(self, beat: Callable[[], None] | None = None) -> None:
        """Clear the rank, behind `stop`: 0.3 us a block. beat: called now and then meanwhile."""
        self._index.wipe(beat)

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end and release what it had; False when it did not end in time (it stays harmless)."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self._index.release()
        os.close(self._wake_fd)
        return True

    def publish(self) -> None:
        """Bring the rank's row of shared memory up to date."""
        if self._is_stopping.is_set():
            return
        stream, index = self._stream, self._index
        state, reason = stream.status()
        if index.mismatch and state in (RANK_EXACT, RANK_DEGRADED):
            state, reason = RANK_DEGRADED, index.mismatch_reason
        row = {
            words.R_BATCHES: stream.counters.batches,
            words.R_EVENTS: index.counters.events,
            words.R_BLOCKS_STORED: index.counters.blocks_stored,
            words.R_BLOCKS_REMOVED: index.counters.blocks_removed,
            words.R_GAPS: stream.counters.gaps,
            words.R_DUPLICATES: stream.counters.duplicates,
            words.R_RESTARTS: stream.counters.restarts,
            words.R_UNDECODED: index.counters.undecoded,
            words.R_REPLAYS: stream.counters.replays,
            words.R_GIVE_UPS: stream.counters.give_ups,
            words.R_OWNED_BLOCKS: index.owned_blocks,
            words.R_LAST_EVENT_MS: index.last_event_ms,
            words.R_LAST_SEQ: stream.next_seq or 0,
            words.R_MISSING: stream.missing_batches,
            words.R_ORPHANS: index.counters.orphans,
            words.R_REASON: reason,
            words.R_STATE: state,
        }
        for word, value in row.items():
            if self._published.get(word) != value:
                self._ranks.set(index.rank, word, value)
        self._published = row

    def _save(self) -> None:
        """Note for the next index process how far the blocks are."""
        if not self._is_stopping.is_set():
            self._note.save(self._stream.resume)

    def _unsave(self) -> None:
        if not self._is_stopping.is_set():
            self._note.unsave()

    def publish_size(self) -> None:
        """Bring the number of owned blocks up to date, from another thread: eviction changes it without an event of this rank."""
        if not self._is_stopping.is_set():
            self._ranks.set(self._index.rank, words.R_OWNED_BLOCKS, self._index.owned_blocks)

    # ---- what the stream asks for (Sink) ----

    def apply(self, payload: bytes) -> Outcome:
        """Apply one batch to the tree."""
        return self._index.apply(payload)

    def clear(self, why: str) -> None:
        """Forget the rank's blocks and say why."""
        self._unsave()
        n_blocks = self._index.clear()
        now_s = time.monotonic()
        if now_s >= self._clears_from_s + _TOLD_IN_S:
            if self._clears > _TOLD_CLEARS:
                self._log.warning("KV events: this rank's blocks were forgotten %d times more since then", self._clears - _TOLD_CLEARS)
            self._clears_from_s, self._clears = now_s, 0
        self._clears += 1
        if self._clears <= _TOLD_CLEARS:
            self._log.warning("KV events: %s; %d blocks of this rank are forgotten", why, n_blocks)

    def ask_replay(self, start_seq: int) -> None:
        """Send a replay request on a new socket."""
        self._close_dealer()
        assert self._endpoints.replay is not None
        dealer = self._context.socket(zmq.DEALER)
        self._dealer = dealer
        connect(dealer, self._endpoints.replay)
        dealer.send_multipart(replay_request(start_seq), zmq.NOBLOCK)
        self._poller.register(dealer, zmq.POLLIN)

    # ---- the thread ----

    def _run(self) -> None:
        while not self._is_stopping.is_set():
            try:
                self._follow()
            except Exception:
                self._log.exception("the KV event stream failed; it starts again in %g s with no blocks known", _RESTART_DELAY_S)
                self._unsave()
                self._index.clear()
                counters = self._stream.counters
                self._stream = RankStream(self, has_replay=self._endpoints.replay is not None, limits=self._limits)
                self._stream.counters = counters
                self.publish()
                self._is_stopping.wait(_RESTART_DELAY_S)

    def _follow(self) -> None:
        """Poll until `stop`, or until the connection has to be made anew; all sockets are closed on the way out."""
        self._reopen_at_s = time.monotonic() + _REOPEN_S if self._is_down else None
        self._poller = poller = zmq.Poller()
        live = self._context.socket(zmq.SUB)
        monitor = live.get_monitor_socket(_NOTICES)
        try:
            live.setsockopt(zmq.SUBSCRIBE, self._endpoints.topic)
            connect(live, self._endpoints.live)
            reader = LiveSocket(live, self._endpoints.topic if self._endpoints.is_shared else None)
            for source in (self._wake_fd, monitor, live):
                poller.register(source, zmq.POLLIN)
            notices: list[int] = []
            while True:
                ready = dict(poller.poll(self._poll_timeout_ms()))
                if self._is_stopping.is_set():
                    return
                if self._wake_fd in ready:
                    os.eventfd_read(self._wake_fd)
                if monitor in ready:
                    notices += self._read_notices(monitor)
                self._n_read = 0
                is_drained = self._read_live(reader) if live in ready or notices else True
                self._save()
                if is_drained:
                    self._tell(notices)
                    notices = []
                if self._dealer is not None and self._dealer in ready:
                    self._read_replay(self._dealer)
                self._stream.on_time(time.monotonic())
                self._save()
                if not self._stream.is_asking:
                    self._close_dealer()
                self.publish()
                if is_drained and not self._stream.is_asking:
                    self._rest(self._n_read)
                if self._reopen_at_s is not None and is_drained and time.monotonic() >= self._reopen_at_s:
                    return
        finally:
            self._close_dealer()
            live.disable_monitor()
            monitor.close(linger=0)
            live.close(linger=0)

    def _rest(self, n_messages: int) -> None:
        """Behind a round that has read all live messages, `n_messages`: let more of them come first, if many do."""
        if not n_messages:
            return
        if n_messages > 1 or time.monotonic() < self._busy_until_s:
            time.sleep(_NAP_S)
        self._busy_until_s = time.monotonic() + _BUSY_BELOW_S

    def _poll_timeout_ms(self) -> int | None:
        deadlines_s = [at_s for at_s in (self._stream.deadline_s, self._reopen_at_s) if at_s is not None]
        return max(0, int((min(deadlines_s) - time.monotonic()) * 1000) + 1) if deadlines_s else None

    def _read_live(self, live: LiveSocket) -> bool:
        """Read what is there, a round at most; True when nothing is left."""
        left = _ROUND_MESSAGES
        while left > 0 and not self._is_stopping.is_set():
            seq = self._stream.steady_seq
            payloads, ends, frames, n_messages, is_drained = live.read(seq, left, _RUN_BYTES)
            left -= n_messages
            self._n_read += n_messages
            if seq is not None and ends:
                self._apply_run(Run(seq, payloads, ends))
            if frames is not None:
                self._read_one(frames)
            if is_drained:
                return True
        return False

    def _apply_run(self, run: Run) -> None:
        """Batches that were next in line: those that are not usual go the way of any live message."""
        at, stream = 0, self._stream
        while at < len(run) and not self._is_stopping.is_set():
            if stream.steady_seq == run.first_seq + at:
                n_batches, outcome = self._index.apply_run(run, at)
                if n_batches:
                    at += n_batches
                    stream.on_applied(n_batches, run.payload(at - 1), outcome)
                    continue
            stream.on_live(run.first_seq + at, run.payload(at), time.monotonic())
            at += 1

    def _read_one(self, frames: list[bytes]) -> None:
        try:
            seq, payload = parse_live(frames)
        except KvEventError as error:
            self._index.note_undecoded(str(error))
            return
        self._stream.on_live(seq, payload, time.monotonic())

    def _read_replay(self, dealer: zmq.Socket[bytes]) -> None:
        for _ in range(_ROUND_MESSAGES):
            if dealer is not self._dealer or self._is_stopping.is_set():
                return  # what was just read made the stream ask anew
            try:
                frames = dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                item = parse_replay(frames)
            except KvEventError as error:
                self._index.note_undecoded(str(error))
                continue
            if item is None:
                self._stream.on_replay_end(time.monotonic())
                self._save()
            else:
                self._stream.on_replay(*item, time.monotonic())
                self._save()

    def _read_notices(self, monitor: zmq.Socket[bytes]) -> list[int]:
        events = []
        while monitor.poll(0):
            events.append(int(recv_monitor_message(monitor)["event"]))
        return events

    def _tell(self, notices: list[int]) -> None:
        for event in notices:
            if event == zmq.EVENT_DISCONNECTED:
                if not self._is_down:  # else somebody lets us in and says nothing, ten times a second
                    self._log.info("KV event stream disconnected")
                    self._reopen_at_s = time.monotonic() + _REOPEN_S
                self._is_down = True
                self._stream.on_disconnected()
            else:
                self._log.info("KV event stream connected")
                self._is_down, self._reopen_at_s = False, None
                self._stream.on_connected(time.monotonic())

    def _close_dealer(self) -> None:
        if self._dealer is not None:
            self._poller.unregister(self._dealer)
            self._dealer.close(linger=0)
            self._dealer = None
