"""sglfast.prompt.tokenizer against transformers' own loading of the same folders; what is refused; the demo tokenizer."""

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sglfast.errors import ConfigError
from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, Tokenizer, load_tokenizer, single_token_words

DEMO = Path(DEMO_TOKENIZER_PATH)
MESSAGES = [{"role": "user", "content": "hi"}]
TEXTS = [
    "",
    " ",
    "Hello, the world!\n\n  def f(x): return x",
    "<|im_start|>user\nhi<|im_end|>",
    "<s>a</s><extra> <|new|>x<|other|>",
    "é 日本 🎉 don't 12345",
]


def write_folder(folder: Path, config: dict[str, Any] | None, tokenizer: dict[str, Any] | None = None) -> str:
    """A tokenizer folder: the demo's vocabulary with changes to tokenizer.json, and a tokenizer_config.json."""
    whole = json.loads((DEMO / "tokenizer.json").read_bytes())
    (folder / "tokenizer.json").write_text(json.dumps(whole | (tokenizer or {})))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer(DEMO_TOKENIZER_PATH)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(DEMO_TOKENIZER_PATH)


def bos_template(bos_id: int) -> dict[str, Any]:
    """A post-processor of tokenizer.json that puts <|endoftext|> before a text, as Llama 3 does with its BOS."""
    special = {"id": "<|endoftext|>", "ids": [bos_id], "tokens": ["<|endoftext|>"]}
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": special},
    }


def sentencepiece(folder: Path, config: dict[str, Any], *, has_normalizer: bool) -> str:
    """A folder as those of Llama 2 (marks made by the normalizer) and of Mistral 7B v0.3 (by the pre-tokenizer)."""
    rust = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    rust.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    specials = ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=specials)
    rust.train_from_iterator(["the quick brown fox of the lazy dog", "in the end it is the best of all"] * 20, trainer)
    if has_normalizer:
        make = tokenizers.normalizers
        rust.normalizer = make.Sequence([make.Prepend("▁"), make.Replace(" ", "▁")])
        rust.pre_tokenizer = None
    else:
        rust.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    rust.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens | config))
    return str(folder)


@pytest.mark.parametrize("has_normalizer", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": False},
        {"tokenizer_class": "LlamaTokenizerFast", "legacy": None},
        {"tokenizer_class": "LlamaTokenizer", "legacy": True},
        {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_prefix_space": False},
        {"tokenizer_class": "CodeLlamaTokenizer", "legacy": True},
        {"tokenizer_class": "PreTrainedTokenizerFast", "legacy": True},
    ],
)
def test_marks_of_a_beginning_are_those_of_the_class(config: dict[str, Any], has_normalizer: bool, tmp_path: Path) -> None:
    path = sentencepiece(tmp_path, config, has_normalizer=has_normalizer)
    theirs = AutoTokenizer.from_pretrained(path)
    ours = load_tokenizer(path)
    for text in (
        "the fox",
        " the",
        "  the",
        "<s>the fox",
        "<|user|>\nthe end<|end|>\n<|user|> of it",
        "the<|end|>the",
        "a   b",
        "",
        "é 漢",
    ):
        assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False), text


class TestAsTransformers:
    @given(st.text(max_size=60), st.booleans())
    def test_demo(self, demo: Tokenizer, theirs: Any, text: str, add_special_tokens: bool) -> None:
        ids = demo.encode(text, add_special_tokens)
        assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
        assert demo.decode(ids) == text == theirs.decode(ids, skip_special_tokens=False)

    def test_demo_chat(self, demo: Tokenizer, theirs: Any) -> None:
        assert demo.chat is not None
        want = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        assert demo.chat.render(MESSAGES) == want
        ids = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
        assert demo.encode(want, False) == ids

    @pytest.mark.parametrize(
        ("config", "tokenizer"),
        [
            (None, {}),
            ({}, {}),
            ({"model_max_length": 1000000000000000019884624838656}, {}),
            ({"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True}}, {}),
            ({"bos_token": None, "unk_token": "<|endoftext|>", "pad_token": "the"}, {}),
            (
                {
                    "added_tokens_decoder": {
                        "8193": {"content": "<|other|>", "lstrip": True, "normalized": False, "special": True},
                        "8192": {"content": "<extra>", "rstrip": True, "normalized": False, "special": False},
                        "8189": {"content": "<|endoftext|>", "special": True},
                    },
                    "extra_special_tokens": ["<|new|>"],
                },
                {},
            ),
            ({"additional_special_tokens": ["<|new|>", "<|im_end|>"]}, {}),
            ({"bos_token": "<|endoftext|>", "add_bos_token": True, "add_eos_token": True, "eos_token": "<|im_end|>"}, {}),
            ({"bos_token": "<|endoftext|>", "add_bos_token": False}, {"post_processor": bos_template(8189)}),
            ({}, {"post_processor": bos_template(8189)}),
            ({}, {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}}),
            (
                {},
                {
                    "padding": {
                        "strategy": {"Fixed": 40},
                        "direction": "Right",
                        "pad_to_multiple_of": None,
                        "pad_id": 0,
                        "pad_type_id": 0,
                        "pad_token": "<|endoftext|>",
                    }
                },
            ),
        ],
    )
    def test_folders(self, tmp_path: Path, config: dict[str, Any] | None, tokenizer: dict[str, Any]) -> None:
        path = write_folder(tmp_path, config, tokenizer)
        ours, theirs = load_tokenizer(path), PreTrainedTokenizerFast.from_pretrained(path)
        assert ours.vocab_size == len(theirs)
        assert ours.special_tokens == theirs.special_tokens_map
        assert ours.bos_token_id == (theirs.bos_token_id if "bos_token" in ours.special_tokens else None)
        for text in TEXTS:
            for add_special_tokens in (True, False):
                want = theirs.encode(text, add_special_tokens=add_special_tokens)
                assert ours.encode(text, add_special_tokens) == want, (text, add_special_tokens)


@pytest.mark.parametrize(
    ("config", "is_added"),
    [
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, True),
        ({"tokenizer_class": "LlamaTokenizer"}, True),
        ({"tokenizer_class": "GemmaTokenizer", "add_bos_token": None, "add_eos_token": True}, True),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, False),
        ({"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": True}, False),
        ({"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True}, False),
    ],
)
def test_bos_of_llama_classes(tmp_path: Path, config: dict[str, Any], is_added: bool) -> None:
    # SGLang 0.5.23 sets add_bos_token again for these classes, which transformers 5 no longer reads.
    tokenizer = load_tokenizer(write_folder(tmp_path, {"bos_token": "<s>", "eos_token": "</s>", **config}))
    plain = tokenizer.encode(" the world", False)
    assert tokenizer.encode(" the world", True) == ([tokenizer.bos_token_id, *plain] if is_added else plain)
    assert tokenizer.encode("<s>", False) == [tokenizer.bos_token_id]


class TestChatTemplate:
    def rendered(self, path: str) -> str:
        chat = load_tokenizer(path).chat
        assert chat is not None
        return chat.render(MESSAGES)

    def test_of_the_config(self, tmp_path: Path) -> None:
        config = {"eos_token": "</s>", "chat_template": "{{ messages[0].content + eos_token }}"}
        assert self.rendered(write_folder(tmp_path, config)) == "hi</s>"

    def test_first_of_several(self, tmp_path: Path) -> None:
        named = [{"name": "default", "template": "default"}, {"name": "tool_use", "template": "tools"}]
        assert self.rendered(write_folder(tmp_path, {"chat_template": named})) == "default"

    def test_file_wins(self, tmp_path: Path) -> None:
        path = write_folder(tmp_path, {"chat_template": "config", "bos_token": "<s>"})
        (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}file é", encoding="utf-8")
        assert self.rendered(path) == "<s>file é"
        assert self.rendered(f"{path}/tokenizer.json") == "<s>file é"

    def test_none(self, tmp_path: Path) -> None:
        assert load_tokenizer(write_folder(tmp_path, {})).chat is None
        assert load_tokenizer(write_folder(tmp_path, None)).chat is None


class TestRefused:
    def refused(self, path: Path | str, match: str) -> None:
        with pytest.raises(ConfigError, match=match) as caught:
            load_tokenizer(str(path))
        assert str(path) in str(caught.value) or "chat template" in str(caught.value)

    def test_nothing_there(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "no", "is not a file; give a folder that holds tokenizer.json")
        self.refused(tmp_path, "is not a file; give a folder that holds tokenizer.json")
        with pytest.raises(ConfigError):
            load_tokenizer("")

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', "\0"])
    def test_no_tokenizer_json(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "tokenizer.json").write_text(text)
        self.refused(tmp_path, "not a tokenizer.json of Hugging Face")

    @pytest.mark.parametrize(("text", "match"), [("{", "broken JSON"), ("[]", "must be a JSON object"), ("\xff", "broken JSON")])
    def test_config(self, tmp_path: Path, text: str, match: str) -> None:
        path = write_folder(tmp_path, None)
        (tmp_path / "tokenizer_config.json").write_bytes(text.encode("latin-1"))
        self.refused(path, match)

    @pytest.mark.parametrize(
        ("template", "match"),
        [
            ("{% if %}", "not valid jinja2"),
            (5, "must be a string or a list of named templates"),
            ([], "a list without a template"),
            ([{"name": "default"}], "a list without a template"),
            ([5], "a list without a template"),
        ],
    )
    def test_chat_template(self, tmp_path: Path, template: Any, match: str) -> None:
        self.refused(write_folder(tmp_path, {"chat_template": template}), match)

    def test_chat_template_file(self, tmp_path: Path) -> None:
        path = write_folder(tmp_path, None)
        (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
        self.refused(path, "must be UTF-8")

    def test_odd_entries_of_a_config_do_no_harm(self, tmp_path: Path) -> None:
        config = {"bos_token": 5, "eos_token": {"content": 5}, "added_tokens_decoder": {"x": 5}, "extra_special_tokens": {"a": 1}}
        tokenizer = load_tokenizer(write_folder(tmp_path, config))
        assert tokenizer.special_tokens == {}


class TestDemoTokenizer:
    def test_files(self, demo: Tokenizer) -> None:
        assert sum(file.stat().st_size for file in DEMO.iterdir()) < 700_000
        assert 8000 <= demo.vocab_size <= 8200
        specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        assert [len(demo.encode(token, False)) for token in specials] == [1, 1, 1]
        ids = demo.encode("".join(specials) + "x", False)
        assert demo.decode(ids) == "<|endoftext|><|im_start|><|im_end|>x"
        assert demo.decode(ids, skip_special_tokens=True) == "x"

    def test_a_word_is_a_token(self, demo: Tokenizer) -> None:
        words = single_token_words(demo)
        assert len(words) >= 2000
        assert words == sorted(set(words))
        assert all(word.isascii() and word.isalpha() and word.islower() for word in words)
        rng = random.Random(5)
        for count in (1, 2, 511, 4096):
            chosen = rng.choices(words, k=count)
            ids = demo.encode("".join(" " + word for word in chosen), True)
            assert ids == [demo.encode(" " + word, False)[0] for word in chosen]

    def test_words_survive_the_chat_template(self, demo: Tokenizer) -> None:
        """Load generators count on it: a message of n words adds n tokens, whatever n is."""
        chat = demo.chat
        assert chat is not None
        words = single_token_words(demo)

        def count(n: int) -> int:
            text = chat.render([{"role": "user", "content": "".join(" " + word for word in words[:n])}])
            return len(demo.encode(text, False))

        assert [count(n) - count(1) for n in (2, 100, 2000)] == [1, 99, 1999]

    def test_threads(self, demo: Tokenizer) -> None:
        texts = [f"{number} the value of {number * 7} is {'not ' * number}here" for number in range(40)]
        want = [demo.encode(text, False) for text in texts]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                assert list(pool.map(lambda text: demo.encode(text, False), texts)) == want


def test_single_token_words_refuses_a_tokenizer_that_merges_words(tmp_path: Path) -> None:
    pieces = ["\u0120", "a", "b", "ab", "ba", "\u0120ab", "\u0120ba", "\u0120ab\u0120ba"]
    merges = [("a", "b"), ("b", "a"), ("\u0120", "ab"), ("\u0120", "ba"), ("\u0120ab", "\u0120ba")]
    rust = tokenizers.Tokenizer(tokenizers.models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = tokenizers.decoders.ByteLevel()
    rust.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="merges words across spaces"):
        single_token_words(load_tokenizer(str(tmp_path)))
