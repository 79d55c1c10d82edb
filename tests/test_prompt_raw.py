"""sglfast.prompt.raw and seen: from the bytes of chat bodies, the overlap of every rank is that of the plain result."""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chat_paths import NAMES, TOOL, VARIANTS, VLLM_VARIANTS, Chats, everybody, nobody, plain, tokenizers_of
from hypothesis import given, settings
from hypothesis import strategies as st

from sglfast import shm
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast.prompt.ids import Keys
from sglfast.prompt.keys import RequestKind
from sglfast.shm import Dialect, Variant

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
def paths(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Chats]:
    tokenizers = tokenizers_of(tmp_path_factory.mktemp("tokenizers"))
    made: dict[tuple[str, int], Chats] = {}

    def path(name: str, cache_bytes: int) -> Chats:
        if (name, cache_bytes) not in made:
            made[name, cache_bytes] = Chats(tokenizers[name], cache_bytes)
        return made[name, cache_bytes].forget()

    return path


# ---- bodies, and the many ways in which their JSON can be written ----

TEXT = st.builds(
    lambda parts, times: "".join(parts) * times,
    st.lists(
        st.one_of(
            st.text(max_size=5),
            st.sampled_from(["<think>", "<tool_response>"]),
            st.sampled_from(["the quick brown fox ", "x = f(y)\n", '"', "\\", "\\u0041", "é漢🙂", "<|im_end|>\n", "</think>", "a" * 90]),
        ),
        max_size=4,
    ),
    st.sampled_from([1, 1, 2, 30]),
)  # fmt: skip
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", "Assistant"]), "content": TEXT}),
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT}, optional={"name": TEXT}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": TEXT | st.none(), "tool_calls": st.just([CALL])}),
    st.fixed_dictionaries({"role": st.just("tool"), "content": TEXT, "tool_call_id": st.just("1")}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": TEXT, "reasoning_content": TEXT}, optional={"tool_calls": st.just([CALL])}
    ),
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
        "model": st.sampled_from(["m", "m", "m:adapter"]),
        "lora_path": st.sampled_from([None, None, "adapter", ["other"]]),
        "temperature": st.sampled_from([0, 0.5, 1e-3]),
        "cache_salt": st.sampled_from(["", "tenant", None]),
        "tools": st.sampled_from([[], [TOOL], [TOOL, TOOL]]),
        "tool_choice": st.sampled_from(["none", "auto"]),
        "chat_template_kwargs": st.sampled_from([{}, {"enable_thinking": False}, {"date_string": "d"}, {"tools": []}]),
        "continue_final_message": st.booleans(),
        "add_generation_prompt": st.sampled_from([None, True, False]),
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
    known=st.sampled_from([VARIANTS, VARIANTS, VLLM_VARIANTS]),
)
def test_overlaps_are_those_of_the_plain_result(
    tree: Tree, paths: Callable[[str, int], Chats], name: str, bodies: list[Body], owned: list[tuple[int, int, int, int]], chosen: set[int],
    cache_bytes: int, budget_chars: int, head_chars: int, space: str, is_ascii: bool, turned: bool,
    known: list[Variant],
) -> None:  # fmt: skip
    tokenizer = paths(name, cache_bytes).tokenizer
    variants = [known[i] for i in sorted(chosen)]
    texts = [written(body, space, is_ascii, turned) for body in bodies]
    expected = [plain(tokenizer, text, known) for text in texts]
    tree.writer.reset()
    for rank, number, variant, blocks in owned:
        whole = expected[number % len(texts)]
        if whole is not None:
            tree.writer.store(rank, 0, whole.keys[known[variant]][: 8 * blocks])
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


def test_one_body_for_workers_of_several_versions(paths: Callable[[str, int], Chats]) -> None:
    path = paths("qwen25", 1 << 22)
    body = json.dumps({"messages": [{"role": "user", "content": "hi " * 50}], "tools": [TOOL]}).encode()
    found = set()
    kwargs = '{"enable_thinking":false}'  # which this template does not ask for
    dialects = [Dialect("kept"), Dialect("deferrable"), Dialect("wrapped"), Dialect("flat"), Dialect("kept", kwargs)]
    for dialect in dialects * 2:
        variant = Variant(16, dialect=dialect)
        prompt = path.reader.text_of(RequestKind.CHAT, json.loads(body), 0, dialect)
        expected = path.reader.keys_of(path.reader.tokens_of(prompt), 16)
        keying = path.raw.begin(body, [variant], 500)
        assert keying is not None
        assert keying.run(everybody)
        assert keying.keys.keys[variant] == expected
        found.add(expected)
    assert len(found) == 4
