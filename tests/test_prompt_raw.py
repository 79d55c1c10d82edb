"""sglfast.prompt.raw and seen: from the bytes of chat bodies, the overlap of every rank is that of the plain result."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from chat_templates import TEMPLATES
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import build
from tokenizers import Tokenizer as RustTokenizer

from sglfast import shm
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast.errors import PromptError
from sglfast.prompt import raw as raw_module
from sglfast.prompt import seen as seen_module
from sglfast.prompt import stable as stable_module
from sglfast.prompt.frames import Frame
from sglfast.prompt.keys import PromptReader, RequestKind
from sglfast.prompt.lazy import Keying, Keys, LazyKeyer, Variant
from sglfast.prompt.pieces import PieceCache
from sglfast.prompt.prefixes import PrefixCache
from sglfast.prompt.raw import RawKeying, RawReader
from sglfast.prompt.seen import SeenKeying, Turns
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, Tokenizer, load_tokenizer

VARIANTS: list[Variant] = [(1, False), (4, True), (16, False), (64, False)]
MARKS = ["<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|END|>", "</s>", "<s>", "<|end_of_sentence|>"]
NAMES = [
    "demo",
    "chatml",
    "qwen25",
    "qwen3",
    "llama3",
    "mistral",
    "gemma",
    "gemma3",
    "phi3",
    "zephyr",
    "deepseek",
    "stateful",
    "neighbours",
]
NAMES += ["command_r", "granite", "counting_macro", "whole_messages", "clock", "remembered", "mistral_tools"]
Body = dict[str, Any]


class Tree:
    """A hash tree in shared memory with its writer and a reader."""

    def __init__(self) -> None:
        self.fd, segment = shm.create(max_workers=4, max_ranks=64, max_shards=1, capacity_blocks=1 << 16)
        self.writer, self.reader = TreeWriter(segment), TreeReader(segment)

    def overlaps(self, keys: bytes) -> dict[int, int]:
        self.reader.match(keys)
        return dict(self.reader.hits())


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    tree = Tree()
    yield tree
    os.close(tree.fd)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """The demo tokenizer, and one of another kind, with each template by turns."""
    other = build("byte_level", tmp_path_factory.mktemp("byte_level"))
    rust: RustTokenizer = other._rust
    found = {"demo": load_tokenizer(DEMO_TOKENIZER_PATH)}
    for number, name in enumerate(NAMES[1:]):
        folder = tmp_path_factory.mktemp(name)
        if number % 2:
            (folder / "tokenizer.json").write_bytes((Path(DEMO_TOKENIZER_PATH) / "tokenizer.json").read_bytes())
        else:
            rust.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(TEMPLATES[name])
        config = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": MARKS}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        found[name] = load_tokenizer(str(folder))
    return found


def everybody(keys: bytes) -> int:
    return len(keys) // 8


def nobody(keys: bytes) -> int:
    return 0


def plain(tokenizer: Tokenizer, body: bytes) -> Keys | None:
    """By the tokenize-everything path; None when there are no keys."""
    reader = PromptReader(tokenizer)
    try:
        prompt = reader.text_of(RequestKind.CHAT, orjson.loads(body))
        ids = reader.tokens_of(prompt)
        keys = {v: reader.keys_of(ids, v[0], bigram=v[1], cache_salt=prompt.cache_salt) for v in VARIANTS}
    except (orjson.JSONDecodeError, PromptError):
        return None
    return Keys(len(ids), False, keys)


# ---- bodies, and the many ways in which their JSON can be written ----

TEXT = st.builds(
    lambda parts, times: "".join(parts) * times,
    st.lists(
        st.one_of(
            st.text(max_size=5),
            st.sampled_from(["the quick brown fox ", "x = f(y)\n", '"', "\\", "\\u0041", "é漢🙂", "<|im_end|>\n", "</think>", "a" * 90]),
        ),
        max_size=4,
    ),
    st.sampled_from([1, 1, 2, 30]),
)  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "dict"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", "Assistant"]), "content": TEXT}),
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}, optional={"name": TEXT}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXT | st.none(), "tool_calls": st.just([CALL])}),
    st.fixed_dictionaries({"role": st.just("tool"), "content": TEXT, "tool_call_id": st.just("1")}),
    st.fixed_dictionaries(
        {"role": st.just("user"), "content": st.lists(TEXT.map(lambda text: {"type": "text", "text": text}), max_size=2)}
    ),
)
TURN = st.fixed_dictionaries({"role": st.just("user"), "content": TEXT})
WRONG = st.sampled_from(
    [
        {"role": "wizard", "content": "x"}, {"role": "user"}, {"role": "user", "content": 5}, {"content": "x"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}, {"role": "assistant", "tool_calls": [{}]},
    ]
)  # fmt: skip
CONTEXT = st.fixed_dictionaries(
    {},
    optional={
        "model": st.just("m"),
        "temperature": st.sampled_from([0, 0.5, 1e-3]),
        "cache_salt": st.sampled_from(["", "tenant", None]),
        "tools": st.sampled_from([[], [TOOL], [TOOL, TOOL]]),
        "tool_choice": st.sampled_from(["none", "auto"]),
        "chat_template_kwargs": st.sampled_from([{}, {"enable_thinking": False}, {"date_string": "d"}, {"tools": []}]),
        "continue_final_message": st.booleans(),
        "input_ids": st.sampled_from([None, None, None, [1, 2, 3]]),
    },
)
SPACE = st.sampled_from(["", "", "", " ", "\n\t "])


@st.composite
def conversations(draw: st.DrawFn) -> list[Body]:
    """Bodies that grow and branch, most of them in one context."""
    contexts = draw(st.lists(CONTEXT, min_size=1, max_size=2))
    messages: list[Any] = draw(st.lists(MESSAGE, max_size=3)) if draw(st.booleans()) else []
    bodies = []
    for _ in range(draw(st.integers(1, 5))):
        kept = draw(st.integers(max(0, len(messages) - 3), len(messages)))
        alternate = [{"role": "user", "content": draw(TEXT)}]
        if kept and messages[kept - 1].get("role") == "user":
            alternate.insert(0, {"role": "assistant", "content": draw(TEXT)})
        fresh = draw(st.lists(MESSAGE, min_size=1, max_size=3)) if draw(st.booleans()) else alternate
        messages = messages[:kept] + fresh
        bodies.append({**draw(st.sampled_from(contexts)), "messages": messages})
    return bodies


def written(body: Body, space: str, is_ascii: bool, turned: bool) -> bytes:
    def turn(message: Any) -> Any:
        return dict(reversed(message.items())) if turned else message

    body = {**body, "messages": [turn(message) for message in body["messages"]]}
    if turned:
        body = dict(reversed(body.items()))
    text = json.dumps(body, ensure_ascii=is_ascii, separators=(f"{space},{space}", f"{space}:{space}"))
    return text.encode("utf-8", "surrogatepass")


class Chats:
    """What a shard does with a chat body, without its loop."""

    def __init__(self, tokenizer: Tokenizer, cache_bytes: int) -> None:
        self.tokenizer = tokenizer
        self.reader = PromptReader(tokenizer)
        self.keyer = LazyKeyer(tokenizer, cache_bytes)
        self.raw = RawReader(self.keyer)

    def forget(self) -> "Chats":
        """As a new one; to make one takes a while."""
        limit = self.keyer.prefixes._limit_bytes
        self.keyer.prefixes = PrefixCache(limit)
        self.keyer.pieces.cache = PieceCache(3 * limit)
        if self.raw._template is not None:
            self.raw._turns = Turns(self.keyer, self.raw._template)
        return self

    def begin(self, body: bytes, variants: list[Variant], head_chars: int) -> Keying | SeenKeying | None:
        """None: there are no keys."""
        keying = self.raw.begin(body, variants, head_chars)
        if keying is not None:
            return keying
        try:
            prompt = self.reader.text_of(RequestKind.CHAT, orjson.loads(body), head_chars)
            return self.keyer.begin(prompt, variants)
        except (orjson.JSONDecodeError, PromptError):
            return None

    def keys(self, body: bytes, variants: list[Variant], probe: Any, head_chars: int = 500, budget_chars: int = 1 << 62) -> Keys | None:
        keying = self.begin(body, variants, head_chars)
        if keying is None:
            return None
        try:
            while not keying.run(probe, budget_chars):
                budget_chars += 10_000
        except PromptError:
            return None
        return keying.keys


@pytest.fixture(scope="module")
def paths(tokenizers: dict[str, Tokenizer]) -> Callable[[str, int], Chats]:
    made: dict[tuple[str, int], Chats] = {}

    def path(name: str, cache_bytes: int) -> Chats:
        if (name, cache_bytes) not in made:
            made[name, cache_bytes] = Chats(tokenizers[name], cache_bytes)
        return made[name, cache_bytes].forget()

    return path


def check(tree: Tree, found: Keys | None, whole: Keys | None, variants: list[Variant]) -> None:
    if whole is None:
        # Of what the engine refuses, the beginning may have been read alone; then the end of the overlap is in it.
        assert found is None or found.is_estimated
        return
    assert found is not None
    assert found.is_estimated or found.tokens == whole.tokens
    for variant in variants:
        assert whole.keys[variant].startswith(found.keys[variant]) or found.is_estimated
        assert tree.overlaps(found.keys[variant]) == tree.overlaps(whole.keys[variant]), variant


OWNED = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(0, 3), st.integers(0, 300)), max_size=6)


@settings(max_examples=150)
@given(
    name=st.sampled_from(NAMES),
    bodies=conversations(),
    owned=OWNED,
    chosen=st.sets(st.integers(0, 3), min_size=1, max_size=2),
    cache_bytes=st.sampled_from([0, 60_000, 1 << 22]),
    budget_chars=st.sampled_from([0, 300, 5000]),
    head_chars=st.sampled_from([1, 500, 5000]),
    space=SPACE,
    is_ascii=st.booleans(),
    turned=st.booleans(),
)
def test_overlaps_are_those_of_the_plain_result(
    tree: Tree, paths: Callable[[str, int], Chats], name: str, bodies: list[Body], owned: list[tuple[int, int, int, int]], chosen: set[int],
    cache_bytes: int, budget_chars: int, head_chars: int, space: str, is_ascii: bool, turned: bool,
) -> None:  # fmt: skip
    tokenizer = paths(name, cache_bytes).tokenizer
    variants = [VARIANTS[i] for i in sorted(chosen)]
    texts = [written(body, space, is_ascii, turned) for body in bodies]
    expected = [plain(tokenizer, text) for text in texts]
    tree.writer.reset()
    for rank, number, variant, blocks in owned:
        whole = expected[number % len(texts)]
        if whole is not None:
            tree.writer.store(rank, 0, whole.keys[VARIANTS[variant]][: 8 * blocks])
    path = paths(name, cache_bytes)
    for text, whole in zip(texts * 2, expected * 2, strict=True):
        check(tree, path.keys(text, variants, tree.reader.match, head_chars, budget_chars), whole, variants)
    # Once all is owned by somebody, each conversation is followed to its end.
    for text, whole in zip(texts * 2, expected * 2, strict=True):
        if whole is not None:
            for variant in variants:
                tree.writer.store(3, 0, whole.keys[variant])
        check(tree, path.keys(text, variants, tree.reader.match, head_chars), whole, variants)
    assert path.keyer.prefixes.size_bytes <= cache_bytes // 4


@settings(max_examples=150)
@given(
    name=st.sampled_from(["demo", "chatml", "llama3", "neighbours"]),
    bodies=conversations(),
    wrong=WRONG,
    place=st.integers(0, 20),
    cuts=st.lists(st.tuples(st.integers(0, 1 << 20), st.sampled_from(list(b'"\\{}[],: x\x00\xff'))), max_size=2),
)
def test_what_is_wrong_is_found_or_does_no_harm(
    tree: Tree, paths: Callable[[str, int], Chats], name: str, bodies: list[Body], wrong: Any, place: int, cuts: list[tuple[int, int]]
) -> None:
    tokenizer = paths(name, 1 << 22).tokenizer
    path = paths(name, 1 << 22)
    tree.writer.reset()
    for body in bodies:
        right = written(body, "", False, False)
        messages = list(body["messages"])
        messages.insert(place % (len(messages) + 1), wrong)
        broken = bytearray(right)
        for at, byte in cuts:
            broken[at % len(broken)] = byte
        for text in (right, written({**body, "messages": messages}, "", False, False), bytes(broken), right[:-1], right + b"x"):
            whole = plain(tokenizer, text)
            for probe in (everybody, nobody, tree.reader.match):
                check(tree, path.keys(text, VARIANTS[2:], probe), whole, VARIANTS[2:] if probe != nobody else [])


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
        found = self.path.keys(body, [(16, False)], probe)
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
        assert found.keys[16, False] == whole.keys[16, False]


def test_a_conversation_that_goes_on_is_read_turn_by_turn(counted: Counted) -> None:
    for turns in range(1, 20, 2):
        body = chat(*LONG[:turns])
        found = counted.keys(body)
        assert len(counted.parsed) == (2 if turns > 1 else 1)
        whole = plain(counted.path.tokenizer, body)
        assert whole is not None
        assert found == Keys(whole.tokens, False, {(16, False): whole.keys[16, False]})


def test_of_an_unowned_conversation_only_the_beginning_is_read(counted: Counted) -> None:
    body = chat(*LONG)
    found = counted.keys(body, nobody)
    assert found.is_estimated
    assert len(counted.parsed) <= 3
    whole = plain(counted.path.tokenizer, body)
    assert whole is not None
    assert found.tokens == pytest.approx(whole.tokens, rel=0.3)


def test_parts_and_tools_are_read_at_once(counted: Counted) -> None:
    """Media has no keys, however late it comes; and what the template says to the tools may come late."""
    counted.keys(chat(*LONG, tools=[TOOL]), nobody)
    assert len(counted.parsed) == 20
    media = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
    body = orjson.loads(chat(*LONG))
    body["messages"].append(media)
    assert counted.path.keys(orjson.dumps(body), [(16, False)], nobody) is None


def test_other_contexts_are_other_conversations(counted: Counted) -> None:
    counted.keys(chat(*LONG[:19]))
    for context in ({"cache_salt": "s"}, {"tools": [TOOL]}, {"chat_template_kwargs": {"x": 1}}, {"reasoning_effort": "low"}):
        body = chat(*LONG[:19], "new", **context)
        found = counted.keys(body)
        assert len(counted.parsed) >= 19, context
        whole = plain(counted.path.tokenizer, body)
        assert whole is not None
        assert found.keys[16, False] == whole.keys[16, False]
    for context in ({"temperature": 0.5}, {"seed": 7}, {"stream": True, "user": "me"}, {"tools": [TOOL], "tool_choice": "none"}):
        counted.keys(chat(*LONG[:19], "new", **context))
        assert len(counted.parsed) == 1, context


def test_variants_are_kept_apart(counted: Counted) -> None:
    body = chat(*LONG[:19])
    choices: list[list[Variant]] = [[(16, False)], [(16, True)], [(16, False), (64, False)], [(16, False)]]
    for variants in choices:
        for _ in range(2):
            found = counted.path.keys(body, variants, everybody)
            assert found is not None
            assert found.keys.keys() == set(variants)
            for variant in variants:
                ids = counted.path.reader.tokens_of(counted.path.reader.text_of(RequestKind.CHAT, orjson.loads(body)))
                assert found.keys[variant] == counted.path.reader.keys_of(ids, variant[0], bigram=variant[1])


def test_an_open_turn_of_the_assistant_is_not_taken_for_a_closed_one(counted: Counted) -> None:
    """The last message of the assistant is printed as one of the user, or goes behind the prompt; both only while it is the last."""
    for body in (
        chat(*LONG[:4]), chat(*LONG[:4], continue_final_message=True), chat(*LONG[:5]), chat(*LONG[:4]), chat(*LONG[:6]),
        chat(*LONG[:6], continue_final_message=True), chat(*LONG[:7]), chat(*LONG[:6]), chat(*LONG[:5]),
    ):  # fmt: skip
        found = counted.keys(body)
        whole = plain(counted.path.tokenizer, body)
        assert whole is not None
        assert found == Keys(whole.tokens, False, {(16, False): whole.keys[16, False]})


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
    begin = raw.begin(chat(*LONG[:19]), [(16, False)], 500, small)
    assert isinstance(begin, RawKeying)
    assert not begin.run(everybody, 1000), "the rest is long"
    assert begin.run(everybody)
    assert isinstance(raw.begin(chat(*LONG[:19], "more"), [(16, False)], 500, small), SeenKeying)
    assert raw.begin(chat(*LONG[:19], "x" * 3000), [(16, False)], 500, small) is None, "the newest is too long"
    assert raw.begin(chat(*LONG[:19], "x" * 1500, "y" * 1500), [(16, False)], 500, small) is None, "what is new is too long"
    assert raw.begin(chat("x" * 3000, "new"), [(16, False)], 500, small) is None, "the first is too long"
    assert raw.begin(chat(*LONG[:19], tools=[TOOL]), [(16, False)], 500, small) is None, "all must be read"
    assert raw.begin(chat(*LONG[:3], *(["."] * 12)), [(16, False)], 500, (1 << 20, 10)) is not None
    assert raw.begin(chat(*LONG[:19], *"123456"), [(16, False)], 500, (1 << 20, 5)) is None, "too many messages"
    assert isinstance(raw.begin(chat(*LONG[:19], "x" * 3000), [(16, False)], 500), SeenKeying)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_module, "_FAMILIES", 5)
    path = Chats(load_tokenizer(DEMO_TOKENIZER_PATH), 1 << 20)
    for n in range(150):
        path.keys(chat(*LONG[: n % 19], f"other {n}"), [(16, False)], everybody)
        path.keys(chat(f"other {n}", *LONG[: n % 7], user="u" * 1000 * n), [(16, False)], everybody)
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
