"""Introspection over real sockets: attempts, fallbacks, and what happens to broken answers."""

import asyncio
from collections import Counter

import pytest
from control_doubles import HANG, NOT_THERE, SECRET, ScriptedWorker, answer, server_info

from sglfast.control.fetch import Fetcher
from sglfast.control.introspect import Findings, introspect, retry_pause_s

CUT = answer(f'{{"api_key": "{SECRET}"'.encode(), claims_bytes=5000)
BUSY = answer({"detail": SECRET}, 503)
MODELS = answer({"object": "list", "data": [{"id": "lora", "object": "adapter"}, {"id": "m3", "object": "model"}]})


def look_at(timeout_s: float = 5.0, **scripts: list[bytes]) -> tuple[Findings, Counter[str]]:
    """Findings and hits of a worker; path `a__b` of a script is /a/b."""

    async def run() -> tuple[Findings, Counter[str]]:
        async with ScriptedWorker({"/" + path.replace("__", "/"): raw for path, raw in scripts.items()}) as worker, Fetcher() as fetcher:
            return await introspect(fetcher, worker.url, timeout_s), worker.hits

    return asyncio.run(run())


def test_all_facts_from_one_request() -> None:
    found, hits = look_at(server_info=[server_info(speculative_algorithm="EAGLE")])
    assert hits == {"/server_info": 1}
    assert found.is_complete
    assert (found.model, found.problem) == ("m1", "")
    assert found.facts is not None
    assert found.facts.kv is not None
    assert (found.facts.dp_size, found.facts.bigram, found.facts.version) == (2, True, "0.5.23")
    assert (found.facts.kv.host, found.facts.kv.port_base, found.facts.kv.replay_port_base) == ("127.0.0.1", 5557, 5657)
    assert SECRET not in repr(found)


@pytest.mark.parametrize("bad", [CUT, BUSY, b"HTTP/1.1 "], ids=["cut body", "503", "cut head"])
def test_two_passing_failures_then_good(bad: bytes) -> None:
    found, hits = look_at(server_info=[bad, bad, server_info()])
    assert hits == {"/server_info": 3}
    assert found.is_complete


@pytest.mark.parametrize("bad", [CUT, BUSY], ids=["cut body", "503"])
def test_three_attempts_are_all(bad: bytes) -> None:
    found, hits = look_at(server_info=[bad, bad, bad, server_info()], model_info=[answer({"served_model_name": "m2"})])
    assert hits == {"/server_info": 3, "/model_info": 1}
    assert (found.facts, found.model, found.has_spoken, found.is_complete) == (None, "m2", False, False)
    assert found.problem
    assert SECRET not in found.problem


@pytest.mark.parametrize("bad", [answer(f"<{SECRET}>".encode()), answer([SECRET]), answer(b""), answer({"x": SECRET}, 401)])
def test_no_second_attempt_when_the_answer_is_whole(bad: bytes) -> None:
    found, hits = look_at(server_info=[bad])
    assert hits["/server_info"] == 1
    assert (found.facts, found.model, found.has_spoken) == (None, None, False)
    assert found.problem
    assert SECRET not in found.problem


def test_a_silent_worker_is_left_after_the_timeouts() -> None:
    found, hits = look_at(0.1, server_info=[HANG], model_info=[HANG], v1__models=[MODELS])
    assert hits == {"/server_info": 3, "/model_info": 1, "/v1/models": 1}
    assert found.problem == "/server_info: no answer within 0.1 s"
    assert (found.model, found.is_complete) == ("m3", False)


def test_the_old_path_only_when_the_new_one_is_not_there() -> None:
    found, hits = look_at(get_server_info=[server_info()])
    assert hits == {"/server_info": 1, "/get_server_info": 1}
    assert found.is_complete


def test_an_engine_without_server_info_has_spoken_when_its_name_is_known() -> None:
    """vLLM: no /server_info in any form. Asking again would never end."""
    found, hits = look_at(v1__models=[MODELS])
    assert (found.facts, found.model, found.has_spoken, found.is_complete) == (None, "m3", True, True)
    assert hits == dict.fromkeys(("/server_info", "/get_server_info", "/model_info", "/get_model_info", "/v1/models"), 1)


def test_adapters_that_are_models_of_their_own() -> None:
    """vLLM lists them beside the model, whichever way it tells the rest; SGLang lists them, too, but takes other names for them."""
    names = [
        {"id": "m3", "object": "model"},
        {"id": "ad", "object": "model", "parent": "m3"},
        {"id": "b:c", "object": "model", "parent": "m3"},
    ]
    listed = answer({"object": "list", "data": names})
    assert look_at(v1__models=[listed])[0].adapters == ("ad", "b:c")
    found, _ = look_at(server_info=[answer({"vllm_config": "...", "served_model_name": "m2"})], v1__models=[listed])
    assert (found.model, found.adapters, found.is_complete) == ("m2", ("ad", "b:c"), True)
    found, hits = look_at(server_info=[server_info()], v1__models=[listed])
    assert (found.adapters, hits["/v1/models"]) == ((), 0)
    assert look_at(server_info=[server_info(served_model_name="")], v1__models=[listed])[0].adapters == ()


@pytest.mark.parametrize(
    ("scripts", "model"),
    [
        ({"model_info": [answer({"served_model_name": "m2"})]}, "m2"),
        ({"get_model_info": [answer({"served_model_name": "m2"})]}, "m2"),
        ({"model_info": [answer({"model_path": "/models/x"})], "v1__models": [MODELS]}, "m3"),
        ({"model_info": [CUT], "v1__models": [MODELS]}, "m3"),
        ({"model_info": [NOT_THERE], "v1__models": [answer({"data": []})]}, None),
    ],
)
def test_the_name_falls_back(scripts: dict[str, list[bytes]], model: str | None) -> None:
    found, _ = look_at(5.0, server_info=[server_info(served_model_name="")], **scripts)
    assert found.model == model
    assert found.facts is not None
    assert found.is_complete == (model is not None)


def test_a_body_of_more_than_4_mib_is_not_taken() -> None:
    found, hits = look_at(server_info=[answer(b" " * (4 << 20) + b"{}")])
    assert found.problem == "/server_info: the answer is larger than 4194304 bytes"
    assert hits["/server_info"] == 1


def test_retry_pauses_grow_from_5_to_30_seconds() -> None:
    pauses = [retry_pause_s(failures) for failures in range(1, 10)]
    assert pauses[0] == 5.0
    assert pauses == sorted(pauses)
    assert pauses[-1] == retry_pause_s(10**9) == 30.0
