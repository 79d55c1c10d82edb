"""sglfast.edge.request: which model a body names, and what is known of its prompt."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from edge_harness import run
from model import page_hashes

from sglfast.edge import request as request_module
from sglfast.edge.request import ENDPOINTS, Facts, PromptKeyer, model_of
from sglfast.prompt.keys import PromptReader, PromptText, RequestKind
from sglfast.prompt.lazy import LazyKeyer
from sglfast.prompt.raw import RawReader
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer
from sglfast.shm import Dialect, Variant

IDS = list(range(100, 400))
TOKENIZER = load_tokenizer(DEMO_TOKENIZER_PATH)


@pytest.fixture
def reader() -> PromptReader:
    return PromptReader(TOKENIZER)


def test_endpoints_are_those_of_the_prompt_reader() -> None:
    kinds = {path: RequestKind(endpoint.kind).name for path, endpoint in ENDPOINTS.items()}
    assert kinds == {
        b"/v1/chat/completions": "CHAT", b"/v1/completions": "COMPLETIONS", b"/generate": "GENERATE", b"/v1/embeddings": "EMBEDDINGS",
        b"/v1/responses": "RESPONSES", b"/v1/classify": "EMBEDDINGS", b"/v1/rerank": "OTHER", b"/rerank": "OTHER",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model":"a/b","messages":[{"model":"c"}]}', "a/b"),
        (b' {"messages" : [1,2,{"x":null}],\n"model":"\\u00e9"} ', "\u00e9"),
        (b'{"messages":[]}', None),
        (b'{"model":null}', None),
        (b'{"model":7}', None),
        (b'{"model":["a"]}', None),
        (b'["model"]', None),
        (b'"model"', None),
        (b"null", None),
        (b"", None),
        (b"{", None),
        (b'{"model":"a"', None),
        (b'{"model":"a"} x', None),
        (b'{"model":"\xff"}', None),
        (b'{"x":' * 100_000, None),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b',"model":"a"}', None),
    ],
)
def test_model_of(body: bytes, model: str | None) -> None:
    assert model_of(body) == model


class Keyed:
    """A keyer in a running loop; `facts` waits for what it found."""

    def __init__(self, reader: Any, *, is_raw: bool = False) -> None:
        keyer = LazyKeyer(TOKENIZER, 1 << 20)
        raw = RawReader(keyer) if is_raw else None
        self.keyer = PromptKeyer(reader, keyer, RequestKind, asyncio.get_running_loop(), here=self.here, there=self.there, raw=raw)
        self.threads: set[str] = set()  # where the KV index was asked
        self.owns_all = True

    def here(self, keys: bytes) -> int:
        assert threading.current_thread() is threading.main_thread()
        self.threads.add("loop")
        return len(keys) // 8 * self.owns_all

    def there(self, keys: bytes) -> int:
        assert threading.current_thread().name.startswith("tokenize")
        self.threads.add("thread")
        return len(keys) // 8 * self.owns_all

    def __enter__(self) -> "Keyed":
        return self

    def __exit__(self, *_: object) -> None:
        self.keyer.close()

    def now(self, kind: int, body: bytes, variants: tuple[Variant, ...] = (Variant(64),)) -> list[Facts]:
        found: list[Facts] = []
        self.keyer.key(kind, body, variants, found.append)
        return found

    async def later(self, kind: int, body: bytes, variants: tuple[Variant, ...] = (Variant(64),)) -> Facts:
        future: asyncio.Future[Facts] = asyncio.get_running_loop().create_future()
        self.keyer.key(kind, body, variants, future.set_result)
        return await future


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("tokenize"):
            thread.join(5)
            assert not thread.is_alive()


def keys(page_size: int, *, bigram: bool = False) -> bytes:
    """The keys that an engine can match: its last token is always computed."""
    usable = len(IDS) - 1 - bigram
    hashes = page_hashes(IDS, page_size, bigram=bigram)[: usable // page_size]
    return b"".join(key.to_bytes(8, "little") for key in hashes)


def test_a_short_prompt_is_keyed_at_once(reader: PromptReader) -> None:
    async def test() -> None:
        with Keyed(reader) as keyed:
            [facts] = keyed.now(2, orjson.dumps({"input_ids": IDS}), (Variant(64), Variant(16, True)))
            assert facts == Facts(300, {Variant(64): keys(64), Variant(16, True): keys(16, bigram=True)})
            [facts] = keyed.now(1, orjson.dumps({"prompt": "Hello, how are you?"}), (Variant(4),))
            assert facts.prompt_tokens > 4
            assert len(facts.keys[Variant(4)]) == (facts.prompt_tokens - 1) // 4 * 8

    run(test())


def test_a_long_prompt_leaves_the_loop(reader: PromptReader) -> None:
    async def test() -> None:
        with Keyed(reader) as keyed:
            body = orjson.dumps({"messages": [{"role": "user", "content": "word " * 4000}]})
            assert keyed.now(0, body) == [], "not before this returns"
            facts = await keyed.later(0, body)
            assert facts.prompt_tokens > 4000
            assert len(facts.keys[Variant(64)]) == (facts.prompt_tokens - 1) // 64 * 8
            assert "thread" in keyed.threads

    run(test())


@pytest.mark.parametrize("chars", [10_000, 500_000], ids=["at once", "in a thread"])
def test_a_long_prompt_that_nobody_owns_is_estimated(reader: PromptReader, chars: int) -> None:
    async def test() -> None:
        with Keyed(reader) as keyed:
            keyed.owns_all = False
            body = orjson.dumps({"messages": [{"role": "user", "content": "word " * (chars // 5)}]})
            found = keyed.now(0, body)
            is_now = bool(found)
            assert is_now == (chars < 65_536)
            facts = found[0] if is_now else await keyed.later(0, body)
            assert facts.is_estimated
            assert facts.prompt_tokens == pytest.approx(chars / 5, rel=0.3)
            assert keyed.threads == {"loop" if is_now else "thread"}
            whole: asyncio.Future[Facts] = asyncio.get_running_loop().create_future()
            keyed.keyer.key(0, body, (Variant(64),), whole.set_result, is_whole=True)
            facts = await whole
            assert not facts.is_estimated
            assert len(facts.keys[Variant(64)]) == (facts.prompt_tokens - 1) // 64 * 8

    run(test())


def chat(*texts: str) -> bytes:
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return orjson.dumps({"messages": messages, "stream": True})


LONG_CHAT = ["word " * 2000] * 19  # 190 KB


def test_a_chat_that_is_longer_than_the_loop_would_parse(reader: PromptReader) -> None:
    """Nobody owns it: the loop looks at its beginning. Owned and seen: at its newest message. Else all of it goes to the thread."""

    async def test() -> None:
        with Keyed(reader, is_raw=True) as keyed:
            keyed.owns_all = False
            [facts] = keyed.now(0, chat(*LONG_CHAT))
            assert facts.is_estimated
            assert facts.prompt_tokens == pytest.approx(38_000, rel=0.3)
            keyed.owns_all = True
            assert keyed.now(0, chat(*LONG_CHAT)) == []
            facts = await keyed.later(0, chat(*LONG_CHAT))
            keyed.threads.clear()
            [more] = keyed.now(0, chat(*LONG_CHAT, "what?", "and then?"))
            assert keyed.threads == {"loop"}
            assert not more.is_estimated
            assert more.prompt_tokens > facts.prompt_tokens > 38_000
            ids = reader.tokens_of(reader.text_of(RequestKind(0), orjson.loads(chat(*LONG_CHAT, "what?", "and then?"))))
            assert more == Facts(len(ids), {Variant(64): reader.keys_of(ids, 64)})
            assert keyed.now(0, chat(*LONG_CHAT, "what?", "word " * 20_000)) == [], "what is new is long"
            assert (await keyed.later(0, chat(*LONG_CHAT, "what?", "word " * 20_000))).prompt_tokens > 58_000
            assert keyed.now(0, chat(*["word " * 2000] * 60)) == [], "even to split it takes a while"
            assert (await keyed.later(0, chat(*["word " * 2000] * 60))).prompt_tokens > 120_000
            assert keyed.threads == {"loop", "thread"}

    run(test())


def test_what_a_chat_says_of_itself_is_the_same_from_its_bytes(reader: PromptReader) -> None:
    async def test() -> None:
        with Keyed(reader) as plain, Keyed(reader, is_raw=True) as raw:
            bodies = [b"", b"{", b'{"messages":[]}', b'{"messages":[{"role":7}]}', b'{"messages":[{"role":"user","content":"\\ud800"}]}']
            bodies += [chat("hi"), chat("hi", "there"), chat("hi", "there", "again"), chat("hi", "there", "again") + b"x"]
            bodies += [b'{"messages":[{"role":"user","content":"x"}],"input_ids":[1,2,3]}', chat("")]
            for body in bodies * 2:
                found, wanted = await raw.later(0, body), await plain.later(0, body)
                assert (found.keys, found.why_unkeyed) == (wanted.keys, wanted.why_unkeyed)
                assert found.prompt_tokens == wanted.prompt_tokens or found.is_estimated or wanted.is_estimated
                whole = [asyncio.get_running_loop().create_future() for _ in range(2)]
                for keyed, future in zip((plain, raw), whole, strict=True):
                    keyed.keyer.key(0, body, (Variant(4),), future.set_result, is_whole=True)
                assert await whole[0] == await whole[1]

    run(test())


def test_many_objects_are_too_much_for_the_loop(reader: PromptReader) -> None:
    async def test() -> None:
        with Keyed(reader) as keyed:
            body = orjson.dumps({"messages": [{"role": "user", "content": "x"}] * 500})
            assert keyed.now(0, body) == []
            assert (await keyed.later(0, body)).prompt_tokens > 500

    run(test())


@pytest.mark.parametrize("padding", ["", " " * 70_000], ids=["at once", "in a thread"])
@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b"7", b'{"messages":7}', b'{"messages":[{"role":"user","content":{"a":1}}]}',
        b'{"input_ids":[-1' + b",1" * 70 + b"]}", b"\xff" * 9, b'{"messages":[{"role":7}]}', b'{"text":"\\ud800"}', b'{"text":[]}',
        b'{"input_ids":[1.5]}', b"[" * 3000, b'{"image_data":["x"],"text":"y"}',
    ],
)  # fmt: skip
def test_what_cannot_be_keyed_is_no_error(body: bytes, padding: str, reader: PromptReader) -> None:
    async def test() -> None:
        with Keyed(reader) as keyed:
            for kind in range(4):
                facts = await keyed.later(kind, body + padding.encode())
                assert (facts.prompt_tokens, facts.keys) == (0, {})
                assert facts.why_unkeyed

    run(test())


class FailingReader:
    """Has a bug."""

    def text_of(self, kind: RequestKind, body: object, head_chars: int, dialect: Dialect) -> PromptText:
        raise KeyError("secret prompt")


@pytest.mark.parametrize("size", [10, 70_000], ids=["at once", "in a thread"])
def test_a_bug_in_the_prompt_path_costs_no_request(size: int, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        with Keyed(FailingReader()) as keyed:
            facts = await keyed.later(0, orjson.dumps("x" * size))
            assert facts == Facts(0, {}, "the prompt could not be read")

    run(test())
    [record] = caplog.records
    assert record.fields == {"error": "KeyError"}  # type: ignore[attr-defined]
    assert "secret" not in caplog.text


class SlowReader:
    """Waits in `text_of` until the test lets it go on."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()

    def text_of(self, kind: RequestKind, body: object, head_chars: int, dialect: Dialect) -> PromptText:
        assert self.may_go_on.wait(5)
        return PromptText(detail="slow")


def test_waiting_prompts_are_bounded_and_the_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_module, "_MAX_WAITING", 3)

    async def test() -> None:
        reader = SlowReader()
        with Keyed(reader) as keyed:
            body = b'"' + b"x" * 70_000 + b'"'
            waiting = [asyncio.ensure_future(keyed.later(0, body)) for _ in range(3)]
            await asyncio.sleep(0)
            start = time.monotonic()
            assert [facts.why_unkeyed for facts in keyed.now(0, body)] == ["too many prompts wait for the tokenizer"]
            await asyncio.sleep(0.05)
            assert time.monotonic() - start < 4.0, "the loop was blocked"  # which would be for 5 s
            reader.may_go_on.set()
            assert [facts.why_unkeyed for facts in await asyncio.gather(*waiting)] == ["slow"] * 3
            assert (await keyed.later(0, body)).why_unkeyed == "slow", "there is room again"

    run(test())


class OrderedReader(SlowReader):
    """Writes down which body came when."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def text_of(self, kind: RequestKind, body: object, head_chars: int, dialect: Dialect) -> PromptText:
        assert isinstance(body, str)
        self.seen.append(body[0])
        return super().text_of(kind, body, head_chars, dialect)


def test_short_prompts_do_not_wait_for_long_ones_and_nobody_for_those_who_left() -> None:
    async def test() -> None:
        reader = OrderedReader()
        with Keyed(reader) as keyed:
            wanted = {"b", "d"}
            found: dict[str, Facts] = {}
            all_found = asyncio.Event()

            def take(name: str, facts: Facts) -> None:
                found[name] = facts
                if len(found) == 4:
                    all_found.set()

            def ask(name: str, size: int) -> None:
                body = b'"' + name.encode() + b"x" * size + b'"'
                keyed.keyer.key(0, body, (Variant(64),), lambda facts: take(name, facts), is_wanted=lambda: name in wanted or name == "a")

            ask("a", 70_000)  # the thread has this one
            ask("b", 900_000)
            ask("c", 800_000)
            ask("d", 70_000)
            await asyncio.sleep(0.05)
            assert found == {}
            reader.may_go_on.set()
            async with asyncio.timeout(5):
                await all_found.wait()
            assert reader.seen == ["a", "d", "b"]
            assert found["c"].why_unkeyed == "the tokenizer failed"
            assert found["b"].why_unkeyed == "slow"

    run(test())


def test_close_forgets_what_waits(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        reader = SlowReader()
        with Keyed(reader) as keyed:
            body = b'"' + b"x" * 70_000 + b'"'
            found = [keyed.now(0, body) for _ in range(3)]
            await asyncio.sleep(0.05)
            keyed.keyer.close()
            await asyncio.sleep(0.05)
            reader.may_go_on.set()
            await asyncio.sleep(0.1)
            assert [len(facts) for facts in found] == [1, 0, 0]

    run(test())
    assert not caplog.records


def test_those_who_left_take_no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_module, "_MAX_WAITING", 3)

    async def test() -> None:
        reader = SlowReader()
        with Keyed(reader) as keyed:
            body = b'"' + b"x" * 70_000 + b'"'
            found: list[str | None] = []
            has_left = False

            def ask() -> None:
                keyed.keyer.key(0, body, (Variant(64),), lambda facts: found.append(facts.why_unkeyed), is_wanted=lambda: not has_left)

            keyed.keyer.key(0, body, (Variant(64),), lambda facts: found.append(facts.why_unkeyed))  # the thread has this one
            ask()
            ask()
            ask()
            assert found == ["too many prompts wait for the tokenizer"]
            has_left = True
            here = asyncio.ensure_future(keyed.later(0, body))
            await asyncio.sleep(0)
            assert found[1:] == ["the tokenizer failed"] * 2, "nobody reads that"
            reader.may_go_on.set()
            assert (await here).why_unkeyed == "slow"

    run(test())
