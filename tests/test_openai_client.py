"""The openai Python client, as users have it, through the whole router to simulated workers."""

from collections.abc import Iterator

import openai
import pytest
from e2e import metric, small_stack, wait_until
from openai.types.chat import ChatCompletionMessageParam

from sglfast.load.stack import Stack

MODEL = "demo-model"
SAID: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me something about routers."}]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with small_stack(decode_tokens_per_s=200.0) as running:
        yield running


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="sk-none", max_retries=0, timeout=20) as client:
        yield client
    wait_until(lambda: metric(stack, "sglfast_inflight_requests") == 0, "nothing is left in flight")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=SAID, max_tokens=8)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer._request_id


def test_stream_with_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=MODEL, messages=SAID, max_tokens=12, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert len(chunks) > 5, "an event a token, not all at once"


def test_completions(client: openai.OpenAI) -> None:
    assert client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=5).choices[0].text
    parts = list(client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=5, stream=True))
    assert "".join(part.choices[0].text for part in parts)


def test_embeddings(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model=MODEL, input="some text", encoding_format="float")
    assert len(found.data[0].embedding) > 0


def test_errors_are_those_that_the_client_knows(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=[])
    with pytest.raises(openai.NotFoundError) as caught:
        client.post("/nothing", cast_to=object, body={})
    assert caught.value.code == "not_found"
    assert caught.value.response.headers["x-router-error-code"] == "not_found"


def test_a_client_that_gives_up(client: openai.OpenAI, stack: Stack) -> None:
    before = metric(stack, "sglfast_worker_requests_total", outcome="cancelled")
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(model=MODEL, messages=SAID, max_tokens=400)
    wait_until(lambda: metric(stack, "sglfast_worker_requests_total", outcome="cancelled") == before + 1, "the worker was told")


def test_a_stream_that_is_left(client: openai.OpenAI, stack: Stack) -> None:
    before = metric(stack, "sglfast_worker_requests_total", outcome="cancelled")
    stream = client.chat.completions.create(model=MODEL, messages=SAID, max_tokens=2000, stream=True)
    for count, _ in enumerate(stream):
        if count == 5:
            break
    stream.close()
    wait_until(lambda: metric(stack, "sglfast_worker_requests_total", outcome="cancelled") == before + 1, "the worker was told")
