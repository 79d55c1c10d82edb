"""The thread of one rank over real sockets: what is lost, comes back, restarts or cannot be read, and stopping at once."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import zmq
from kv_house import SHORT, House
from kv_publisher import removed, stored, wait_until

from sglfast import _counters as words
from sglfast._counters import RANK_DEGRADED, RANK_EXACT, RANK_SYNCING
from sglfast.index.held import Limits
from sglfast.index.live import Run
from sglfast.index.sink import Outcome
from sglfast.index.stream_state import DISCONNECTED, FORGOTTEN, LOST, UNKNOWN_HISTORY
from sglfast.index.subscriber import connect
from sglfast.shm import RANK_REASONS


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.close()


def test_nothing_is_dropped_on_our_side(house: House) -> None:
    """A receive limit of messages makes the publisher drop what a burst has too many of."""
    for kind in (zmq.SUB, zmq.DEALER):
        with house.context.socket(kind) as source:
            connect(source, "tcp://127.0.0.1:9")
            assert (source.getsockopt(zmq.RCVHWM), source.getsockopt(zmq.LINGER)) == (0, 0)


@pytest.mark.parametrize("topic", [b"", b"kv@pod-1@model"])
def test_follows_from_the_first_batch(house: House, topic: bytes) -> None:
    engine = house.publisher(has_replay=False, topic=topic)
    follower = house.joined(engine)
    engine.publish(stored(1, 4))
    engine.publish(stored(2, 3), removed(1, 4))
    engine.publish(stored(3, 2))
    wait_until(lambda: follower.word(words.R_BATCHES) == 3, engine)
    assert [follower.overlap(conversation) for conversation in (1, 2, 3)] == [0, 3, 2]
    assert follower.state == (RANK_EXACT, 0)
    expected = {
        words.R_LAST_SEQ: 3,
        words.R_EVENTS: 4,
        words.R_BLOCKS_STORED: 9,
        words.R_BLOCKS_REMOVED: 4,
        words.R_OWNED_BLOCKS: 5,
        words.R_GENERATION: 9,
        words.R_UNDECODED: 0,
        words.R_GAPS: 0,
        words.R_RESTARTS: 0,
    }
    assert {word: follower.word(word) for word in expected} == expected
    assert abs(follower.word(words.R_LAST_EVENT_MS) - time.time() * 1000) < 60_000


def test_another_topic_is_not_heard(house: House) -> None:
    engine = house.publisher(has_replay=False, topic=b"kv")
    follower = house.joined(engine)
    engine.send([b"load", bytes(8), b"\x90"])
    engine.publish(stored(1, 4))
    wait_until(lambda: follower.word(words.R_BATCHES) == 1, engine)
    assert follower.word(words.R_UNDECODED) == 0


@pytest.mark.parametrize("shape", ["new", "old"])
def test_history_before_the_subscription_is_replayed(house: House, shape: str) -> None:
    engine = house.publisher(has_replay=True, shape=shape)
    for conversation in range(1, 6):
        engine.publish(stored(conversation, 4))
    follower = house.joined(engine)
    wait_until(lambda: follower.state == (RANK_EXACT, 0), engine)
    assert [follower.overlap(conversation) for conversation in range(1, 6)] == [4] * 5
    assert engine.requests == [0]


def test_history_without_replay_stays_unknown(house: House) -> None:
    engine = house.publisher(has_replay=False)
    engine.publish(stored(1, 4))
    follower = house.joined(engine)
    engine.publish(stored(2, 4))
    wait_until(lambda: follower.overlap(2) == 4, engine)
    wait_until(lambda: follower.state == (RANK_DEGRADED, UNKNOWN_HISTORY), engine)
    assert follower.overlap(1) == 0


def test_gap_without_replay_forgets_the_rank(house: House) -> None:
    engine = house.publisher(has_replay=False)
    follower = house.joined(engine)
    engine.publish(stored(1, 4))
    engine.publish(removed(1, 4), is_lost=True)
    engine.publish(stored(2, 4))
    wait_until(lambda: follower.word(words.R_BATCHES) == 2, engine)
    assert (follower.overlap(1), follower.overlap(2)) == (0, 4)
    assert follower.state == (RANK_DEGRADED, FORGOTTEN)
    assert follower.word(words.R_GAPS) == 1


def test_gap_with_replay_is_filled_in_order(house: House) -> None:
    """A removal is lost, the same blocks come again and go again: only the right order gives the right answer."""
    engine = house.publisher(has_replay=True)
    follower = house.joined(engine)
    engine.publish(stored(1, 4))
    wait_until(lambda: follower.state == (RANK_EXACT, 0) and follower.overlap(1) == 4, engine)
    engine.publish(removed(1, 4), stored(2, 4), is_lost=True)
    engine.publish(stored(1, 2), is_lost=True)
    engine.publish(removed(2, 4), stored(3, 4))
    wait_until(lambda: follower.word(words.R_BATCHES) == 4 and follower.state == (RANK_EXACT, 0), engine)
    assert [follower.overlap(conversation) for conversation in (1, 2, 3)] == [2, 0, 4]
    assert (follower.word(words.R_GAPS), follower.word(words.R_RESTARTS)) == (1, 0)
    assert engine.requests[-1] == 0  # from the last applied one, which is compared


def test_replay_with_holes_is_asked_again(house: House) -> None:
    engine = house.publisher(has_replay=True)
    engine.hidden = [{2, 3, 7}, {7}]
    for conversation in range(10):
        engine.publish(stored(conversation, 4))
    follower = house.joined(engine)
    wait_until(lambda: follower.state == (RANK_EXACT, 0), engine)
    assert [follower.overlap(conversation) for conversation in range(10)] == [4] * 10
    assert engine.requests == [0, 1, 6]
    assert follower.word(words.R_REPLAYS) == 3


def test_hole_that_stays_forgets_what_came_before(house: House) -> None:
    engine = house.publisher(has_replay=True)
    engine.hidden = [{2}] * 9
    for conversation in range(5):
        engine.publish(stored(conversation, 4))
    follower = house.joined(engine)
    wait_until(lambda: follower.state == (RANK_DEGRADED, FORGOTTEN), engine)
    assert [follower.overlap(conversation) for conversation in range(5)] == [0, 0, 0, 4, 4]
    assert follower.word(words.R_GIVE_UPS) == 1
    engine.publish(stored(7, 4))
    wait_until(lambda: follower.overlap(7) == 4, engine)


def test_mute_replay_socket_does_not_stop_the_live_stream(house: House) -> None:
    engine = house.publisher(has_replay=True)
    engine.is_mute = True
    engine.publish(stored(1, 4))
    follower = house.joined(engine, limits=SHORT)
    engine.publish(stored(2, 4))
    wait_until(lambda: follower.overlap(2) == 4, engine)
    wait_until(lambda: follower.state == (RANK_DEGRADED, UNKNOWN_HISTORY), engine)
    assert follower.word(words.R_GIVE_UPS) == 1


def test_a_replay_socket_that_was_down_for_a_while_heals_the_rank(house: House) -> None:
    """A gap while it is mute, then it answers: neither the worker nor its live socket is touched."""
    engine = house.publisher(has_replay=True)
    limits = Limits(replay_timeout_s=0.2, max_tries=2, first_look_s=0.1, last_look_s=0.4)
    follower = house.joined(engine, limits=limits)
    engine.publish(stored(1, 4))
    wait_until(lambda: follower.state == (RANK_EXACT, 0) and follower.overlap(1) == 4, engine)
    engine.is_mute = True
    engine.publish(stored(2, 4), is_lost=True)
    engine.publish(stored(3, 4))
    wait_until(lambda: follower.state == (RANK_DEGRADED, FORGOTTEN), engine)
    assert [follower.overlap(conversation) for conversation in (1, 2, 3)] == [0, 0, 4]
    asked = follower.word(words.R_REPLAYS)
    engine.publish(stored(4, 4))
    wait_until(lambda: follower.word(words.R_REPLAYS) >= asked + 2 and follower.overlap(4) == 4, engine, what="looks and live events")
    assert follower.state == (RANK_DEGRADED, FORGOTTEN)
    engine.is_mute = False
    wait_until(lambda: follower.state == (RANK_EXACT, 0), engine)
    assert [follower.overlap(conversation) for conversation in (1, 2, 3, 4)] == [4] * 4
    engine.publish(removed(3, 4))
    wait_until(lambda: follower.overlap(3) == 0, engine)
    assert (follower.state, follower.word(words.R_RESTARTS)) == ((RANK_EXACT, 0), 0)
    asked = follower.word(words.R_REPLAYS)
    time.sleep(0.6)
    assert follower.word(words.R_REPLAYS) == asked, "it is left in peace"


@pytest.mark.parametrize("has_replay", [False, True])
def test_undecodable_in_between(house: House, has_replay: bool) -> None:
    engine = house.publisher(has_replay=has_replay)
    follower = house.joined(engine)
    engine.publish(stored(1, 4))
    engine.publish_raw(b"\xc1 this is no batch")
    engine.send([b"", b"short", b""])
    engine.send([b"two", b"frames"])
    engine.publish(stored(2, 4))
    wait_until(lambda: follower.word(words.R_BATCHES) == 3, engine)
    assert (follower.overlap(1), follower.overlap(2)) == (4, 4)
    wait_until(lambda: follower.state == (RANK_DEGRADED, LOST), engine)
    assert follower.word(words.R_UNDECODED) == 3
    assert follower.word(words.R_GAPS) == 0


@pytest.mark.parametrize("has_replay", [False, True])
@pytest.mark.parametrize("n_unseen", [0, 1, 3])
def test_restart(house: House, has_replay: bool, n_unseen: int) -> None:
    """Numbers from 0 again, the first of them lost while ZMQ reconnects; with n_unseen = 3 the next just fits the old line."""
    engine = house.publisher(has_replay=has_replay)
    follower = house.joined(engine)
    for conversation in range(1, 6):
        engine.publish(stored(conversation, 4))
    wait_until(lambda: follower.word(words.R_BATCHES) == 5, engine)
    engine.close()
    if n_unseen == 3:
        wait_until(lambda: follower.state == (RANK_DEGRADED, DISCONNECTED), what="the disconnect")
    engine.restart()
    for conversation in range(n_unseen + 1):
        engine.publish(stored(10 + conversation, 4))
    house.subscribed(engine)
    engine.publish(stored(20, 4))
    expected_state = (RANK_EXACT, 0) if has_replay else (RANK_DEGRADED, UNKNOWN_HISTORY)
    wait_until(lambda: follower.overlap(20) == 4 and follower.state == expected_state, engine)
    assert [follower.overlap(conversation) for conversation in range(1, 6)] == [0] * 5
    assert [follower.overlap(10 + i) for i in range(n_unseen + 1)] == [4 if has_replay else 0] * (n_unseen + 1)
    assert follower.word(words.R_RESTARTS) == 1


SINGLES = RANK_REASONS.index("its blocks are keyed by single tokens, the worker says pairs of tokens (EAGLE)")


def test_mismatch_shows_in_the_row(house: House) -> None:
    engine = house.publisher(has_replay=False)
    follower = house.follow(engine.endpoint, None, is_bigram=True)
    house.subscribed(engine)
    engine.publish(stored(1, 4))
    wait_until(lambda: follower.state == (RANK_DEGRADED, SINGLES), engine)


def test_ranks_do_not_wait_for_each_other(house: House) -> None:
    """One rank waits for a replay that never comes, one dials nobody, the third is up to date meanwhile."""
    stuck, dead, quick = (house.publisher(has_replay=True) for _ in range(3))
    stuck.is_mute = True
    dead.close()
    followers = [house.follow(engine.endpoint, engine.replay_endpoint, rank=rank) for rank, engine in enumerate((stuck, dead, quick))]
    house.subscribed(stuck)
    house.subscribed(quick)
    for _ in range(2):
        stuck.publish(stored(1, 4), is_lost=True)
        stuck.publish(stored(2, 4))
    quick.publish(stored(3, 4))
    wait_until(lambda: followers[2].state == (RANK_EXACT, 0) and followers[2].overlap(3) == 4, stuck, quick)
    assert followers[0].word(words.R_STATE) == RANK_SYNCING
    assert followers[1].word(words.R_STATE) == RANK_SYNCING


def test_stop_is_prompt_whatever_goes_on(house: House) -> None:
    """Nobody listens, a replay is outstanding, or messages keep coming: the thread ends within a second."""
    nobody, mute, busy = (house.publisher(has_replay=True) for _ in range(3))
    nobody.close()
    mute.is_mute = True
    followers = [house.follow(engine.endpoint, engine.replay_endpoint, rank=rank) for rank, engine in enumerate((nobody, mute, busy))]
    house.subscribed(mute)
    house.subscribed(busy)
    mute.publish(stored(1, 4), is_lost=True)
    mute.publish(stored(2, 4))
    wait_until(lambda: followers[2].state == (RANK_EXACT, 0), mute, busy)
    for conversation in range(3000):
        busy.publish(stored(conversation % 100, 8))
    house.followers.clear()
    for follower in followers:
        follower.subscriber.stop()
        follower.subscriber.wipe()
    assert [follower.subscriber.join(1.0) for follower in followers] == [True] * 3
    assert house.tree.writer.live_blocks == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kv-rank")]


def test_stop_in_the_middle_of_a_backlog(house: House) -> None:
    """What is left of it reaches the tree no more."""
    engine = house.publisher(has_replay=False)
    follower = house.joined(engine)
    for conversation in range(20_000):
        engine.publish(stored(conversation % 200, 4))
    wait_until(lambda: follower.word(words.R_BATCHES) > 100, engine)
    house.followers.clear()
    follower.subscriber.stop()
    follower.subscriber.wipe()
    n_batches = follower.word(words.R_BATCHES)
    assert follower.subscriber.join(1.0)
    assert house.tree.writer.live_blocks == 0
    assert follower.word(words.R_BATCHES) == n_batches


def test_thread_that_fails_starts_again(house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("sglfast.index.subscriber._RESTART_DELAY_S", 0.05)
    engine = house.publisher(has_replay=True)
    follower = house.joined(engine)
    engine.publish(stored(1, 4))
    wait_until(lambda: follower.overlap(1) == 4 and follower.state == (RANK_EXACT, 0), engine)
    apply_run = follower.index.apply_run

    def fail_once(run: Run, first: int) -> tuple[int, Outcome]:
        follower.index.apply_run = apply_run  # type: ignore[method-assign]
        raise RuntimeError("planted")

    follower.index.apply_run = fail_once  # type: ignore[method-assign]
    engine.publish(stored(2, 4))
    wait_until(lambda: follower.overlap(2) == 4 and follower.state == (RANK_EXACT, 0), engine)
    assert follower.overlap(1) == 4
    assert "planted" in caplog.text


def test_ipv6(house: House) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    engine = house.publisher(has_replay=True, host="[::1]")
    engine.publish(stored(1, 4))
    follower = house.joined(engine)
    wait_until(lambda: follower.state == (RANK_EXACT, 0), engine)
    assert follower.overlap(1) == 4
