"""sglfast.prompt.raw and seen: what of a chat is read, rendered and tokenized, and what is not; and how much is remembered."""

from pathlib import Path
from typing import Any

import orjson
import pytest
from chat_paths import TOOL, VARIANTS, Chats, everybody, nobody, plain, tokenizers_of
from chat_templates import TEMPLATES
from tokenizer_kinds import build

from sglfast.prompt import raw as raw_module
from sglfast.prompt import seen as seen_module
from sglfast.prompt import stable as stable_module
from sglfast.prompt.frames import Frame
from sglfast.prompt.ids import Keys
from sglfast.prompt.keys import RequestKind
from sglfast.prompt.lazy import LazyKeyer
from sglfast.prompt.raw import RawKeying, RawReader
from sglfast.prompt.seen import SeenKeying
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, Tokenizer, load_tokenizer
from sglfast.shm import Variant


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return tokenizers_of(tmp_path_factory.mktemp("tokenizers"))


def chat(*texts: str, **context: Any) -> bytes:
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return orjson.dumps({"model": "m", "messages": messages, **context})


LONG = [f"{n} " + "the words of this message are known to all " * 10 for n in range(20)]


class Counted:
    """How many messages were parsed, and how much was rendered and tokenized."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
        self.path = Chats(tokenizer, 1 << 22)
        self.parsed: list[Any] = []
        self.runs = 0
        self.frames = 0
        parse, run, fill = raw_module.message_input, stable_module.StableTemplate.run, Frame.fill

        def message_input(raw: Any, content_format: Any) -> Any:
            self.parsed.append(raw)
            return parse(raw, content_format)

        def counted_run(*args: Any, **kwargs: Any) -> Any:
            self.runs += 1
            return run(*args, **kwargs)

        def counted_fill(*args: Any, **kwargs: Any) -> Any:
            self.frames += 1
            return fill(*args, **kwargs)

        monkeypatch.setattr(raw_module, "message_input", message_input)
        monkeypatch.setattr(stable_module.StableTemplate, "run", counted_run)
        monkeypatch.setattr(Frame, "fill", counted_fill)

    def keys(self, body: bytes, probe: Any = everybody) -> Keys:
        self.parsed.clear()
        self.runs = self.frames = 0
        found = self.path.keys(body, [Variant(16)], probe)
        assert found is not None
        return found


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch, load_tokenizer(DEMO_TOKENIZER_PATH))


def test_of_a_seen_conversation_only_the_newest_message_is_read(counted: Counted) -> None:
    counted.keys(chat(*LONG[:19]))
    assert len(counted.parsed) == 19
    for number in range(4):
        body = chat(*LONG[:19], f"and what of {number}?")
        found = counted.keys(body)
        assert counted.parsed == [{"role": "assistant", "content": f"and what of {number}?"}]
        assert (counted.runs, counted.frames) == ((1, 0) if number == 0 else (1, 1) if number == 1 else (0, 1))
        whole = plain(counted.path.tokenizer, body)
        assert whole is not None
        assert found.keys[Variant(16)] == whole.keys[Variant(16)]


def test_a_conversation_that_goes_on_is_read_turn_by_turn(counted: Counted) -> None:
    for turns in range(1, 20, 2):
        body = chat(*LONG[:turns])
        found = counted.keys(body)
        assert len(counted.parsed) == (2 if turns > 1 else 1)
        whole = plain(counted.path.tokenizer, body)
        assert whole is not None
        assert found == Keys(whole.tokens, False, {Variant(16): whole.keys[Variant(16)]})


@pytest.mark.parametrize("name", ["thinker", "qwen3", "forward", "deepseek"])
def test_a_scan_of_the_whole_does_not_read_what_was_seen(
    name: str, tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch, tokenizers[name])
    counted.keys(chat(*LONG[:17]))
    for number in range(4):
        body = chat(*LONG[:18], f"and what of {number}?")
        found = counted.keys(body)
        assert len(counted.parsed) <= 5
        whole = plain(counted.path.tokenizer, body)
        assert whole is not None
        assert found.keys[Variant(16)] == whole.keys[Variant(16)]
    assert counted.frames == 1


def test_thoughts_behind_the_last_question_end_what_is_known(tokenizers: dict[str, Tokenizer]) -> None:
    path = Chats(tokenizers["thinker"], 1 << 22)
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages: list[Any] = [{"role": "user", "content": LONG[0]}]
    for number in range(1, 7):
        messages.append({"role": "assistant", "content": "", "reasoning_content": LONG[number], "tool_calls": [call]})
        messages.append({"role": "tool", "content": LONG[-number]})
        if number == 4:
            messages += [{"role": "assistant", "content": LONG[9]}, {"role": "user", "content": "why?"}]
        body = orjson.dumps({"messages": messages})
        found, whole = path.keys(body, VARIANTS, everybody), plain(path.tokenizer, body)
        assert found == whole


@pytest.mark.parametrize("thoughts", ["", "I should look. "])
def test_calls_are_read_turn_by_turn(thoughts: str, tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where thoughts are printed until an answer comes, that one makes them new; without any it changes nothing."""
    counted = Counted(monkeypatch, tokenizers["harmony"])
    tool = {"type": "function", "function": {"name": "f", "description": "does", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages: list[Any] = [{"role": "developer", "content": LONG[0]}, {"role": "user", "content": LONG[1]}]
    for number in range(2, 16):
        body = orjson.dumps({"messages": messages, "tools": [tool], "reasoning_effort": "high"})
        found, whole = counted.keys(body), plain(counted.path.tokenizer, body)
        assert whole is not None
        assert found == Keys(whole.tokens, False, {Variant(16): whole.keys[Variant(16)]})
        is_answered = number == 9 and bool(thoughts)
        if number > 2 and not is_answered:
            assert len(counted.parsed) == len(messages[-2:])
        if number == 8:
            messages += [{"role": "assistant", "content": LONG[number]}, {"role": "user", "content": LONG[-number]}]
        else:
            messages.append({"role": "assistant", "content": thoughts and thoughts + LONG[number], "tool_calls": [call]})
            messages.append({"role": "tool", "tool_call_id": "1", "content": LONG[-number]})


def test_the_day_of_a_date_ends_what_is_known(tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    today = ["2026-11-21"]
    monkeypatch.setattr(stable_module, "strftime_now", lambda format: today[0])
    counted = Counted(monkeypatch, tokenizers["harmony"])
    for day in ("2026-11-21", "2026-11-22", "2026-11-21"):
        today[0] = day
        for texts in (LONG[:5], LONG[:7], LONG[:7], LONG[:9]):
            body = chat(*texts)
            prompt = counted.path.tokenizer.chat
            assert prompt is not None
            text = prompt.render(orjson.loads(body)["messages"], kwargs={"strftime_now": lambda format: today[0]})
            assert day in text
            ids = counted.path.tokenizer.encode(text, False)
            assert counted.keys(body).tokens == len(ids)
            assert counted.keys(body).keys[Variant(16)] == counted.path.reader.keys_of(ids, 16)


def test_of_an_unowned_conversation_only_the_beginning_is_read(counted: Counted) -> None:
    body = chat(*LONG)
    found = counted.keys(body, nobody)
    assert found.is_estimated
    assert len(counted.parsed) <= 3
    whole = plain(counted.path.tokenizer, body)
    assert whole is not None
    assert found.tokens == pytest.approx(whole.tokens, rel=0.3)


def test_tools_are_no_reason_to_read_all(counted: Counted) -> None:
    body = chat(*LONG, tools=[TOOL])
    found = counted.keys(body, nobody)
    assert found.is_estimated
    assert len(counted.parsed) <= 3


def test_tools_that_are_told_late_are_read_at_once(tmp_path: Path) -> None:
    """SGLang gives tools in another form to a template that refuses them; then the text is another one from the beginning."""
    late = "{% for m in messages %}{{ m.role + m.content }}<|im_end|>{{ tools[0].name + '!' if loop.last }}{% endfor %}"
    build("byte_level", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ 'FLAT ' if tools[0].name }}" + late)
    path = Chats(load_tokenizer(str(tmp_path)), 1 << 22)
    body = chat(*LONG, tools=[TOOL])
    whole = plain(path.tokenizer, body)
    assert whole is not None
    assert path.reader.text_of(RequestKind.CHAT, orjson.loads(body)).text.startswith("FLAT ")  # type: ignore[union-attr]
    for probe in (everybody, nobody):
        found = path.keys(body, [Variant(16)], probe)
        assert found is not None
        assert found.keys[Variant(16)]
        assert whole.keys[Variant(16)].startswith(found.keys[Variant(16)])


def test_parts_are_read_at_once(counted: Counted) -> None:
    """Media has no keys, however late it comes."""
    media = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
    body = orjson.loads(chat(*LONG))
    body["messages"].append(media)
    assert counted.path.keys(orjson.dumps(body), [Variant(16)], nobody) is None


def test_other_contexts_are_other_conversations(counted: Counted) -> None:
    counted.keys(chat(*LONG[:19]))
    for context in (
        {"cache_salt": "s"},
        {"tools": [TOOL]},
        {"chat_template_kwargs": {"x": 1}},
        {"reasoning_effort": "low"},
        {"lora_path": "a"},
    ):
        body = chat(*LONG[:19], "new", **context)
        found = counted.keys(body)
        assert len(counted.parsed) >= 19, context
        whole = plain(counted.path.tokenizer, body)
        assert whole is not None
        assert found.keys[Variant(16)] == whole.keys[Variant(16)]
    for context in ({"temperature": 0.5}, {"seed": 7}, {"stream": True, "user": "me"}, {"tools": [TOOL], "tool_choice": "none"}):
        counted.keys(chat(*LONG[:19], "new", **context))
        assert len(counted.parsed) == 1, context


def test_variants_are_kept_apart(counted: Counted) -> None:
    body = chat(*LONG[:19])
    choices: list[list[Variant]] = [[Variant(16)], [Variant(16, True)], [Variant(16), Variant(64)], [Variant(16)]]
    for variants in choices:
        for _ in range(2):
            found = counted.path.keys(body, variants, everybody)
            assert found is not None
            assert found.keys.keys() == set(variants)
            for variant in variants:
                ids = counted.path.reader.tokens_of(counted.path.reader.text_of(RequestKind.CHAT, orjson.loads(body)))
                assert found.keys[variant] == counted.path.reader.keys_of(ids, variant.block_size, bigram=variant.bigram)


def test_an_open_turn_of_the_assistant_is_not_taken_for_a_closed_one(counted: Counted) -> None:
    """The last message of the assistant is printed as one of the user, or goes behind the prompt; both only while it is the last."""
    for body in (
        chat(*LONG[:4]), chat(*LONG[:4], continue_final_message=True), chat(*LONG[:5]), chat(*LONG[:4]), chat(*LONG[:6]),
        chat(*LONG[:6], continue_final_message=True), chat(*LONG[:7]), chat(*LONG[:6]), chat(*LONG[:5]),
    ):  # fmt: skip
        found = counted.keys(body)
        whole = plain(counted.path.tokenizer, body)
        assert whole is not None
        assert found == Keys(whole.tokens, False, {Variant(16): whole.keys[Variant(16)]})


def test_the_clock_ends_what_is_known(tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    now = ["Monday"]
    monkeypatch.setattr(stable_module, "strftime_now", lambda format: now[0])
    counted = Counted(monkeypatch, tokenizers["clock"])
    counted.keys(chat(*LONG[:5]))
    keys = counted.keys(chat(*LONG[:5], "new"))
    assert len(counted.parsed) == 1
    now[0] = "Tuesday"
    assert counted.keys(chat(*LONG[:5], "new")) != keys
    assert len(counted.parsed) >= 5
    counted.keys(chat(*LONG[:5]))
    assert counted.keys(chat(*LONG[:5], "new")) != keys
    assert len(counted.parsed) == 1
    now[0] = "Monday"
    assert counted.keys(chat(*LONG[:5], "new")) == keys
    assert len(counted.parsed) == 1


def test_what_may_be_parsed_at_once_is_bounded(counted: Counted) -> None:
    raw, small = counted.path.raw, (2000, 10)
    begin = raw.begin(chat(*LONG[:19]), [Variant(16)], 500, small)
    assert isinstance(begin, RawKeying)
    assert not begin.run(everybody, 1000), "the rest is long"
    assert begin.run(everybody)
    assert isinstance(raw.begin(chat(*LONG[:19], "more"), [Variant(16)], 500, small), SeenKeying)
    assert raw.begin(chat(*LONG[:19], "x" * 3000), [Variant(16)], 500, small) is None, "the newest is too long"
    assert raw.begin(chat(*LONG[:19], "x" * 1500, "y" * 1500), [Variant(16)], 500, small) is None, "what is new is too long"
    assert raw.begin(chat("x" * 3000, "new"), [Variant(16)], 500, small) is None, "the first is too long"
    parts = [{"role": "user", "content": [{"type": "text", "text": LONG[1]}]}] * 9
    assert raw.begin(orjson.dumps({"messages": parts}), [Variant(16)], 500, small) is None, "all must be read"
    assert raw.begin(chat(*LONG[:19], tools=[TOOL]), [Variant(16)], 500, small) is not None
    assert raw.begin(chat(*LONG[:3], *(["."] * 12)), [Variant(16)], 500, (1 << 20, 10)) is not None
    assert raw.begin(chat(*LONG[:19], *"123456"), [Variant(16)], 500, (1 << 20, 5)) is None, "too many messages"
    assert isinstance(raw.begin(chat(*LONG[:19], "x" * 3000), [Variant(16)], 500), SeenKeying)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_module, "_FAMILIES", 5)
    path = Chats(load_tokenizer(DEMO_TOKENIZER_PATH), 1 << 20)
    for n in range(150):
        path.keys(chat(*LONG[: n % 19], f"other {n}"), [Variant(16)], everybody)
        path.keys(chat(f"other {n}", *LONG[: n % 7], user="u" * 1000 * n), [Variant(16)], everybody)
    assert 0 < path.keyer.prefixes.size_bytes <= 1 << 18
    assert len(path.raw._turns._families) <= 5


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "llama2"])
def test_tokenizers_of_other_kinds(tmp_path: Path, kind: str) -> None:
    build(kind, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    tokenizer = load_tokenizer(str(tmp_path))
    path = Chats(tokenizer, 1 << 22)
    for turns in (*range(1, 20, 2), 19, 7):
        body = chat(*LONG[:turns])
        whole = plain(tokenizer, body)
        assert whole is not None
        found = path.keys(body, VARIANTS, everybody)
        assert found == whole


def test_no_template_or_none_that_can_be_followed(tmp_path: Path, tokenizers: dict[str, Tokenizer]) -> None:
    assert RawReader(LazyKeyer(build("byte_level", tmp_path), 1 << 20)).begin(chat("x"), VARIANTS, 500) is None
    path = Chats(tokenizers["qwen3"], 1 << 20)
    for _ in range(2):
        assert isinstance(path.raw.begin(chat(*LONG), VARIANTS, 500), RawKeying)
        path.keys(chat(*LONG), VARIANTS, everybody)
