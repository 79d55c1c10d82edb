"""sim/requests.py: what bodies ask for, and which are refused."""

from typing import Any

import orjson
import pytest

from sglfast.prompt.keys import RequestKind
from sglfast.sim.requests import INFERENCE_PATHS, Bootstrap, RequestError, parse_body, read, read_bootstrap, read_room

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def test_paths() -> None:
    assert set(INFERENCE_PATHS.values()) == set(RequestKind) - {RequestKind.RESPONSES, RequestKind.OTHER}


@pytest.mark.parametrize(
    ("kind", "body", "max_tokens"),
    [
        (RequestKind.CHAT, CHAT, None),
        (RequestKind.CHAT, {**CHAT, "max_tokens": 5}, 5),
        (RequestKind.CHAT, {**CHAT, "max_tokens": 5, "max_completion_tokens": 6}, 6),
        (RequestKind.COMPLETIONS, {"prompt": "a"}, 16),
        (RequestKind.COMPLETIONS, {"prompt": "a", "max_tokens": 7}, 7),
        (RequestKind.GENERATE, {"text": "a"}, 128),
        (RequestKind.GENERATE, {"input_ids": [1], "sampling_params": {"max_new_tokens": 0}}, 0),
        (RequestKind.EMBEDDINGS, {"input": "a", "max_tokens": 5}, 0),
    ],
)
def test_length_of_the_answer(kind: RequestKind, body: dict[str, Any], max_tokens: int | None) -> None:
    assert read(kind, body, b"", "m").max_tokens == max_tokens


def test_everything_else_that_is_asked_for() -> None:
    plain = read(RequestKind.CHAT, CHAT, b"", "served")
    assert (plain.model, plain.is_stream, plain.with_usage, plain.ignores_eos, plain.rank) == ("served", False, False, False, None)
    assert len(plain.request_id) == 32
    assert plain.request_id != read(RequestKind.CHAT, CHAT, b"", "served").request_id
    body = {**CHAT, "model": "x", "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "rid": "r"}
    asked = read(RequestKind.CHAT, body, b"", "served")
    assert (asked.model, asked.is_stream, asked.with_usage, asked.ignores_eos, asked.request_id) == ("x", True, True, True, "r")
    generate = {"text": "a", "stream": True, "sampling_params": {"ignore_eos": True}}
    assert read(RequestKind.GENERATE, generate, b"", "m").ignores_eos
    assert not read(RequestKind.EMBEDDINGS, {"input": "a", "stream": True}, b"", "m").is_stream


def test_rank_by_header_and_by_body() -> None:
    assert read(RequestKind.CHAT, CHAT, b"3", "m").rank == 3
    assert read(RequestKind.CHAT, {**CHAT, "routed_dp_rank": 2}, b"", "m").rank == 2
    assert read(RequestKind.CHAT, {**CHAT, "data_parallel_rank": 1}, b"", "m").rank == 1
    assert read(RequestKind.CHAT, {**CHAT, "routed_dp_rank": 0, "data_parallel_rank": 1}, b"", "m").rank == 0
    assert read(RequestKind.CHAT, {**CHAT, "routed_dp_rank": 2}, b"3", "m").rank == 3
    assert read(RequestKind.GENERATE, {"text": "a", "routed_dp_rank": 2}, b"3", "m").rank == 2, "SGLang's own route knows no header"
    assert read(RequestKind.GENERATE, {"text": "a"}, b"3", "m").rank is None


@pytest.mark.parametrize(
    ("kind", "body", "rank", "kind_of_error", "message"),
    [
        (RequestKind.CHAT, {}, b"", "Bad Request", "'messages'.*Field required"),
        (RequestKind.CHAT, {"messages": "hi"}, b"", "Bad Request", "valid list"),
        (RequestKind.CHAT, {"messages": []}, b"", "BadRequestError", "Messages cannot be empty"),
        (RequestKind.COMPLETIONS, {"prompt": None}, b"", "Bad Request", "'prompt'"),
        (RequestKind.EMBEDDINGS, {}, b"", "Bad Request", "'input'"),
        (RequestKind.GENERATE, {}, b"", "BadRequestError", "text or input_ids"),
        (RequestKind.GENERATE, {"text": "a", "input_ids": [1]}, b"", "BadRequestError", "not both"),
        (RequestKind.GENERATE, {"text": "a", "sampling_params": []}, b"", None, None),
        (RequestKind.GENERATE, {"text": "a", "sampling_params": [{}]}, b"", "BadRequestError", "one for each prompt"),
        (RequestKind.CHAT, {**CHAT, "max_tokens": "5"}, b"", "Bad Request", "'max_tokens'.*valid integer"),
        (RequestKind.CHAT, {**CHAT, "max_tokens": 0}, b"", "BadRequestError", "at least 1"),
        (RequestKind.CHAT, {**CHAT, "max_tokens": 10**6}, b"", "BadRequestError", "too large"),
        (RequestKind.CHAT, {**CHAT, "stream": "yes"}, b"", "Bad Request", "'stream'.*valid boolean"),
        (RequestKind.CHAT, CHAT, b"one", "BadRequestError", "X-Data-Parallel-Rank"),
        (RequestKind.CHAT, {**CHAT, "routed_dp_rank": "1"}, b"", "Bad Request", "routed_dp_rank"),
    ],
)
def test_what_the_engine_refuses(
    kind: RequestKind, body: dict[str, Any], rank: bytes, kind_of_error: str | None, message: str | None
) -> None:
    if kind_of_error is None:
        read(kind, body, rank, "m")
        return
    with pytest.raises(RequestError, match=message) as caught:
        read(kind, body, rank, "m")
    assert (caught.value.status, caught.value.kind) == (400, kind_of_error)


def test_bodies() -> None:
    body = orjson.dumps(CHAT)
    assert parse_body(body, b"application/json", RequestKind.CHAT) == CHAT
    assert parse_body(body, b"Application/JSON; charset=utf-8", RequestKind.CHAT) == CHAT
    assert parse_body(body, b"", RequestKind.GENERATE) == CHAT
    for wrong, content_type, message in (
        (body, b"", "Unsupported Media Type"),
        (body, b"text/plain", "Unsupported Media Type"),
        (b'{"a":', b"application/json", "JSON decode error"),
        (b"", b"application/json", "JSON decode error"),
        (b"[]", b"application/json", "valid dictionary"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            parse_body(wrong, content_type, RequestKind.CHAT)
        assert caught.value.status == 400


def test_where_a_decode_worker_finds_its_prompt() -> None:
    body = {"bootstrap_host": "::1", "bootstrap_port": 9000, "bootstrap_room": 2**64 - 1}
    assert read_bootstrap(body, 8998) == Bootstrap("::1", 9000, 2**64 - 1)
    assert read_bootstrap({**body, "bootstrap_port": None}, 8998).port == 8998
    assert read_room({"bootstrap_room": 0}) == 0
    lists = {name: [value] for name, value in body.items()}
    assert read_bootstrap(lists, 8998) == read_bootstrap(body, 8998)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("bootstrap_room", value) for value in (None, True, 1.0, "1", -1, 2**64, [1, 2])),
        *(("bootstrap_host", value) for value in (None, "", 7)),
        *(("bootstrap_port", value) for value in (True, 0, 65_536, "9000")),
    ],
)
def test_fields_by_which_it_cannot_be_found(field: str, value: object) -> None:
    body = {"bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 1, field: value}
    with pytest.raises(RequestError, match=field if value is not None else "Disaggregated request received without") as caught:
        read_bootstrap(body, 8998)
    assert caught.value.status == 400
