"""One request between its arrival and its end: on a regular worker, on a prefill worker, on a decode worker.

Runs in: sim, on the event loop. Contract: a job ends in exactly one way: answered, failed (5xx), aborted (`cut`), left by its client
    (`leave`), or dropped with its worker (`drop`). Whichever it is, the engine's blocks, the room and the timer are given back.

    Job          prompt -> engine -> answer
    PrefillJob   prompt -> engine, which keeps the prompt's KV -> room -> fetched by a decode worker -> answer of one token
    DecodeJob    prompt -> fetched from the room -> engine, which computes nothing of the prompt -> answer
"""

import asyncio
from typing import Protocol

from sglfast.sim.answers import Answer
from sglfast.sim.engine import Engine, Generation
from sglfast.sim.pacer import Pacer
from sglfast.sim.requests import Bootstrap
from sglfast.sim.rooms import Rooms, TransferError, fetch


class Seat(Protocol):
    """The data-parallel rank that works on a job."""

    engine: Engine
    pacer: Pacer


class Desk(Protocol):
    """Whom a job belongs to."""

    def forget(self, job: "Job") -> None:
        """Take a job out of the register."""

    def count_abort(self, job: "Job") -> None:
        """A job ended before its answer did."""

    def fail(self, job: "Job", message: str) -> None:
        """Answer with status 500 and forget the job."""


class Job:
    """See the module. generation: None while its prompt is being tokenized.

    is_gone: there is nobody left to answer; is_cut: /abort_request wants the answer to end.
    """

    __slots__ = ("answer", "desk", "generation", "is_cut", "is_gone", "rank")

    # Whether the engine keeps the prompt's blocks when it is through with it, see Generation.
    keeps_kv = False

    def __init__(self, desk: Desk, answer: Answer, rank: Seat) -> None:
        self.desk = desk
        self.answer = answer
        self.rank = rank
        self.generation: Generation | None = None
        self.is_gone = False
        self.is_cut = False

    def begin(self, generation: Generation) -> None:
        """The prompt was read: go on with it."""
        self.generation = generation
        self.answer.attach(generation)
        if self.is_cut:
            self.cut()
        else:
            self.start(generation)

    def start(self, generation: Generation) -> None:
        """Hand it to the engine."""
        self.rank.pacer.submit(generation)

    def progress(self) -> None:
        """Pass the engine's news on, and let go after the last. The engine's Sink."""
        assert self.generation is not None
        if self.generation.is_finished:
            self.desk.forget(self)
        self.answer.progress()

    def leave(self) -> None:
        """The client is gone."""
        self.is_gone = True
        self.release("its client left")
        self.desk.forget(self)
        self.desk.count_abort(self)
        if self.generation is not None:
            self.rank.engine.abort(self.generation)

    def cut(self) -> None:
        """End the answer where it is."""
        self.is_cut = True
        self.release("it was aborted")
        if self.generation is None:
            return  # the end of tokenizing comes back here
        self.desk.forget(self)
        self.desk.count_abort(self)
        self.rank.engine.abort(self.generation)
        self.answer.progress()

    def drop(self) -> None:
        """The worker is gone, and with it the engine: forget everything without a word."""
        self.is_gone = True
        self.release("its worker stopped")
        self.desk.forget(self)
        self.desk.count_abort(self)

    def release(self, cause: str) -> None:
        """Give back what is not the engine's; nothing on a regular worker. More than once is no error."""


class PrefillJob(Job):
    """The prefill half of a request. It is in its room from the beginning, so that an early abort is told to the decode worker.

    Raises ValueError when the room is taken.
    """

    __slots__ = ("_room", "_rooms", "_timeout_s", "_timer")

    keeps_kv = True

    def __init__(self, desk: Desk, answer: Answer, rank: Seat, rooms: Rooms, room: int, timeout_s: float) -> None:
        super().__init__(desk, answer, rank)
        rooms.enter(room, self)
        self._rooms: Rooms | None = rooms
        self._room = room
        self._timeout_s = timeout_s
        self._timer: asyncio.TimerHandle | None = None

    def progress(self) -> None:
        """Wait for the decode worker when the prompt is complete."""
        assert self.generation is not None
        if self.generation.is_finished and self._rooms is not None:
            self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._give_up)
            self._rooms.fill(self._room, self.generation.token_ids, self.generation.cached_tokens)

    def transferred(self) -> None:
        """The decode worker has the prompt: free its blocks and answer."""
        assert self.generation is not None
        self._rooms = None
        self.release("")
        self.rank.engine.free(self.generation)
        self.desk.forget(self)
        self.answer.progress()

    def transfer_failed(self, cause: str) -> None:
        """Nobody will fetch it."""
        self._rooms = None
        self.release(cause)
        if self.generation is not None:
            self.rank.engine.abort(self.generation)
        self.is_gone = True  # for the end of tokenizing
        self.desk.fail(self, f"Prefill transfer failed: {cause}")

    def release(self, cause: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        rooms, self._rooms = self._rooms, None
        if rooms is not None:
            rooms.leave(self._room, f"the prefill request ended: {cause}")

    def _give_up(self) -> None:
        cause = f"no decode worker fetched room {self._room} within {self._timeout_s:g} s"
        self.release(cause)
        self.transfer_failed(cause)


class DecodeJob(Job):
    """The decode half of a request. bootstrap: where its prompt's KV cache is; its port is known."""

    __slots__ = ("_bootstrap", "_fetching", "_timeout_s")

    def __init__(self, desk: Desk, answer: Answer, rank: Seat, bootstrap: Bootstrap, timeout_s: float) -> None:
        super().__init__(desk, answer, rank)
        self._bootstrap = bootstrap
        self._timeout_s = timeout_s
        self._fetching: asyncio.Task[int] | None = None

    def start(self, generation: Generation) -> None:
        """Fetch the prompt first."""
        at = self._bootstrap
        fetching = fetch(at.host, at.port, at.room, generation.token_ids, self._timeout_s)
        self._fetching = asyncio.get_running_loop().create_task(fetching)
        self._fetching.add_done_callback(self._fetched)

    def _fetched(self, task: "asyncio.Task[int]") -> None:
        self._fetching = None
        if task.cancelled():
            return
        error = task.exception()
        if self.is_gone or self.is_cut:
            return
        assert self.generation is not None
        if isinstance(error, TransferError):
            self.desk.fail(self, f"Decode transfer failed: {error}")
            return
        self.generation.is_transferred = True
        self.generation.cached_tokens = task.result()
        self.rank.pacer.submit(self.generation)

    def release(self, cause: str) -> None:
        if self._fetching is not None:
            self._fetching.cancel()
