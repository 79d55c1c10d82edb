"""Lazy keys: the overlap of every rank is that of the plain result, and what was left undone was not needed."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import all_kinds
from unicode_texts import cjk_texts, unicode_texts

from sglfast import shm
from sglfast._blockhash import chain_seed, token_keys
from sglfast._hashtree import TreeReader, TreeWriter
from sglfast.errors import PromptError
from sglfast.prompt.adapters import starts_of
from sglfast.prompt.ids import Keys, Probe
from sglfast.prompt.keys import PromptReader, PromptText, RequestKind
from sglfast.prompt.lazy import LazyKeyer
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, Tokenizer, load_tokenizer
from sglfast.shm import Variant

BY_TOKENS = Variant(16, route="tokens", model="m", adapters="models")
ADAPTED = Variant(5, True, route="tokens", model="m")
VARIANTS: list[Variant] = [Variant(1), Variant(3), Variant(4, True), Variant(16), Variant(16, True), Variant(64), BY_TOKENS, ADAPTED]
RANKS = 3


class Tree:
    """A hash tree in shared memory with its writer and a reader."""

    def __init__(self) -> None:
        self.fd, segment = shm.create(max_workers=4, max_ranks=64, max_shards=1, capacity_blocks=1 << 16)
        self.writer, self.reader = TreeWriter(segment), TreeReader(segment)

    def overlaps(self, keys: bytes) -> dict[int, int]:
        self.reader.match(keys)
        return dict(self.reader.hits())


@dataclass
class Counting:
    """A tokenizer that counts the characters it was given; all of them, so its words are not remembered."""

    inner: Tokenizer
    chars: int = 0
    texts: list[str] = field(default_factory=list)
    word_pattern: int | None = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        self.chars += len(text)
        self.texts.append(text)
        return self.inner.encode(text, add_special_tokens)

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def nobody(keys: bytes) -> int:
    return 0


def everybody(keys: bytes) -> int:
    return len(keys) // 8


@pytest.fixture(scope="module")
def tree() -> Iterator[Tree]:
    tree = Tree()
    yield tree
    os.close(tree.fd)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return all_kinds(tmp_path_factory.mktemp("tokenizers"))


def plain(tokenizer: Tokenizer, prompt: PromptText, variants: Sequence[Variant]) -> Keys:
    """The same by the tokenize-everything path."""
    reader = PromptReader(tokenizer)
    ids = reader.tokens_of(prompt)
    salt = prompt.cache_salt
    keys = {}
    for variant in variants:
        size, bigram, route = variant[:3]
        keys[variant] = reader.keys_of(ids, size, bigram=bigram, cache_salt=salt)
        if route == "tokens":
            (start,) = starts_of((variant,), "", "", salt)
            assert start is not None
            n_max = len(keys[variant]) // 8
            keys[variant] = token_keys(ids, size, bigram=bigram, max_pages=n_max, seed=start.seed, parent=start.parent)
    return Keys(len(ids), False, keys)


def lazy(keyer: LazyKeyer, prompt: PromptText, variants: Sequence[Variant], probe: Probe | None) -> Keys:
    keying = keyer.begin(prompt, variants)
    assert keying.run(probe)
    return keying.keys


def beginning(prompt: PromptText, head_chars: int) -> PromptText:
    """The prompt as it is when only its first characters are rendered yet."""
    assert prompt.text is not None
    rest = prompt.text[head_chars:]
    if not head_chars or not rest:
        return prompt
    return prompt._replace(text=prompt.text[:head_chars], rest=lambda: rest, rest_chars=len(rest))


word = st.text(alphabet="abcDEF'éß漢0 .\n\t🙂\u0301\ufb01<|>_-", max_size=12)
part = st.one_of(
    word,
    st.sampled_from(
        ["<|im_end|>\n", "<|im_end|>\n<|im_start|>user\n", "<s>", "</s>", "the quick brown fox ", "x = f(y)\n", "a" * 300, " "]
    ),
)
message = st.builds(lambda parts, times: "".join(parts) * times, st.lists(part | cjk_texts | unicode_texts, max_size=8), st.integers(1, 30))
# Conversations that grow and branch: (how many messages of the one before are kept, new messages).
conversation = st.lists(st.tuples(st.integers(0, 6), st.lists(message, min_size=1, max_size=3)), min_size=1, max_size=5)
# What ranks own: (rank, prompt, variant, blocks from the first, a hole at).
ownership = st.lists(
    st.tuples(st.integers(0, RANKS - 1), st.integers(0, 4), st.integers(0, 5), st.integers(0, 200), st.integers(0, 200)), max_size=8
)


@settings(max_examples=80)
@given(
    turns=conversation,
    owned=ownership,
    chosen=st.sets(st.integers(0, 5), min_size=1, max_size=3),
    special=st.booleans(),
    cache_salt=st.sampled_from(["", "tenant"]),
    continuation=st.sampled_from(["", "so", "and then the quick brown fox " * 20]),
    cache_bytes=st.sampled_from([0, 20_000, 1 << 22]),
    budget_chars=st.sampled_from([0, 300, 5000]),
    head_chars=st.sampled_from([0, 10, 700, 3000]),
)
def test_overlaps_are_those_of_the_plain_result(
    tree: Tree, tokenizers: dict[str, Tokenizer], turns: list[tuple[int, list[str]]], owned: list[tuple[int, int, int, int, int]],
    chosen: set[int], special: bool, cache_salt: str, continuation: str, cache_bytes: int, budget_chars: int,
    head_chars: int,
) -> None:  # fmt: skip
    variants = [VARIANTS[i] for i in sorted(chosen)]
    messages: list[str] = []
    texts = []
    for kept, fresh in turns:
        messages = messages[:kept] + [f"<|im_start|>user\n{text}<|im_end|>\n" for text in fresh]
        texts.append("".join(messages) + "<|im_start|>assistant\n")
    prompts = [PromptText(text=text, add_special_tokens=special, cache_salt=cache_salt, continuation=continuation) for text in texts]
    for kind, tokenizer in tokenizers.items():
        tree.writer.reset()
        expected = [plain(tokenizer, prompt, VARIANTS) for prompt in prompts]
        for rank, number, variant, blocks, hole in owned:
            keys = expected[number % len(prompts)].keys[VARIANTS[variant]]
            tree.writer.store(rank, 0, keys[: 8 * blocks])
            tree.writer.remove(rank, 7, keys[8 * hole : 8 * hole + 8])
        keyer = LazyKeyer(tokenizer, cache_bytes)
        for prompt, whole in zip(prompts * 2, expected * 2, strict=True):
            keying = keyer.begin(beginning(prompt, head_chars), variants)
            while not keying.run(tree.reader.match, budget_chars):
                budget_chars += 10_000
            found = keying.keys
            assert found.is_estimated or found.tokens == whole.tokens, kind
            for variant_ in variants:
                assert whole.keys[variant_].startswith(found.keys[variant_]) or found.is_estimated, kind
                assert tree.overlaps(found.keys[variant_]) == tree.overlaps(whole.keys[variant_]), (kind, variant_)
            assert lazy(keyer, prompt, variants, None) == Keys(whole.tokens, False, {v: whole.keys[v] for v in variants}), kind


@pytest.fixture
def counting() -> Counting:
    return Counting(load_tokenizer(DEMO_TOKENIZER_PATH))


def keyer_of(counting: Counting, cache_bytes: int = 1 << 22) -> LazyKeyer:
    keyer = LazyKeyer(counting, cache_bytes)  # type: ignore[arg-type]
    counting.chars = 0
    return keyer


def turn(n: int, words: int) -> str:
    return f"<|im_start|>user\nmessage {n} " + f"all the words of message {n} are here " * (words // 8) + "<|im_end|>\n"


GENERATION = "<|im_start|>assistant\n"


def test_a_cold_prompt_costs_a_piece_or_two_whatever_its_length(counting: Counting) -> None:
    keyer = keyer_of(counting)
    text = "".join(turn(n, 1000) for n in range(200))
    found = lazy(keyer, PromptText(text=text), [Variant(64)], nobody)
    assert found.is_estimated
    assert counting.chars < 800 < 900_000 < len(text)
    assert found.tokens == pytest.approx(len(counting.inner.encode(text, False)), rel=0.3)


def test_a_cold_prompt_without_spaces_costs_a_piece_or_two(monkeypatch: pytest.MonkeyPatch) -> None:
    keyer = LazyKeyer(load_tokenizer(DEMO_TOKENIZER_PATH), 1 << 22)
    asked: list[str] = []
    encode_piece = keyer.pieces.encode_piece
    monkeypatch.setattr(keyer.pieces, "encode_piece", lambda piece: asked.append(piece) or encode_piece(piece))  # type: ignore[func-returns-value]
    text = "".join(f"<|im_start|>user\n第{n}句话" + "今天天气很好，我们去公园。" * 400 + "<|im_end|>\n" for n in range(40))
    found = lazy(keyer, PromptText(text=text), [Variant(64)], nobody)
    assert found.is_estimated
    assert 100 < sum(map(len, asked)) < 400 < 200_000 < len(text)


def test_a_seen_conversation_costs_its_newest_message_up_to_the_first_unowned_block(counting: Counting) -> None:
    keyer = keyer_of(counting)
    seen = "".join(turn(n, 400) for n in range(20))
    lazy(keyer, PromptText(text=seen + GENERATION), [Variant(64)], everybody)
    for new in (turn(20, 400), turn(21, 4000)):
        counting.chars = 0
        text = seen + new + GENERATION
        known = len(plain(counting.inner, PromptText(text=seen), [Variant(64)]).keys[Variant(64)])

        def only_seen(keys: bytes, known: int = known) -> int:
            return min(len(keys), known) // 8 if len(keys) >= known else 0

        found = lazy(keyer, PromptText(text=text), [Variant(64)], only_seen)
        assert found.is_estimated
        assert 0 < counting.chars < 600
    counting.chars = 0
    lazy(keyer, PromptText(text=seen + GENERATION), [Variant(64)], everybody)
    assert counting.chars == 0


def test_growth_is_paid_once(counting: Counting) -> None:
    """Turn after turn of one conversation, all of it owned: each character is tokenized about once."""
    keyer = keyer_of(counting)
    for turns in range(1, 30):
        text = "".join(turn(n, 200) for n in range(turns)) + GENERATION
        lazy(keyer, PromptText(text=text), [Variant(16), Variant(64, True)], everybody)
    assert counting.chars < 1.3 * len(text)


def test_a_rest_that_cannot_fill_a_block_is_not_tokenized(counting: Counting) -> None:
    keyer = keyer_of(counting)
    seen = turn(0, 400)
    lazy(keyer, PromptText(text=seen + GENERATION), [Variant(64)], everybody)
    tail = "<|im_start|>"
    counting.chars = 0
    found = lazy(keyer, PromptText(text=seen + tail), [Variant(64)], everybody)
    whole = plain(counting.inner, PromptText(text=seen + tail), [Variant(64)])
    assert found.keys == whole.keys
    assert found.is_estimated
    assert counting.chars == 0
    assert not lazy(keyer, PromptText(text=seen + tail), [Variant(1)], everybody).is_estimated


def test_variants_stop_each_on_its_own_and_go_on_together(counting: Counting) -> None:
    keyer = keyer_of(counting)
    text = "".join(turn(n, 100) for n in range(10))
    whole = plain(counting.inner, PromptText(text=text), [Variant(16), Variant(64)])
    owned = whole.keys[Variant(64)]

    def probe(keys: bytes) -> int:
        return len(keys) // 8 if keys in owned else 0

    found = lazy(keyer, PromptText(text=text), [Variant(16), Variant(64)], probe)
    assert found.keys == whole.keys  # the second time this text comes, either may be owned
    assert found.tokens == whole.tokens


def test_the_probe_is_asked_for_each_key_once(counting: Counting) -> None:
    keyer = keyer_of(counting)
    text = "".join(turn(n, 100) for n in range(40))
    asked: list[bytes] = []

    def probe(keys: bytes) -> int:
        asked.append(keys)
        return len(keys) // 8

    found = lazy(keyer, PromptText(text=text), [Variant(16)], probe)
    assert b"".join(asked).startswith(found.keys[Variant(16)])
    assert len(b"".join(asked)) <= len(found.keys[Variant(16)]) + 8


def test_the_budget_is_kept(counting: Counting) -> None:
    keyer = keyer_of(counting)
    text = "".join(turn(n, 400) for n in range(20))
    keying = keyer.begin(PromptText(text=text), [Variant(64)])
    assert not keying.run(everybody, 1000)
    assert 0 < counting.chars <= 1000
    assert keying.run(everybody)
    whole = plain(counting.inner, PromptText(text=text), [Variant(64)])
    assert keying.keys.keys == whole.keys
    assert abs(keying.keys.tokens - whole.tokens) < 64
    # No place to cut: whole, so not within the budget, wherever it stands.
    head = PromptText(text="<|im_start|>user\n" + "漢" * 5000 + "<|im_end|>" * 20, rest=lambda: "and more " * 1000)
    counting.chars = 0
    keying = keyer.begin(head, [Variant(64)])
    assert not keying.run(everybody, 1000)
    assert counting.chars == 0
    assert keying.run(nobody)
    long = "x" * 5000
    counting.chars = 0
    keying = keyer.begin(PromptText(text=long), [Variant(64)])
    assert not keying.run(everybody, 1000)
    assert counting.chars == 0


def test_token_ids_of_the_client_need_no_text(counting: Counting) -> None:
    keyer = keyer_of(counting)
    prompt = PromptText(token_ids=list(range(1000)), cache_salt="s")
    assert lazy(keyer, prompt, VARIANTS, nobody) == plain(counting.inner, prompt, VARIANTS)
    with pytest.raises(PromptError):
        lazy(keyer, PromptText(token_ids=[1, -1] * 10), [Variant(4)], nobody)


@pytest.mark.parametrize("text", ["\ud800", "<|im_end|>" * 9 + "\ud800" + "a" * 1000, "a " * 4000 + "\udfff<|im_end|>x"])
def test_half_a_surrogate_pair(counting: Counting, text: str) -> None:
    keyer = keyer_of(counting)
    lazy(keyer, PromptText(text=turn(0, 400) * 3), [Variant(4)], everybody)
    with pytest.raises(PromptError):
        lazy(keyer, PromptText(text=text), [Variant(4)], everybody)
    with pytest.raises(PromptError):
        lazy(keyer, PromptText(), [Variant(4)], everybody)


def test_the_caches_are_bounded(counting: Counting) -> None:
    keyer = keyer_of(counting, 80_000)
    for n in range(60):
        lazy(keyer, PromptText(text="".join(turn(i, 80) for i in range(n % 7, n))), [Variant(16)], everybody)
    assert 0 < keyer.prefixes.size_bytes <= 20_000
    assert 0 < keyer.pieces.cache.size_bytes <= 60_000


def test_salt_variants_and_special_tokens_keep_prefixes_apart(counting: Counting) -> None:
    keyer = keyer_of(counting)
    text = turn(0, 400) + GENERATION
    for salt in ("", "a", "b"):
        for special in (False, True):
            prompt = PromptText(text=text, add_special_tokens=special, cache_salt=salt)
            for variants in ([Variant(16)], [BY_TOKENS], [Variant(16, True)], [Variant(16), Variant(16, True)]):
                assert lazy(keyer, prompt, variants, everybody) == plain(counting.inner, prompt, variants)


def test_an_adapter_has_keys_of_its_own(counting: Counting) -> None:
    """Whatever the worker's route is; and what is remembered of the base model's prompt is not taken for the adapter's."""
    keyer, prompt = keyer_of(counting), PromptText(text=turn(0, 400) + GENERATION)
    ids = counting.inner.encode(prompt.text or "", False)
    shared = Variant(16, adapters="shared")
    variants = [Variant(16), shared, BY_TOKENS]
    base = plain(counting.inner, prompt, variants).keys
    by_name = token_keys(ids, 16, max_pages=(len(ids) - 1) // 16, seed=chain_seed("", 16, lora_name="ad"))
    by_model = token_keys(ids, 16, max_pages=(len(ids) - 1) // 16, seed=chain_seed("m", 16, lora_name="ad"))
    for asked, named, model_named in (
        (("m", ""), base[variants[0]], base[BY_TOKENS]),
        (("m", "ad"), by_name, base[BY_TOKENS]),
        (("m:ad", ""), by_name, None),
        (("ad", ""), base[variants[0]], by_model),
    ):
        for _ in range(2):
            for form in (prompt, PromptText(token_ids=ids)):
                keying = keyer.begin(form, variants, asked)
                assert keying.run(everybody)
                found = keying.keys.keys
                assert (found[variants[0]], found[shared]) == (named, base[shared])
                assert model_named is None or found[BY_TOKENS] == model_named


CHAT = {"messages": [{"role": ("user", "assistant")[n % 2], "content": f"{n} " + "the words " * 100} for n in range(21)]}


def test_of_a_long_chat_only_the_beginning_is_rendered_at_first() -> None:
    reader = PromptReader(load_tokenizer(DEMO_TOKENIZER_PATH))
    whole, head = reader.text_of(RequestKind.CHAT, CHAT), reader.text_of(RequestKind.CHAT, CHAT, 500)
    assert head.text is not None
    assert whole.text is not None
    assert head.rest is not None
    assert 500 <= len(head.text) < 3000
    assert head.rest_chars == pytest.approx(len(whole.text) - len(head.text), rel=0.1)
    assert head.text + head.rest() == whole.text
    assert reader.text_of(RequestKind.CHAT, CHAT, 1 << 20) == whole


def test_what_the_template_refuses_late_is_said_when_it_comes(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((Path(DEMO_TOKENIZER_PATH) / name).read_bytes())
    refusing = "{% for m in messages %}{{ m.content }}{% if loop.index == 5 %}{{ raise_exception('no fifth') }}{% endif %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(refusing)
    tokenizer = load_tokenizer(str(tmp_path))
    reader, keyer = PromptReader(tokenizer), LazyKeyer(tokenizer, 1 << 20)
    assert reader.text_of(RequestKind.CHAT, CHAT).reason == "template"
    assert reader.text_of(RequestKind.CHAT, CHAT, 1 << 20).reason == "template"
    keying = keyer.begin(reader.text_of(RequestKind.CHAT, CHAT, 500), [Variant(4)])
    with pytest.raises(PromptError, match="no fifth"):
        keying.run(everybody)
