"""`sglfast explain` against a scripted router: the table, the raw answer, and what it says when there is none."""

from typing import Any

import orjson
import pytest
from rich.console import Console
from test_load_client import serving

from sglfast.errors import ConfigError
from sglfast.load.explain import main, show


def row(worker: str, **fields: Any) -> dict[str, Any]:
    tiers = {"device": 10, "host": 2, "disk": 0, "predicted": 12}
    base = {
        "worker": worker,
        "rank": 0,
        "ranks": [],
        "overlap_blocks": 10,
        "overlap_blocks_by_tier": tiers,
        "load": {"requests": 3, "tokens": 70},
    }
    return base | {"score": 360.0, "eligible": True, "why": "has the least work before the first token (score)"} | fields


EXPLANATION = {
    "model": "m",
    "policy": "cache_aware",
    "block_size": 64,
    "prompt_tokens": 1000,
    "prompt_blocks": 15,
    "is_approximate": False,
    "unkeyed_because": None,
    "candidates": [
        row("http://10.0.0.1:30000", why="was not better than the choice"),
        row("http://10.0.0.2:30000"),
        row("http://10.0.0.3:30000", eligible=False, score=None, why="fails its health checks"),
    ],
    "choice": {"worker": "http://10.0.0.2:30000", "rank": 0, "decision": "cache_hit"},
    "would_answer": None,
    "decode": None,
}
WOULD_ANSWER = {"status": 503, "code": "breaker_open", "message": "every worker has failed lately", "after_secs": 0.0}
NO_CHOICE = EXPLANATION | {
    "candidates": [
        row("http://10.0.0.1:30000", eligible=False, score=None, why="its circuit is open: its requests have failed"),
        row("http://10.0.0.3:30000", eligible=False, score=None, why="fails its health checks"),
    ],
    "choice": None,
    "would_answer": WOULD_ANSWER,
}


def test_the_choice_comes_first_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    show(EXPLANATION, Console(width=100))
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if "10.0.0." in line]
    assert rows[0].strip().startswith("* http://10.0.0.2:30000")
    assert "10/2/0/12" in rows[0]
    assert "360" in rows[0]
    assert "http://10.0.0.2:30000 has the least work before the first token (score)" in lines
    assert "http://10.0.0.3:30000 fails its health checks" in lines


def test_without_a_choice_it_says_what_the_request_would_get_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda seen: [http("200 OK", orjson.dumps(NO_CHOICE))]) as server:
        assert main(["{}", "--url", server.url]) == 1, "as other requests that have no choice"
        lines = capsys.readouterr().out.splitlines()
        assert main(["{}", "--url", server.url, "--json"]) == 1
        assert '"choice":null' in capsys.readouterr().out
    assert [line.strip().split()[0] for line in lines if line.startswith("   ") and "10.0.0." in line] == [
        "http://10.0.0.1:30000",
        "http://10.0.0.3:30000",
    ], "none is marked"
    assert "no worker can be chosen now: the request would get 503 breaker_open: every worker has failed lately" in lines
    assert "http://10.0.0.1:30000 its circuit is open: its requests have failed" in lines
    assert "http://10.0.0.3:30000 fails its health checks" in lines


def test_a_request_that_would_wait(capsys: pytest.CaptureFixture[str]) -> None:
    would = {"status": 408, "code": "queue_timeout", "message": "the request waited too long", "after_secs": 60.0}
    show(NO_CHOICE | {"would_answer": would}, Console(width=100))
    found = capsys.readouterr().out
    assert "the request would wait, and if none has room within 60 s, get 408 queue_timeout: the request waited too long" in found


def test_decode_workers_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"worker": f"http://10.0.1.{n}:30000", "load": {"requests": 0}, "eligible": n < 3, "why": why}
        for n, why in enumerate(["is on the prefill worker's host", "was not better than the choice", "-", "fails its health checks"])
    ]
    show(EXPLANATION | {"decode": {"worker": rows[0]["worker"], "policy": "affinity", "candidates": rows}}, Console(width=100))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("decode worker")]
    assert lines == [
        "decode worker http://10.0.1.0:30000 is on the prefill worker's host",
        "decode worker http://10.0.1.3:30000 fails its health checks",
    ]


def test_a_prompt_that_could_not_be_compared_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    show(EXPLANATION | {"unkeyed_because": "the body is no JSON"}, Console(width=100))
    assert "not compared with KV caches: the body is no JSON" in capsys.readouterr().out


def test_a_body_that_is_no_json_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(ConfigError, match="no JSON"):
        main(["{nonsense"])
    with pytest.raises(ConfigError, match="No such file"):
        main(["@/does/not/exist"])


def test_no_router_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["{}", "--url", "http://127.0.0.1:9"]) == 1
    assert "does not answer" in capsys.readouterr().err


def http(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status.encode(), len(body), body)


def test_the_body_goes_to_the_explain_path_of_the_router(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda seen: [http("200 OK", orjson.dumps(EXPLANATION))]) as server:
        assert main(['{"input_ids": [1, 2]}', "--url", server.url, "--path", "/generate"]) == 0
        assert main(["{}", "--url", server.url, "--json"]) == 0
    assert [(seen.path, seen.body) for seen in server.seen] == [
        ("/explain/generate", b'{"input_ids": [1, 2]}'),
        ("/explain/v1/chat/completions", b"{}"),
    ]
    out = capsys.readouterr().out
    assert "policy cache_aware" in out
    assert '"choice":{"worker":"http://10.0.0.2:30000"' in out


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (http("503 Service Unavailable", b'{"error":{"message":"no healthy workers"}}'), "503: no healthy workers"),
        (http("404 Not Found", b"<html>"), "is it sglfast?"),
        (http("200 OK", b"<html>"), "is it sglfast?"),
        (http("200 OK", b'{"status": "ok"}'), "is it sglfast?"),
        (http("200 OK", b"[1]"), "is it sglfast?"),
    ],
)
def test_errors_are_told_in_one_line(answer: bytes, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda seen: [answer]) as server:
        assert main(["{}", "--url", server.url]) == 1
    assert said in capsys.readouterr().err


def test_the_key_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda seen: [http("200 OK", orjson.dumps(EXPLANATION))]) as server:
        assert main(["{}", "--url", server.url]) == 0
        assert main(["{}", "--url", server.url, "--api-key", "one"]) == 0
        monkeypatch.setenv("SGLFAST_API_KEY", "two")
        assert main(["{}", "--url", server.url, "--json"]) == 0
    assert [seen.headers.get("authorization") for seen in server.seen] == [None, "Bearer one", "Bearer two"]


@pytest.mark.parametrize("flags", [["--path", "v1/x"], ["--path", "/x y"], ["--path", "/x\r\n"], ["--api-key", "a\r\nb"]])
def test_what_is_no_request_is_refused(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match="must"):
        main(["{}", "--url", "http://127.0.0.1:9", *flags])


def test_an_approximate_explanation_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    show(EXPLANATION | {"is_approximate": True, "block_size": None}, Console(width=120))
    assert "about 1000 tokens; compared with what workers were sent before" in capsys.readouterr().out
