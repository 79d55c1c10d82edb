"""Word patterns that compiled code can cut by (cext/sf_pretoken.h, cext/sf_unitoken.h), as the files of models have them.

Runs in: shards, simulator, when the tokenizer is loaded.
Contract: `word_pattern_of` knows a pre-tokenizer by its exact spelling; another one for the same words costs speed, not exactness.
"""

from typing import Any

from sglfast import _wordtable

# Of Llama 3 and of Qwen 2 and 3, as their tokenizer.json has them.
_LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Of gpt-oss, Llama 4 and MiniMax M2; and of Mistral Nemo and Nemotron 3, who leave out what follows a word.
_O200K_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Of DeepSeek V3 and R1, one cut after another.
_DEEPSEEK3_WORDS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
WORD_PATTERNS: dict[tuple[str | None, ...], int] = {
    (_LLAMA3_WORDS,): _wordtable.LLAMA3,
    (_LLAMA3_WORDS.replace("{1,3}", ""),): _wordtable.QWEN2,
    (_O200K_WORDS,): _wordtable.O200K,
    (_O200K_WORDS.replace("{1,3}", "").replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", ""),): _wordtable.TEKKEN,
    _DEEPSEEK3_WORDS: _wordtable.DEEPSEEK3,
}


def word_pattern_of(pre_tokenizer: dict[str, Any]) -> int | None:
    """A pattern of _wordtable; None where a tokenizer.json's `pre_tokenizer` cuts text in another way, or does more to it."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _wordtable.GPT2
        case {"type": "Sequence", "pretokenizers": [*splits, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}:
            return WORD_PATTERNS.get(tuple(map(_split_pattern, splits)))
    return None


def _split_pattern(step: dict[str, Any]) -> str | None:
    """The pattern of a step that cuts text at its matches, and between them; None of any other."""
    match step:
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return pattern.replace("\r", r"\r").replace("\n", r"\n")  # some files have the characters themselves
        # Takes away what is between matches, where all text is matched.
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Removed", "invert": True}:
            return pattern if (pattern,) in WORD_PATTERNS else None
    return None
