"""sim/fault.py: what may be set, whom it hits, and what the damaging writers let through."""

import asyncio
from typing import Any

import pytest

from sglfast.sim import fault as fault_module
from sglfast.sim.fault import NO_FAULT, CutWriter, Fault, FaultSwitch, SlowWriter, parse_fault

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 30\r\n\r\n"
BODY = b"a body with an end\r\n\r\nin itself"


class Transport(asyncio.WriteTransport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[bytes] = []
        self.is_closed = False

    def write(self, data: Any) -> None:
        assert not self.is_closed
        self.pieces.append(bytes(data))

    def close(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed


def test_a_whole_fault() -> None:
    body = {"mode": "cut_body", "count": 2, "after_bytes": 0, "scope": "all", "share": 0.5}
    assert parse_fault(body) == Fault("cut_body", 2, 0, "all", 0.5)
    assert parse_fault(body).as_dict() == body
    assert parse_fault({"mode": "none"}) == NO_FAULT


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "JSON object"),
        ({"mode": "explode"}, "mode must be one of none, refuse"),
        ({"mode": ["hang"]}, "mode must be one of"),
        ({"mode": "hang", "count": 0}, "count must be"),
        ({"mode": "hang", "count": True}, "count must be"),
        ({"mode": "hang", "after_bytes": -1}, "after_bytes must be"),
        ({"mode": "hang", "scope": "some"}, "scope must be one of inference, all"),
        ({"mode": "hang", "times": 1}, "unknown field 'times'"),
        ({"mode": "hang", "share": 0}, "share must be"),
        ({"mode": "hang", "share": True}, "share must be"),
        ({"mode": "hang", "share": "0.5"}, "share must be"),
    ],
)
def test_a_fault_that_cannot_be_set_says_why(body: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_fault(body)


def test_the_switch_counts_down_and_turns_itself_off() -> None:
    switch = FaultSwitch()
    assert switch.take(is_inference=True) is NO_FAULT
    switch.fault = parse_fault({"mode": "hang", "count": 2})
    assert switch.take(is_inference=False).mode == "none"
    assert [switch.take(is_inference=True).mode for _ in range(3)] == ["hang", "hang", "none"]
    assert (switch.fault, switch.hits) == (NO_FAULT, 2)
    switch.fault = parse_fault({"mode": "refuse", "scope": "all"})
    assert [switch.take(is_inference=i % 2 == 0).mode for i in range(5)] == ["refuse"] * 5


def test_a_share_of_the_requests_is_hit() -> None:
    switch = FaultSwitch(seed=1)
    switch.fault = parse_fault({"mode": "error_500", "share": 0.3})
    hits = sum(switch.take(is_inference=True).mode == "error_500" for _ in range(2000))
    assert hits == switch.hits
    assert 500 < hits < 700
    switch.fault = parse_fault({"mode": "error_500", "share": 0.3, "count": 5})
    assert sum(switch.take(is_inference=True) is not NO_FAULT for _ in range(200)) == 5


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("counts_body", [False, True])
@pytest.mark.parametrize("after_bytes", [0, 1, 25])
def test_cut_lets_exactly_so_much_through(size: int, counts_body: bool, after_bytes: int) -> None:
    transport = Transport()
    writer = CutWriter(transport, after_bytes, counts_body=counts_body)
    answer = HEAD + BODY
    for at in range(0, len(answer), size):
        writer.write(answer[at : at + size])
    expected = answer[: len(HEAD) + after_bytes] if counts_body else answer[:after_bytes]
    assert b"".join(transport.pieces) == expected
    assert transport.is_closed


def test_cut_behind_the_end_of_a_short_answer_cuts_nothing() -> None:
    transport = Transport()
    writer = CutWriter(transport, 1000, counts_body=True)
    writer.write(HEAD + BODY)
    assert b"".join(transport.pieces) == HEAD + BODY
    assert not transport.is_closed
    writer.close()
    assert transport.is_closed


def test_slow_sends_the_head_in_pieces_and_the_rest_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_module, "SLOW_PAUSE_S", 0.0)

    async def run() -> None:
        for closes_early in (False, True):
            transport = Transport()
            writer = SlowWriter(transport, asyncio.get_running_loop())
            writer.write(HEAD + BODY[:10])
            writer.write(BODY[10:])
            if closes_early:
                writer.close()
                assert not transport.is_closed
            assert transport.pieces == [HEAD[:8]]
            for _ in range(20):
                await asyncio.sleep(0)
            assert b"".join(transport.pieces) == HEAD + BODY
            assert [len(piece) for piece in transport.pieces[:-1]] == [8] * (len(HEAD) // 8)
            assert transport.is_closed is closes_early
            if not closes_early:
                writer.write(b"more")
                assert transport.pieces[-1] == b"more"
                writer.close()
                assert transport.is_closed

    asyncio.run(run())


def test_slow_stops_when_the_client_is_gone() -> None:
    async def run() -> None:
        transport = Transport()
        SlowWriter(transport, asyncio.get_running_loop()).write(HEAD)
        transport.close()
        await asyncio.sleep(2 * fault_module.SLOW_PAUSE_S)  # a write now would fail the transport's assertion
        assert len(transport.pieces) == 1

    asyncio.run(run())
