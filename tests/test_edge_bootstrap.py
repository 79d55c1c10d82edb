"""sglfast.edge.bootstrap: what both workers of a pair are told, and when it is a list."""

import json
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sglfast.edge.bootstrap import ROOMS_MAX, address_of, room_for, with_bootstrap
from sglfast.edge.pools import Pool, Route
from sglfast.edge.upstream import Upstream
from sglfast.shm import WorkerRecord

CHAT, COMPLETIONS, GENERATE, EMBEDDINGS = range(4)


def to(host: str = "10.0.0.1", port: int | None = 8998, dp_size: int = 1, **fields: Any) -> Route:
    """A route to a prefill worker."""
    record = WorkerRecord(url="http://x", role="prefill", bootstrap_port=port)
    upstream = SimpleNamespace(bootstrap=address_of(host, record), dp_size=dp_size, worker_idx=0)
    return Route(cast(Pool, None), cast(Upstream, upstream), 0, **fields)


def told(body: bytes, kind: int = CHAT, route: Route | None = None) -> dict[str, Any]:
    found = json.loads(with_bootstrap(body, kind, route or to()))
    assert isinstance(found, dict)
    return found


def test_one_answer() -> None:
    found = told(b'{"model":"m"}\n')
    assert 0 <= found.pop("bootstrap_room") < 1 << 63
    assert found == {"model": "m", "bootstrap_host": "10.0.0.1", "bootstrap_port": 8998}


def test_a_port_that_was_not_told_and_hosts_of_all_kinds() -> None:
    assert told(b"{}", route=to(port=None))["bootstrap_port"] is None
    assert told(b"{}", route=to(host="fd00::1"))["bootstrap_host"] == "fd00::1"
    assert told(b"{}", route=to(host='a"b'))["bootstrap_host"] == 'a"b'


def test_what_the_client_says_is_overwritten() -> None:
    found = told(b'{"bootstrap_host":"evil","bootstrap_port":1,"bootstrap_room":[1],"x":{"bootstrap_room":5}}')
    assert (found["bootstrap_host"], found["bootstrap_port"], found["x"]) == ("10.0.0.1", 8998, {"bootstrap_room": 5})
    assert isinstance(found["bootstrap_room"], int)


@pytest.mark.parametrize("body", [b"", b"[1]", b'"{}"', b"no JSON", b"\xff", b'\xef\xbb\xbf{"a":1}', '{"a":1}'.encode("utf-16-le")])
def test_what_is_no_object_stays_as_it_is(body: bytes) -> None:
    assert with_bootstrap(body, CHAT, to()) is body


@pytest.mark.parametrize(
    ("body", "kind", "count"),
    [
        (b'{"n":3}', CHAT, 3),
        (b'{"n":3.0}', CHAT, 3),
        (b'{"n":"3"}', CHAT, 0),
        (b'{"n":-3}', CHAT, 0),
        (b'{"n":1,"tools":[{"n":5}]}', CHAT, 0),
        (b'{"n":2,"n":4}', CHAT, 4),
        (b'{"prompt":["a","b"]}', COMPLETIONS, 2),
        (b'{"prompt":["a"]}', COMPLETIONS, 1),
        (b'{"prompt":["a","b"],"n":3}', COMPLETIONS, 6),
        (b'{"prompt":"a","n":3}', COMPLETIONS, 3),
        (b'{"prompt":[[1],[2,3]]}', COMPLETIONS, 2),
        (b'{"prompt":[1,2]}', COMPLETIONS, 0),
        (b'{"prompt":["a","b"]', COMPLETIONS, 0),
        (b'{"text":["a","b","c"]}', GENERATE, 3),
        (b'{"input_ids":[[1],[2]]}', GENERATE, 2),
        (b'{"text":"a","sampling_params":{"n":2}}', GENERATE, 2),
        (b'{"text":["a","b"],"sampling_params":{"n":2}}', GENERATE, 4),
        (b'{"text":["a","b"],"sampling_params":[{"n":2},{}]}', GENERATE, 2),
        (b'{"text":"a","n":2}', GENERATE, 0),
        (b'{"input":["a","b"],"n":2}', EMBEDDINGS, 0),
        (b'{"n":4096}', CHAT, ROOMS_MAX),
        (b'{"n":4097}', CHAT, 0),
        (b'{"n":999999999999999999999999}', CHAT, 0),
    ],
)
def test_batches(body: bytes, kind: int, count: int) -> None:
    found = with_bootstrap(body, kind, to())
    try:
        fields = json.loads(found)
    except ValueError:
        assert count == 0
        return
    if count:
        assert fields["bootstrap_host"] == ["10.0.0.1"] * count
        assert fields["bootstrap_port"] == [8998] * count
        assert len(set(fields["bootstrap_room"])) == count
    else:
        assert isinstance(fields["bootstrap_room"], int)


def test_rooms_are_spread_and_lead_to_the_rank_that_has_the_prefix() -> None:
    rooms = [room_for(to(dp_size=4)) for _ in range(4000)]
    assert len(set(rooms)) == 4000
    assert max(rooms) > 1 << 62
    assert min(Counter(room % 4 for room in rooms).values()) > 800
    known = to(dp_size=3, dp_rank=2, overlap_blocks=5)
    assert {room_for(known) % 3 for _ in range(200)} == {2}
    assert {room_for(replace(known, overlap_blocks=0)) % 3 for _ in range(200)} == {0, 1, 2}


def test_a_room_is_never_out_of_its_range(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (0, 1, (1 << 63) - 1, (1 << 63) - 2):
        monkeypatch.setattr("random.getrandbits", lambda bits, value=value: value)
        for rank in range(7):
            room = room_for(to(dp_size=7, dp_rank=rank, overlap_blocks=1))
            assert 0 <= room < 1 << 63
            assert room % 7 == rank
