"""Small real tokenizers of the kinds that models come with, trained here and read by the same loader as a model's."""

import json
from pathlib import Path

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer

from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, Tokenizer, load_tokenizer

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
TEKKEN = O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")
CORPUS = [
    "the quick brown fox jumps over the lazy dog's back",
    "def f(x):\n    return x + 1\n",
    "été à la plage, naïve café",
    "漢字かな交じり文",
    "的一是不了人，我在有他。这中大来上国的人，他是大国的人！",
    "、한국어 문장。カタカナの・ー（中国）《国人》２０２６年",
] * 20


def build(kind: str, folder: Path) -> Tokenizer:
    """A small real tokenizer of a kind, through the same loader as a model's."""
    specials = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "[UNK]"]
    if kind == "wordpiece":
        rust = RustTokenizer(models.WordPiece(unk_token="[UNK]"))
        rust.normalizer = normalizers.BertNormalizer(lowercase=True)
        rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials)
    elif kind == "unigram":
        rust = RustTokenizer(models.Unigram())
        rust.pre_tokenizer = pre_tokenizers.Metaspace()
        rust.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=specials, unk_token="[UNK]")
    elif kind == "llama2":  # a marker before every text, no pre-tokenizer: must be taken whole
        rust = RustTokenizer(models.BPE(unk_token="[UNK]", byte_fallback=True))
        rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials)
    else:
        rust = RustTokenizer(models.BPE())
        if kind == "byte_level":
            rust.normalizer = normalizers.NFC()
        patterns = {"deepseek3": DEEPSEEK3, "o200k": (O200K,), "tekken": (TEKKEN,)}.get(kind, (LLAMA3,))
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        rust.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        if kind == "gpt2":
            rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    rust.train_from_iterator(CORPUS, trainer)
    rust.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "tokenizer_class": "LlamaTokenizerFast"}))
    return load_tokenizer(str(folder))


def all_kinds(folder: Path) -> dict[str, Tokenizer]:
    """One of each kind, by name; `folder` takes their files."""
    found = {"demo": load_tokenizer(DEMO_TOKENIZER_PATH)}
    for kind in ("byte_level", "deepseek3", "o200k", "wordpiece", "unigram", "llama2"):
        (folder / kind).mkdir()
        found[kind] = build(kind, folder / kind)
    return found
