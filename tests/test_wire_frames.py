"""ZMQ frames against what sglang's own publisher put on its sockets."""

import json
from pathlib import Path
from typing import Any

import pytest

from sglfast.errors import KvEventError
from sglfast.wire import frames, kv_events

GOLDEN = Path(__file__).parent / "golden" / "kv_events" / "wire"


def load(version: str) -> dict[str, Any]:
    wire = json.loads((GOLDEN / f"{version}.json").read_text())
    assert isinstance(wire, dict)
    return wire


def raw(message: list[str]) -> list[bytes]:
    return [bytes.fromhex(frame) for frame in message]


@pytest.fixture(params=[("0.5.13", "old"), ("0.5.23", "new")], ids=["0.5.13", "0.5.23"])
def recorded(request: pytest.FixtureRequest) -> tuple[dict[str, Any], Any]:
    version, shape = request.param
    return load(version), shape


def test_live_messages(recorded: tuple[dict[str, Any], Any]) -> None:
    wire, _ = recorded
    for rank, messages in enumerate(wire["live"]):
        assert len(messages) == 8
        for seq, message in enumerate(messages):
            parsed_seq, payload = frames.parse_live(raw(message))
            assert parsed_seq == seq
            assert frames.live_frames(wire["topic"].encode(), seq, payload) == raw(message)
            batch = kv_events.decode_batch(payload)
            assert (batch.rank, batch.undecoded) == (rank, 0)
            assert batch.events


def test_replay_messages(recorded: tuple[dict[str, Any], Any]) -> None:
    wire, shape = recorded
    topic = wire["topic"].encode()
    for rank, messages in enumerate(wire["replay_from_0"]):
        parsed = [frames.parse_replay(raw(message)) for message in messages]
        assert parsed[-1] is None
        assert frames.replay_end(shape) == raw(messages[-1])
        assert parsed[:-1] == [frames.parse_live(raw(message)) for message in wire["live"][rank]]
        for item, message in zip(parsed[:-1], messages[:-1], strict=True):
            assert item is not None
            assert frames.replay_data(topic, *item, shape=shape) == raw(message)


def test_replay_from_the_middle_and_beyond(recorded: tuple[dict[str, Any], Any]) -> None:
    wire, _ = recorded
    parsed = [frames.parse_replay(raw(message)) for message in wire["replay_from_5"]]
    assert [item and item[0] for item in parsed] == [5, 6, 7, None]
    for name in ("replay_from_9999", "replay_minus1"):
        assert [frames.parse_replay(raw(message)) for message in wire[name]] == [None]


def test_req_client_loses_the_delimiter_and_is_still_parsed(recorded: tuple[dict[str, Any], Any]) -> None:
    wire, _ = recorded
    parsed = frames.parse_replay(raw(wire["REQ_first_reply"]))
    assert parsed is not None
    kv_events.decode_batch(parsed[1])


def test_replay_requests() -> None:
    assert frames.replay_request(0) == [b"", bytes(8)]
    assert frames.replay_request(5) == [b"", b"\0" * 7 + b"\x05"]
    for start in (0, 5, 2**62):
        assert frames.parse_replay_request(frames.replay_request(start)) == start
    assert frames.parse_replay_request([b"", b""]) == 0  # as the engine answered in the recording
    assert frames.parse_replay_request([b"", b"\x02"]) == 2
    assert frames.parse_replay_request([b"\0" * 8]) is None
    assert frames.parse_replay_request([b"x", b"\0" * 8]) is None


@pytest.mark.parametrize("message", [[], [b""], [b"", bytes(8)], [b"", bytes(8), b"", b""], [b"", bytes(7), b""], [b"", b"", b""]])
def test_bad_live_message(message: list[bytes]) -> None:
    with pytest.raises(KvEventError):
        frames.parse_live(message)


def test_negative_sequence_on_the_live_socket() -> None:
    with pytest.raises(KvEventError, match="-1"):
        frames.parse_live([b"", frames.END_SEQ, b""])


@pytest.mark.parametrize("message", [[], [b"x"], [b"", bytes(4), b"x"], [b"", b"\x80" + bytes(7), b"x"]])
def test_bad_replay_message(message: list[bytes]) -> None:
    with pytest.raises(KvEventError):
        frames.parse_replay(message)
