"""How much of a body the loop may parse at once; more goes to the tokenizer's thread.

Runs in: shards (the loop and the tokenizer's thread).
Contract: a look at bytes that costs a small part of what parsing them would.
"""

from sglfast._jsonscan import ChatScan

# What may be parsed at once: bytes of JSON, and objects and arrays in them.
Budget = tuple[int, int]


def is_too_much(scan: ChatScan, first: int, budget: Budget | None) -> bool:
    """Whether the messages from `first` on are more than may be parsed at once."""
    count = len(scan)
    if budget is None or first == count:
        return False
    start, end = scan.start(first), scan.end(count - 1)
    if end - start > budget[0]:
        return True
    if scan.is_flat(first):
        return count - first > budget[1]
    return is_much(scan.body[start:end], budget)


def is_much(text: bytes, budget: Budget) -> bool:
    """Whether some JSON is more than may be parsed at once."""
    return len(text) > budget[0] or text.count(b"{") + text.count(b"[") > budget[1]
