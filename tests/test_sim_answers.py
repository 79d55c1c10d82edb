"""sim/answers.py: the shapes of all answers, streamed and whole, token by token."""

from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from sglfast.prompt.keys import RequestKind
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer
from sglfast.sim.answers import ANSWERS, Answer
from sglfast.sim.engine import Generation
from sglfast.sim.output import OutputText
from sglfast.sim.requests import Asked

START = 77


@pytest.fixture(scope="module")
def output() -> OutputText:
    return OutputText(load_tokenizer(DEMO_TOKENIZER_PATH), 0)


class Recorder:
    """Takes what an answer sends, in place of a connection."""

    def __init__(self) -> None:
        self.is_paused = False
        self.calls: list[str] = []
        self.body = b""

    def respond(self, status: int, body: bytes) -> None:
        assert status == 200
        self.calls.append("respond")
        self.body = body

    def start_stream(self) -> None:
        self.calls.append("start")

    def send_chunks(self, chunks: bytes) -> None:
        self.calls.append("send")
        self.body += chunks

    def end_stream(self, last: bytes) -> None:
        self.calls.append("end")
        self.body += last

    def events(self) -> Iterator[Any]:
        """The data of each chunk; every event is a chunk of its own."""
        rest = self.body
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            event, rest = rest[: int(size, 16)], rest[int(size, 16) :].removeprefix(b"\r\n")
            assert event.startswith(b"data: ")
            assert event.endswith(b"\n\n")
            data = event[6:-2]
            yield data.decode() if data == b"[DONE]" else orjson.loads(data)


class Played:
    """An answer whose tokens the test lets come."""

    def __init__(self, output: OutputText, kind: RequestKind, *, stream: bool, max_tokens: int | None = 3, usage: bool = False) -> None:
        self.recorder: Any = Recorder()
        asked = Asked(kind, "rid-1", 'mo"del', stream, usage, max_tokens, False, None)
        self.answer: Answer = ANSWERS[kind](asked, self.recorder, output)
        self.generation = Generation([1] * 10, 10, b"", 3, START, self.answer)
        self.generation.cached_tokens = 8
        self.answer.attach(self.generation)

    def token(self, n: int = 1, *, last: bool = False) -> None:
        self.generation.generated_tokens += n
        self.generation.is_finished = last
        self.answer.progress()

    def three(self) -> list[Any]:
        self.token()
        self.token()
        self.token(last=True)
        return list(self.recorder.events())


USAGE = {
    "prompt_tokens": 10,
    "total_tokens": 13,
    "completion_tokens": 3,
    "prompt_tokens_details": {"cached_tokens": 8},
    "reasoning_tokens": 0,
}


def delta(role: str | None, content: str | None) -> dict[str, Any]:
    return {"role": role, "content": content, "reasoning_content": None, "tool_calls": None}


def choice(payload: dict[str, Any], reason: str | None = None, matched: int | None = None) -> dict[str, Any]:
    return {"index": 0, **payload, "logprobs": None, "finish_reason": reason, "matched_stop": matched}


def test_chat_stream(output: OutputText) -> None:
    played = Played(output, RequestKind.CHAT, stream=True, usage=True)
    events = played.three()
    assert played.recorder.calls == ["start", "send", "send", "end"]
    assert events.pop() == "[DONE]"
    created = events[0]["created"]
    for event in events:
        assert event.pop("created") == created
        assert (event.pop("id"), event.pop("object"), event.pop("model")) == ("rid-1", "chat.completion.chunk", 'mo"del')
    words = [output.text(START, n, n + 1) for n in range(3)]
    assert events == [
        {"choices": [choice({"delta": delta("assistant", "")})], "usage": None},
        *({"choices": [choice({"delta": delta(None, word)})], "usage": None} for word in words),
        {"choices": [choice({"delta": delta(None, None)}, "length")], "usage": None},
        {"choices": [], "usage": USAGE},
    ]


def test_completions_stream(output: OutputText) -> None:
    events = Played(output, RequestKind.COMPLETIONS, stream=True, usage=True).three()
    assert events.pop() == "[DONE]"
    assert {event["object"] for event in events} == {"text_completion"}
    assert [event["choices"] for event in events] == [
        [choice({"text": output.text(START, 0, 1)})],
        [choice({"text": output.text(START, 1, 2)})],
        [choice({"text": output.text(START, 2, 3)}, "length")],
        [],
    ]
    assert [event["usage"] for event in events] == [None, None, None, USAGE]


def test_usage_is_only_sent_when_asked_for(output: OutputText) -> None:
    for kind in (RequestKind.CHAT, RequestKind.COMPLETIONS):
        events = Played(output, kind, stream=True).three()
        assert all(event["choices"] for event in events[:-1])


def test_generate_stream_repeats_the_whole_text(output: OutputText) -> None:
    events = Played(output, RequestKind.GENERATE, stream=True).three()
    assert events.pop() == "[DONE]"
    assert len(events) == 3
    for n, event in enumerate(events, 1):
        meta = event.pop("meta_info")
        assert event == {"text": output.text(START, 0, n), "output_ids": output.token_ids(START, n)}
        assert (meta["id"], meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == ("rid-1", 10, n, 8)
        assert meta["finish_reason"] == ({"type": "length", "length": 3} if n == 3 else None)
        assert ("e2e_latency" in meta) is (n == 3)


@pytest.mark.parametrize("kind", [RequestKind.CHAT, RequestKind.COMPLETIONS, RequestKind.GENERATE])
def test_whole_answers_come_at_the_end(output: OutputText, kind: RequestKind) -> None:
    played = Played(output, kind, stream=False)
    played.token()
    assert played.recorder.calls == []
    played.token(2, last=True)
    assert played.recorder.calls == ["respond"]
    body = orjson.loads(played.recorder.body)
    text = output.text(START, 0, 3)
    if kind == RequestKind.GENERATE:
        assert body["text"] == text
        assert body["output_ids"] == output.token_ids(START, 3)
        assert body["meta_info"]["finish_reason"] == {"type": "length", "length": 3}
        return
    payload = {"message": delta("assistant", text)} if kind == RequestKind.CHAT else {"text": text}
    assert body["choices"] == [choice(payload, "length")]
    assert body["usage"] == USAGE
    assert (body["id"], body["model"]) == ("rid-1", 'mo"del')
    assert body["object"] == ("chat.completion" if kind == RequestKind.CHAT else "text_completion")
    assert body["metadata"] == {"weight_version": "default"}


def test_an_answer_that_the_model_ends(output: OutputText) -> None:
    for max_tokens in (None, 4):
        events = Played(output, RequestKind.CHAT, stream=True, max_tokens=max_tokens).three()
        assert events[-2]["choices"] == [choice({"delta": delta(None, None)}, "stop", output.eos_token_id)]
    played = Played(output, RequestKind.GENERATE, stream=False, max_tokens=4)
    played.token(3, last=True)
    assert orjson.loads(played.recorder.body)["meta_info"]["finish_reason"] == {"type": "stop", "matched": output.eos_token_id}


def test_an_answer_of_one_token_is_a_whole_stream(output: OutputText) -> None:
    played = Played(output, RequestKind.CHAT, stream=True, max_tokens=1)
    played.token(last=True)
    assert played.recorder.calls == ["start", "end"]
    events = list(played.recorder.events())
    assert len(events) == 4
    assert events[1]["choices"][0]["delta"]["content"] == output.text(START, 0, 1)


def test_a_slow_reader_gets_longer_events(output: OutputText) -> None:
    played = Played(output, RequestKind.CHAT, stream=True, max_tokens=9)
    played.token()
    played.recorder.is_paused = True
    for _ in range(3):
        played.token()
    assert played.recorder.calls == ["start", "send"]
    played.recorder.is_paused = False
    played.token()
    played.recorder.is_paused = True
    played.token(4, last=True)  # the end is sent all the same
    contents = [event["choices"][0]["delta"]["content"] for event in list(played.recorder.events())[1:-2]]
    assert contents == [output.text(START, 0, 1), output.text(START, 1, 5), output.text(START, 5, 9)]


@pytest.mark.parametrize("kind", [RequestKind.CHAT, RequestKind.COMPLETIONS, RequestKind.GENERATE])
@pytest.mark.parametrize("tokens", [0, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_answer_says_so(output: OutputText, kind: RequestKind, tokens: int, stream: bool) -> None:
    played = Played(output, kind, stream=stream, max_tokens=9)
    if tokens:
        played.token(tokens)
    played.generation.is_aborted = True
    played.answer.progress()
    last = list(played.recorder.events())[-2] if stream else orjson.loads(played.recorder.body)
    if kind == RequestKind.GENERATE:
        assert last["meta_info"]["finish_reason"]["type"] == "abort"
        assert last["text"] == output.text(START, 0, tokens)
    else:
        assert last["choices"][0]["finish_reason"] == "abort"


def test_embeddings_depend_on_the_prompt_alone(output: OutputText) -> None:
    bodies = []
    for start in (5, 5, 6):
        played = Played(output, RequestKind.EMBEDDINGS, stream=False, max_tokens=0)
        played.generation.start = start
        played.token(0, last=True)
        bodies.append(orjson.loads(played.recorder.body))
    vectors = [body["data"][0]["embedding"] for body in bodies]
    assert vectors[0] == vectors[1] != vectors[2]
    assert bodies[0]["object"] == "list"
    assert bodies[0]["data"][0]["object"] == "embedding"
    assert bodies[0]["usage"] == {**USAGE, "total_tokens": 10, "completion_tokens": 0}
