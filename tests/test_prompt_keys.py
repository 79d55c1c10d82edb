"""sglfast.prompt.keys: where each endpoint's prompt stands, its tokens, its block keys; and that no body can hurt."""

import array
import copy
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model import page_hashes
from transformers import PreTrainedTokenizerFast

from sglfast.errors import PromptError
from sglfast.prompt.keys import PromptReader, PromptText, RequestKind
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, Tokenizer, load_tokenizer
from sglfast.shm import Dialect

CHAT, COMPLETIONS, GENERATE, EMBEDDINGS, *_ = RequestKind
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a hash?"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "dict"}}}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO_TOKENIZER_PATH)


@pytest.fixture(scope="module")
def reader(tokenizer: Tokenizer) -> PromptReader:
    return PromptReader(tokenizer)


def reader_with(tmp_path: Path, template: str | None, **config: Any) -> PromptReader:
    """A reader whose tokenizer has the demo's vocabulary and another template."""
    (tmp_path / "tokenizer.json").write_bytes((Path(DEMO_TOKENIZER_PATH) / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
    return PromptReader(load_tokenizer(str(tmp_path)))


class TestChat:
    def test_tokens_are_those_of_transformers(self, reader: PromptReader) -> None:
        theirs = PreTrainedTokenizerFast.from_pretrained(DEMO_TOKENIZER_PATH)
        body = {"model": "m", "messages": MESSAGES, "stream": True}
        want = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
        assert reader.tokens_of(reader.text_of(CHAT, body)) == want

    def test_tools_as_the_engine_prints_them(self, reader: PromptReader) -> None:
        text = reader.text_of(CHAT, {"messages": MESSAGES, "tools": [TOOL]}).text
        assert text is not None
        line = (
            '{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "description": null}, "defer_loading": null}'
        )
        assert line in text.splitlines()
        without = reader.text_of(CHAT, {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "none"})
        assert without == reader.text_of(CHAT, {"messages": MESSAGES})

    def test_second_try_with_bare_functions(self, tmp_path: Path) -> None:
        template = "{% for t in tools %}{{ raise_exception('no wrapper') if t.function is defined else t.name }}{% endfor %}"
        reader = reader_with(tmp_path, template)
        assert reader.text_of(CHAT, {"messages": MESSAGES, "tools": [TOOL]}).text == "f"

    def test_last_assistant_message(self, reader: PromptReader, tokenizer: Tokenizer) -> None:
        body = {"messages": [*MESSAGES, {"role": "assistant", "content": "A hash is"}]}
        closed = reader.text_of(CHAT, body)
        assert closed.text == reader.text_of(CHAT, {"messages": [*MESSAGES, {"role": "user", "content": "A hash is"}]}).text
        opened = reader.text_of(CHAT, {**body, "continue_final_message": True})
        before = reader.tokens_of(reader.text_of(CHAT, {"messages": MESSAGES}))
        assert reader.tokens_of(opened) == before + tokenizer.encode("A hash is", False)

    def test_continuation_loses_its_bos(self, tmp_path: Path) -> None:
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}
        reader = reader_with(tmp_path, "{{ bos_token + messages[0].content }}", **config)
        body = {"messages": [MESSAGES[1], {"role": "assistant", "content": " the"}], "continue_final_message": True}
        plain = load_tokenizer(str(tmp_path)).encode("<s>What is a hash? the", False)
        assert reader.tokens_of(reader.text_of(CHAT, body)) == plain

    def test_variables(self, tmp_path: Path) -> None:
        reader = reader_with(tmp_path, "{{ enable_thinking }} {{ reasoning_effort }} {{ x }}")
        body = {"messages": MESSAGES, "chat_template_kwargs": {"x": 1}, "reasoning_effort": "none"}
        assert reader.text_of(CHAT, body).text == "False none 1"

    def test_input_ids_go_before_messages(self, reader: PromptReader) -> None:
        prompt = reader.text_of(CHAT, {"messages": MESSAGES, "input_ids": [1, 2, 3], "cache_salt": "s"})
        assert (prompt.token_ids, prompt.text, prompt.cache_salt) == ([1, 2, 3], None, "s")

    def test_no_special_tokens_but_the_templates_own(self, tmp_path: Path) -> None:
        reader = reader_with(tmp_path, "{{ messages[0].content }}", tokenizer_class="LlamaTokenizer", bos_token="<s>")
        prompt = reader.text_of(CHAT, {"messages": MESSAGES})
        assert not prompt.add_special_tokens
        assert reader.tokens_of(prompt) == load_tokenizer(str(tmp_path)).encode("Be brief.", False)


class TestPlain:
    @pytest.mark.parametrize(("kind", "field"), [(COMPLETIONS, "prompt"), (GENERATE, "text"), (EMBEDDINGS, "input")])
    def test_text(self, tmp_path: Path, kind: RequestKind, field: str) -> None:
        reader = reader_with(tmp_path, None, tokenizer_class="LlamaTokenizer", bos_token="<s>")
        want = load_tokenizer(str(tmp_path)).encode("<s>a hash", False)
        for value in ("a hash", ["a hash"]):
            assert reader.tokens_of(reader.text_of(kind, {field: value})) == want

    @pytest.mark.parametrize(("kind", "field"), [(COMPLETIONS, "prompt"), (GENERATE, "input_ids"), (EMBEDDINGS, "input")])
    def test_token_ids(self, kind: RequestKind, field: str) -> None:
        reader = PromptReader(None)
        for value in ([5, 6, 7], [[5, 6, 7]]):
            assert reader.tokens_of(reader.text_of(kind, {field: value})) == [5, 6, 7]

    def test_cache_salt(self, reader: PromptReader) -> None:
        for salt, want in (("s", "s"), (["s"], "s"), (None, ""), ("", "")):
            assert reader.text_of(COMPLETIONS, {"prompt": "x", "cache_salt": salt}).cache_salt == want
            assert reader.text_of(CHAT, {"messages": MESSAGES, "cache_salt": salt}).cache_salt == want
        assert reader.text_of(EMBEDDINGS, {"input": "x", "cache_salt": "s"}).cache_salt == ""


class TestUnkeyable:
    @pytest.mark.parametrize(
        ("kind", "body", "reason"),
        [
            (CHAT, [], "malformed"),
            (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "media"),
            (CHAT, {"messages": MESSAGES, "chat_template_kwargs": {"tools": []}}, "template"),
            (CHAT, {"messages": MESSAGES, "cache_salt": 5}, "malformed"),
            (CHAT, {"messages": MESSAGES, "input_ids": []}, "malformed"),
            (COMPLETIONS, {}, "malformed"),
            (COMPLETIONS, {"prompt": ""}, "malformed"),
            (COMPLETIONS, {"prompt": []}, "malformed"),
            (COMPLETIONS, {"prompt": [[]]}, "malformed"),
            (COMPLETIONS, {"prompt": 5}, "malformed"),
            (COMPLETIONS, {"prompt": [1.5]}, "malformed"),
            (COMPLETIONS, {"prompt": ["a", "b"]}, "several_prompts"),
            (COMPLETIONS, {"prompt": [[1], [2]]}, "several_prompts"),
            (GENERATE, {}, "malformed"),
            (GENERATE, {"text": ["a", "b"]}, "several_prompts"),
            (GENERATE, {"text": "a", "image_data": "x.png"}, "media"),
            (GENERATE, {"input_embeds": [[0.5]]}, "media"),
            (GENERATE, {"text": "a", "session_params": {"id": "1"}}, "session"),
            (EMBEDDINGS, {"input": [{"text": "a", "image": "x"}]}, "media"),
        ],
    )
    def test_reason(self, reader: PromptReader, kind: RequestKind, body: Any, reason: str) -> None:
        prompt = reader.text_of(kind, body)
        assert prompt.reason == reason
        assert prompt.detail
        assert prompt.text is None
        assert prompt.token_ids is None
        with pytest.raises(PromptError):
            reader.tokens_of(prompt)

    def test_no_tokenizer(self) -> None:
        reader = PromptReader(None)
        assert reader.text_of(CHAT, {"messages": MESSAGES}).reason == "no_tokenizer"
        assert reader.text_of(COMPLETIONS, {"prompt": "x"}).reason == "no_tokenizer"
        with pytest.raises(PromptError):
            reader.tokens_of(PromptText(text="x"))

    def test_no_chat_template(self, tmp_path: Path) -> None:
        reader = reader_with(tmp_path, None)
        assert reader.text_of(CHAT, {"messages": MESSAGES}).reason == "no_chat_template"
        assert reader.text_of(COMPLETIONS, {"prompt": "x"}).text == "x"

    def test_refusal_of_the_template(self, tmp_path: Path) -> None:
        prompt = reader_with(tmp_path, "{{ raise_exception('no system role') }}").text_of(CHAT, {"messages": MESSAGES, "tools": [TOOL]})
        assert prompt.reason == "template"
        assert "no system role" in prompt.detail

    def test_half_a_surrogate_pair(self, reader: PromptReader) -> None:
        for prompt in (reader.text_of(COMPLETIONS, {"prompt": "\ud83d"}), PromptText(text="x", continuation="\ud83d")):
            with pytest.raises(PromptError, match="not valid Unicode"):
                reader.tokens_of(prompt)
        with pytest.raises(PromptError):
            reader.keys_of([1, 2, 3], 1, cache_salt="\ud83d")

    def test_too_deep(self, reader: PromptReader) -> None:
        deep: Any = {}
        for _ in range(20_000):
            deep = {"items": deep}
        tool = {"type": "function", "function": {"name": "f", "parameters": deep}}
        assert reader.text_of(CHAT, {"messages": MESSAGES, "tools": [tool]}).reason == "malformed"
        tool["function"]["parameters"] = {"default": deep}  # type: ignore[index]
        assert reader.text_of(CHAT, {"messages": MESSAGES, "tools": [tool]}).reason == "template"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ["messages", "tools", "tool_choice", "chat_template_kwargs", "reasoning", "reasoning_effort", "cache_salt", "prompt"]
FIELDS += ["input", "text", "input_ids", "continue_final_message", "session_params", "image_data"]
VALID = {
    "messages": [
        {"role": "system", "content": "s", "tools": [TOOL]},
        {"role": "user", "content": [{"type": "text", "text": "x"}]},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "y"}]},
    ],
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "reasoning": {"effort": "low", "enabled": "yes"},
    "prompt": ["x"],
    "text": "x",
    "input": [1, 2],
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path to a value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in inner for found in places(item, (*path, key)))]


class TestNoBodyHurts:
    def use(self, reader: PromptReader, body: Any) -> None:
        """All steps, for every kind: nothing but PromptError may come out, and the body stays as it was."""
        before = repr(body)
        for kind in RequestKind:
            prompt = reader.text_of(kind, body)
            assert (prompt.reason is None) == (prompt.text is not None or prompt.token_ids is not None)
            assert (prompt.reason is None) == (prompt.detail == "")
            try:
                keys = reader.keys_of(reader.tokens_of(prompt), 2, cache_salt=prompt.cache_salt)
            except PromptError:
                continue
            assert prompt.reason is None
            assert len(keys) % 8 == 0
        assert repr(body) == before

    @given(ANYTHING | st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=4))
    def test_anything(self, reader: PromptReader, body: Any) -> None:
        self.use(reader, body)

    @settings(max_examples=300)
    @given(st.sampled_from([path for path in places(VALID) if path]), ANYTHING)
    def test_one_wrong_value(self, reader: PromptReader, path: tuple[Any, ...], value: Any) -> None:
        body: Any = copy.deepcopy(VALID)
        parent = body
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = value
        self.use(reader, body)

    def test_the_valid_body_is_valid(self, reader: PromptReader) -> None:
        assert all(reader.text_of(kind, VALID).reason is None for kind in (CHAT, COMPLETIONS, GENERATE, EMBEDDINGS))


class TestKeys:
    @given(st.lists(st.integers(0, 2**32 - 1), max_size=70), st.integers(1, 20), st.booleans(), st.sampled_from(["", "salt"]))
    def test_all_but_the_last_token(self, reader: PromptReader, ids: list[int], block_size: int, bigram: bool, cache_salt: str) -> None:
        """An engine looks up the prompt without its last token."""
        want = page_hashes(ids[:-1], block_size, bigram=bigram, cache_salt=cache_salt.encode())
        packed = struct.pack(f"={len(want)}Q", *want)
        assert reader.keys_of(ids, block_size, bigram=bigram, cache_salt=cache_salt) == packed
        assert reader.keys_of(array.array("I", ids), block_size, bigram=bigram, cache_salt=cache_salt) == packed

    def test_counts(self, reader: PromptReader) -> None:
        def count(tokens: int, bigram: bool = False) -> int:
            return len(reader.keys_of(list(range(tokens)), 4, bigram=bigram)) // 8

        assert [count(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 0, 0, 1, 1, 2]
        assert [count(n, bigram=True) for n in (0, 1, 4, 5, 6, 9, 10)] == [0, 0, 0, 0, 1, 1, 2]

    @pytest.mark.parametrize("ids", [[-1, 2, 3], [2**64, 2, 3], ["a", 2, 3], [None, 2, 3], [1.5, 2, 3]])
    def test_bad_ids(self, reader: PromptReader, ids: list[Any]) -> None:
        with pytest.raises(PromptError, match="no block keys can be made"):
            reader.keys_of(ids, 2)

    @pytest.mark.parametrize("block_size", [0, -1])
    def test_bad_block_size(self, reader: PromptReader, block_size: int) -> None:
        with pytest.raises(ValueError, match="block_size must be at least 1"):
            reader.keys_of([1, 2, 3], block_size)


class TestVllm:
    """What a worker's engine changes of the same body."""

    VLLM = Dialect(engine="vllm")
    OPEN = ({"role": "user", "content": "count"}, {"role": "assistant", "content": "one, two"})

    def text(self, reader: PromptReader, **body: Any) -> PromptText:
        return reader.text_of(CHAT, {"messages": list(self.OPEN), **body}, 0, self.VLLM)

    def test_an_open_turn_of_the_assistant_stays_one(self, reader: PromptReader) -> None:
        theirs = PreTrainedTokenizerFast.from_pretrained(DEMO_TOKENIZER_PATH)
        for add, goes_on in ((True, False), (False, False), (False, True)):
            want = theirs.apply_chat_template(list(self.OPEN), add_generation_prompt=add, continue_final_message=goes_on, tokenize=False)
            prompt = self.text(reader, add_generation_prompt=add, continue_final_message=goes_on)
            assert (prompt.text, prompt.continuation, prompt.add_special_tokens) == (want, "", False)
        assert self.text(reader).text != reader.text_of(CHAT, {"messages": list(self.OPEN)}).text, "SGLang makes it a user's"
        assert self.text(reader, continue_final_message=True).reason == "template", "both is refused"

    def test_what_only_the_worker_knows(self, reader: PromptReader) -> None:
        assert self.text(reader, chat_template="{{ messages }}").reason == "template"
        assert self.text(reader, truncate_prompt_tokens=100).reason == "template"
        assert self.text(reader, chat_template_kwargs={"tools": []}).reason == "template"
        assert reader.text_of(COMPLETIONS, {"prompt": "x", "truncate_prompt_tokens": 5}, 0, self.VLLM).reason == "template"
        assert reader.text_of(COMPLETIONS, {"prompt": "x", "prompt_embeds": "AA"}, 0, self.VLLM).reason == "media"

    def test_special_tokens(self, reader: PromptReader) -> None:
        assert self.text(reader, add_special_tokens=True).add_special_tokens
        for fields, want in (({}, True), ({"add_special_tokens": True}, True), ({"add_special_tokens": False}, False)):
            prompt = reader.text_of(COMPLETIONS, {"prompt": "x", **fields}, 0, self.VLLM)
            assert (prompt.text, prompt.add_special_tokens) == ("x", want)
            assert reader.text_of(COMPLETIONS, {"prompt": "x", **fields}).add_special_tokens, "SGLang does not know the field"

    def test_input_ids_are_nothing_to_it(self, reader: PromptReader) -> None:
        assert self.text(reader, input_ids=[1, 2, 3]) == self.text(reader)

    def test_tools_are_shown_whatever_the_choice(self, reader: PromptReader, tmp_path: Path) -> None:
        line = '{"type": "function", "function": {"name": "f", "description": null, "parameters": {"type": "dict"}}}'
        for choice in ("auto", "none", {"type": "function", "function": {"name": "g"}}):
            text = self.text(reader, tools=[TOOL], tool_choice=choice).text
            assert text is not None
            assert line in text.splitlines()
        picky = reader_with(
            tmp_path, "{% for t in tools %}{{ raise_exception('no wrapper') if t.function is defined else t.name }}{% endfor %}"
        )
        assert self.text(picky, tools=[TOOL]).reason == "template", "there is no second try"
