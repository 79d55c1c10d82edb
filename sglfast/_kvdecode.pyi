from _typeshed import ReadableBuffer

STORE: int
REMOVE: int
CLEAR: int

def runs(payload: ReadableBuffer) -> tuple[int, list[tuple[int, int, bytes]]] | None:
    """Decode a KV event batch: (events, [(STORE | REMOVE | CLEAR, tier mask, keys)]), None when it is not entirely usual.

    Consecutive events of one kind and tiers are one run, in the order of the batch; keys are little-endian uint64. Mask 0: the
    blocks are in no tier of the worker.
    """

def token_ids(raw: ReadableBuffer) -> bytes | None:
    """Decode a msgpack array of token ids below 2**32 to little-endian uint32; None when it is anything else."""
