"""What is read of workers' answers to questions that go to all of them."""

import msgspec
import pytest

from sglfast.errors import WorkerInfoError
from sglfast.wire.worker_answers import parse_loads, without_secrets


def test_loads_of_both_ages() -> None:
    assert parse_loads(b'{"loads":[{"dp_rank":0,"num_total_tokens":40,"num_used_tokens":1},{"dp_rank":1,"num_total_tokens":2}]}') == 42
    assert parse_loads(b'[{"dp_rank":0,"num_reqs":1,"num_tokens":7},{"dp_rank":1,"num_tokens":0}]') == 7


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"{}", b'{"loads":[]}', b'{"loads":{}}', b"17", b"null", b"[null]", b'[{"num_tokens":-1}]', b'[{"num_tokens":"1"}]',
        b'[{"num_tokens":true}]', b'[{"num_tokens":1.5}]', b'{"loads":[{"num_tokens":1}]}', b"[" * 100_000, b"\xff",
    ],
)  # fmt: skip
def test_loads_that_say_nothing(body: bytes) -> None:
    with pytest.raises(WorkerInfoError):
        parse_loads(body)


def test_secrets_are_hidden_wherever_they_stand() -> None:
    info = {
        "api_key": "sk-12345", "admin_api_key": "adm-777", "ssl_keyfile_password": "pw word", "launch_command": "--api-key sk-12345 --x",
        "hf_token": "hf_abc", "none": None, "ssl_keyfile": "/etc/key.pem", "max_total_num_tokens": 7, "tokenizer_path": "/models/m",
        "nested": {"list": [{"API-Key": "sk", "apiKey": "zzzz9", "note": "uses sk-12345 and zzzz9"}], "password": 1234},
        "kv_events_config": '{"publisher":"zmq"}', "decode_tokens": 5, "served_model_name": "m",
    }  # fmt: skip
    found = msgspec.json.decode(without_secrets(msgspec.json.encode(info)))
    assert found == {
        "api_key": "***", "admin_api_key": "***", "ssl_keyfile_password": "***", "launch_command": "***", "hf_token": "***",
        "none": None, "ssl_keyfile": "/etc/key.pem", "max_total_num_tokens": 7, "tokenizer_path": "/models/m",
        "nested": {"list": [{"API-Key": "***", "apiKey": "***", "note": "uses *** and ***"}], "password": "***"},
        "kv_events_config": '{"publisher":"zmq"}', "decode_tokens": 5, "served_model_name": "m",
    }  # fmt: skip


def test_an_absent_secret_stays_absent() -> None:
    assert without_secrets(b'{"api_key":null,"admin_api_key":"","a":"b"}') == b'{"api_key":null,"admin_api_key":"","a":"b"}'


@pytest.mark.parametrize("body", [b"", b"[]", b"x", b'{"a":' * 5000, b"\xff", b'{"api_key":"secret-cut'])
def test_what_is_no_object_is_not_shown(body: bytes) -> None:
    with pytest.raises(WorkerInfoError) as caught:
        without_secrets(body)
    assert "secret" not in str(caught.value)
