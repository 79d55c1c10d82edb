"""A rank's map of engine hashes, which may be large: what is done with it keeps no other rank from the tree."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from test_index_token_route import RANK, TOKENS, House, P, removed, stored

from sglfast.index import rank as rank_module
from sglfast.index.token_route import TokenRoute
from sglfast.shm import KeyRoute

CLEARED = {"type": "AllBlocksCleared"}


def watched(house: House, monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Calls of these methods of the route, each of which must find the tree free for others."""
    calls: list[str] = []

    def watch(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(route: TokenRoute, *args: object) -> Any:
            assert not house.tree.lock.locked(), f"{name} stops all other ranks"
            calls.append(name)
            return method(route, *args)

        return call

    for name in names:
        monkeypatch.setattr(TokenRoute, name, watch(name, getattr(TokenRoute, name)))
    return calls


@pytest.mark.parametrize("is_usual", [False, True])
def test_it_is_emptied_beside_the_tree(is_usual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House()
    calls = watched(house, monkeypatch, "clear", "place", "place_all")
    house.apply(stored([1, 2], TOKENS[:8]))
    house.index.has_agreed = is_usual
    house.apply(CLEARED, stored([1], TOKENS[:4]))
    assert (house.overlap(TOKENS), house.index.mapped_blocks) == (1, 1)
    house.apply(stored([2], TOKENS[4:8], 1), CLEARED)
    assert (house.overlap(TOKENS), house.index.mapped_blocks) == (0, 0)
    house.apply(stored([1, 2], TOKENS[:8]))
    assert house.index.clear() == 2
    assert (house.overlap(TOKENS), house.index.mapped_blocks) == (0, 0)
    assert {"clear", "place"} <= set(calls)


@pytest.mark.parametrize("is_usual", [False, True])
def test_of_adapters_too(is_usual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the SHA route the map holds the adapters' blocks only."""
    house = House(key_route="sha256")
    calls = watched(house, monkeypatch, "clear", "place")
    house.apply(stored([1, 2], TOKENS[:8], lora_name="ad"))
    assert house.overlap(TOKENS, lora_name="ad") == 2
    house.index.has_agreed = is_usual
    house.apply(CLEARED)
    assert (house.overlap(TOKENS, lora_name="ad"), house.index.mapped_blocks) == (0, 0)
    house.apply(stored([1, 2], TOKENS[:8], lora_name="ad"), removed([2]))
    assert (house.overlap(TOKENS, lora_name="ad"), house.index.mapped_blocks) == (1, 1)
    assert set(calls) == {"clear", "place"}


@pytest.mark.parametrize("key_route", ["tokens", "sha256"])
@pytest.mark.parametrize("is_usual", [False, True])
def test_a_rank_that_is_retired_while_its_map_is_emptied_takes_nothing_more(
    key_route: KeyRoute, is_usual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(key_route=key_route)
    house.apply(stored([1], TOKENS[:4], lora_name="ad"))
    house.index.has_agreed = is_usual
    clear = TokenRoute.clear

    def retire_then_clear(route: TokenRoute) -> None:
        house.index.retire()
        clear(route)

    monkeypatch.setattr(TokenRoute, "clear", retire_then_clear)
    if key_route == "tokens" and is_usual:  # then C empties it
        house.index.retire()
    house.apply(CLEARED, stored([2], TOKENS[4:8], lora_name="ad"))
    house.index.wipe()
    assert house.index.owned_blocks == 0
    assert house.reader.stats()["live_blocks"] == 0


def test_what_eviction_took_leaves_it_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_module, "_TURN_KEYS", 256)
    house = House(capacity_blocks=4096)
    n_blocks = 4000
    house.apply(stored(list(range(1, n_blocks + 1)), list(range(n_blocks * P))))
    assert house.index.mapped_blocks == n_blocks
    house.tree.writer.store(RANK + 1, 0, bytes(b"".join(i.to_bytes(8, "little") for i in range(10**6, 10**6 + 3900))))
    owned = house.index.owned_blocks
    assert owned < 200
    turns: list[int] = []
    prune = TokenRoute.prune

    def one_turn(route: TokenRoute, *args: Any) -> int:
        assert house.tree.lock.locked()
        turns.append(len(route))
        return prune(route, *args)

    monkeypatch.setattr(TokenRoute, "prune", one_turn)
    pauses: list[bool] = []
    monkeypatch.setattr("time.sleep", lambda _: pauses.append(house.tree.lock.locked()))
    house.index.settle()
    assert len(turns) > 10
    assert max(before - after for before, after in pairwise(turns)) <= 256
    assert pauses == [False] * (len(turns) - 1), "others write in between"
    assert owned <= house.index.mapped_blocks < owned + 32, "some may move past the table's end"
    _, keys = house.index._by_tokens.find(b"".join(i.to_bytes(8, "little") for i in range(1, n_blocks + 1)))
    assert house.tree.writer.owns(RANK, keys).count(1) == owned, "what is owned is known"
    house.apply(removed(list(range(1, n_blocks + 1))))
    assert house.index.owned_blocks == 0


def test_what_events_removed_leaves_it_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_module, "_TURN_KEYS", 100)
    house = House()
    house.apply(stored(list(range(1, 1001)), list(range(1000 * P))))
    pauses: list[bool] = []
    monkeypatch.setattr("time.sleep", lambda _: pauses.append(house.tree.lock.locked()))
    house.apply(removed(list(range(1, 1001))))
    assert house.index.mapped_blocks == 0
    assert pauses.count(False) >= 9
