"""The calls whose instructions `make icount` counts.

A case is a function with the decorator below: it prepares everything and returns the call to repeat. It imports what it
measures inside, so that a case runs although another's module is not built. Its name is its key in icount.json.

As a program (icount.py runs it under valgrind): `icount_cases.py NAME TIMES`.
"""

import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

Call = Callable[[], object]

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
CASES: dict[str, Callable[[], Call]] = {}


def case(prepare: Callable[[], Call]) -> Callable[[], Call]:
    CASES[prepare.__name__] = prepare
    return prepare


# ---- tokens to block keys ----


@case
def page_keys_of_8192_tokens_by_64() -> Call:
    """What a shard does for an uncached prompt of 8,192 tokens (portable SHA-256: valgrind knows no SHA-NI)."""
    from sglfast._blockhash import page_keys

    return partial(page_keys, list(range(8192)), 64)


# ---- KV events ----


@case
def decode_batch_of_a_child_store() -> Call:
    """The common batch: one BlockStored of a few pages, map shape."""
    from sglfast.wire.kv_events import decode_batch

    folder = GOLDEN / "kv_events" / "sglang_batches" / "0.5.23"
    return partial(decode_batch, (folder / "stored_child_multi_page.msgpack").read_bytes())


@case
def decode_batch_of_64_stores_by_256_tokens() -> Call:
    """A large batch, map shape: the token ids must not be decoded."""
    from sglfast.wire.kv_events import decode_batch

    folder = GOLDEN / "kv_events" / "sglang_batches" / "0.5.23"
    return partial(decode_batch, (folder / "large_64x256.msgpack").read_bytes())


# ---- the hash tree in shared memory: match, apply ----

# ---- HTTP heads: request, response ----


def main() -> None:
    name, times = sys.argv[1], int(sys.argv[2])
    call = CASES[name]()
    call()  # what is made once only is made now
    gc.collect()
    gc.disable()
    for _ in range(times):
        call()


if __name__ == "__main__":
    main()
