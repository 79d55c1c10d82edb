"""Connections to a rank's publisher that are lost, given up or of no use; what each of them leaves in the log."""

import logging
import socket
import time
from collections.abc import Iterator

import pytest
from kv_house import House
from kv_publisher import WAIT_S, stored, wait_until

from sglfast import _counters as words
from sglfast._counters import RANK_DEGRADED, RANK_EXACT
from sglfast.index.held import Limits
from sglfast.index.stream_state import DISCONNECTED


@pytest.fixture
def house() -> Iterator[House]:
    house = House()
    yield house
    house.close()


def test_lost_connection_is_told_and_found_again(house: House) -> None:
    """The engine's host is away for a while, its process lives on: the index is kept, and what was missed is replayed."""
    engine = house.publisher(has_replay=True)
    follower = house.joined(engine)
    engine.publish(stored(1, 4))
    wait_until(lambda: follower.state == (RANK_EXACT, 0) and follower.overlap(1) == 4, engine)
    seq, buffer = engine.seq, list(engine.buffer)
    engine.close()
    wait_until(lambda: follower.state == (RANK_DEGRADED, DISCONNECTED), what="the disconnect")
    assert follower.overlap(1) == 4
    engine.restart()
    engine.seq, engine.buffer = seq, buffer
    engine.publish(stored(2, 4), is_lost=True)
    wait_until(lambda: follower.state == (RANK_EXACT, 0), engine)
    assert (follower.overlap(1), follower.overlap(2)) == (4, 4)
    assert follower.word(words.R_RESTARTS) == 0


@pytest.mark.parametrize("has_replay", [False, True])
def test_a_connection_that_zmq_gives_up_is_made_anew(house: House, monkeypatch: pytest.MonkeyPatch, has_replay: bool) -> None:
    """A message above the limit breaks the protocol, and after that ZMQ never connects again."""
    monkeypatch.setattr("sglfast.index.subscriber._MAX_MESSAGE_BYTES", 100_000)
    monkeypatch.setattr("sglfast.index.subscriber._REOPEN_S", 0.2)
    engine = house.publisher(has_replay=has_replay)
    follower = house.joined(engine, limits=Limits(replay_timeout_s=0.3))
    engine.publish(stored(1, 4))
    wait_until(lambda: follower.overlap(1) == 4, engine)
    engine.publish_raw(bytes(200_000))
    wait_until(lambda: follower.word(words.R_STATE) != RANK_EXACT, engine)

    def is_heard() -> bool:
        engine.publish(stored(2, 4))
        return follower.overlap(2) == 4

    wait_until(is_heard, engine)
    assert follower.overlap(1) == 0, "what the large one said is not known"


def test_one_that_lets_us_in_and_hangs_up_fills_no_log(house: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with socket.create_server(("127.0.0.1", 0)) as wrong:
        wrong.settimeout(WAIT_S)
        port = wrong.getsockname()[1]
        follower = house.follow(f"tcp://127.0.0.1:{port}", None)
        for _ in range(5):
            wrong.accept()[0].close()
    engine = house.publisher(has_replay=False, port=port)
    house.subscribed(engine)
    engine.publish(stored(1, 4))
    wait_until(lambda: follower.state == (RANK_EXACT, 0), engine, what="the engine that comes to the same port")
    assert caplog.text.count("KV event stream disconnected") == 1
    assert caplog.text.count("KV event stream connected") == 1


def test_a_stream_of_nonsense_fills_no_log(house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("sglfast.index.subscriber._TOLD_IN_S", 0.5)
    engine = house.publisher(has_replay=False)
    follower = house.joined(engine)
    for _ in range(200):
        engine.publish(stored(1, 4), is_lost=True)
        engine.publish(stored(2, 4))
    wait_until(lambda: follower.word(words.R_GAPS) == 199, engine)
    time.sleep(0.5)
    engine.publish(stored(1, 4), is_lost=True)
    engine.publish(stored(2, 4))
    wait_until(lambda: follower.word(words.R_GAPS) == 200, engine)
    assert caplog.text.count("of this rank are forgotten") < 60
    assert "blocks were forgotten 1" in caplog.text, "how many lines are missing is told"
    assert follower.overlap(2) == 4
