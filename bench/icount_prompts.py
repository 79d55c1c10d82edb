"""The cases of icount_cases.py that are about prompts: from the bytes of a chat to its block keys, and the parts of that."""

from collections.abc import Callable
from functools import partial

Call = Callable[[], object]


def prompt_path_of_a_32_kb_chat_seen_but_for_its_newest_message() -> Call:
    """Bytes of a body to keys: 19 messages were seen and are owned, the 20th is another one in each call, of words that are known."""
    return prompt_path(is_seen=True)


def prompt_path_of_a_32_kb_chat_that_nobody_owns() -> Call:
    """Bytes of a body to the first key, which no rank owns; nothing of the conversation is remembered from call to call."""
    return prompt_path(is_seen=False)


def prompt_path_of_a_32_kb_chinese_chat_that_nobody_owns() -> Call:
    """As above, without spaces; the demo tokenizer knows no Chinese, so each character stays three tokens."""
    clauses = ("为每一个说过的词", "，都有一块标记在那里", "；谁见过它", "、谁就不必再算一遍。")
    return prompt_path(is_seen=False, text="".join(clauses) * 17)


def prompt_path_of_a_32_kb_chat_with_tools_seen_but_for_its_newest_round() -> Call:
    """As the first, with 10 KB of tools and rounds of a call and its answer; the last round is another one in each call."""
    return prompt_path_with_tools(is_seen=True)


def prompt_path_of_a_32_kb_chat_with_tools_that_nobody_owns() -> Call:
    """As the second, with the same tools in each call."""
    return prompt_path_with_tools(is_seen=False)


def split_of_a_32_kb_chat_into_its_messages() -> Call:
    """What both begin with, with an escape in every 60 characters or so."""
    from sglfast._jsonscan import scan_chat

    return partial(
        scan_chat, chat_body([f"{n} " + "a line of text with something said in it, and then\\nanother " * 30 for n in range(20)]), 1
    )


def words_of_2_kb_to_token_ids() -> Call:
    """English prose of words that all came before."""
    from sglfast._wordtable import GPT2, WordTable

    table = WordTable(1 << 20, 1, GPT2, {})
    text = "".join(f" {word} of them, and then some {word}s more." for word in ("many", "few", "one", "all", "some") * 10)[:2048]
    for _ in range(3):
        table.encode(text, lambda runs: [[len(run)] for run in runs])
    return partial(table.encode, text, lambda runs: [])


def prompt_path(*, is_seen: bool, text: str = "for every word that was said before there is a block of tokens " * 27) -> Call:
    texts = [f"{n} {text}" for n in range(19)]
    if is_seen:
        return keys_of_chats(chat_body(texts), lambda word: chat_body([*texts, f"and what now, {word}?"]))
    return keys_of_chats(b"", lambda word: chat_body([f"{word} {text}", *texts]))


def prompt_path_with_tools(*, is_seen: bool) -> Call:
    import orjson
    from prompt_texts import TOOLS, agent_chat, agent_round

    def body(messages: list[dict[str, object]]) -> bytes:
        return orjson.dumps({"model": "m", "messages": messages, "tools": TOOLS, "temperature": 0.7, "stream": True})

    text = "for every word that was said before there is a block of tokens " * 400
    size = 32_768 - len(orjson.dumps(TOOLS))
    if not is_seen:
        return keys_of_chats(b"", lambda word: body(agent_chat(f"{word} {text}", size, 9, 0)))
    base = agent_chat(text, size, 8, 0)
    return keys_of_chats(body(base), lambda word: body([*base, *agent_round(f"docs/{word}.txt", f"There is no {word} in it.")]))


def keys_of_chats(seen: bytes, body_with: Callable[[str], bytes]) -> Call:
    """Keys of a chat with another word in it in each call. seen: one that was seen and is owned, empty for none."""
    from itertools import cycle

    import orjson

    from sglfast._hashtree import TreeReader, TreeWriter
    from sglfast.prompt.keys import PromptReader, RequestKind
    from sglfast.prompt.lazy import LazyKeyer
    from sglfast.prompt.raw import RawReader
    from sglfast.prompt.tokenizer import DEMO_TOKENIZER_PATH, load_tokenizer
    from sglfast.shm import Variant, create

    _, segment = create(max_workers=64, max_ranks=64, max_shards=1, capacity_blocks=1 << 16)
    tokenizer = load_tokenizer(DEMO_TOKENIZER_PATH)
    raw, tree = RawReader(LazyKeyer(tokenizer, 32 << 20)), TreeReader(segment)
    variants = (Variant(64),)
    if seen:
        plain = PromptReader(tokenizer)
        ids = plain.tokens_of(plain.text_of(RequestKind.CHAT, orjson.loads(seen)))
        TreeWriter(segment).store(0, 0, plain.keys_of(ids, 64))
    bodies = cycle([body_with(word) for word in tokenizer.plain_words()[:1200]])

    def key() -> None:
        keying = raw.begin(next(bodies), variants, 1024)
        assert keying is not None
        assert keying.run(tree.match)

    if seen:
        keying = raw.begin(seen, variants, 1024)
        assert keying is not None
        assert keying.run(tree.match)
        key()  # the second of a kind makes the frame
    return key


def chat_body(texts: list[str]) -> bytes:
    """A chat request whose messages have these texts."""
    messages = ",".join(f'{{"role":"{("user", "assistant")[n % 2]}","content":"{text}"}}' for n, text in enumerate(texts))
    return f'{{"model":"m","messages":[{messages}],"temperature":0.7,"stream":true}}'.encode()


PROMPT_CASES: tuple[Callable[[], Call], ...] = (
    prompt_path_of_a_32_kb_chat_seen_but_for_its_newest_message,
    prompt_path_of_a_32_kb_chat_that_nobody_owns,
    prompt_path_of_a_32_kb_chinese_chat_that_nobody_owns,
    prompt_path_of_a_32_kb_chat_with_tools_seen_but_for_its_newest_round,
    prompt_path_of_a_32_kb_chat_with_tools_that_nobody_owns,
    split_of_a_32_kb_chat_into_its_messages,
    words_of_2_kb_to_token_ids,
)
