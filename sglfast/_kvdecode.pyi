from _typeshed import ReadableBuffer

STORE: int
REMOVE: int
CLEAR: int

def runs(payload: ReadableBuffer) -> tuple[int, list[tuple[int, int, bytes]]] | None:
    """Decode a KV event batch: (events, [(STORE | REMOVE | CLEAR, tier mask, keys)]), None when it is not entirely usual.

    Consecutive events of one kind and tiers are one run, in the order of the batch; keys are little-endian uint64. Mask 0: the
    blocks are in no tier of the worker.
    """

def runs_of_batches(payloads: ReadableBuffer, ends: ReadableBuffer, first: int = 0) -> tuple[int, int, list[tuple[int, int, bytes]]]:
    """Decode batches as if they were one, from number `first` on up to one that is not entirely usual: (batches, events, as `runs`).

    payloads: one behind the other; ends: where each ends, as native uint64. Raises ValueError when these do not go together.
    """

def token_ids(raw: ReadableBuffer) -> bytes | None:
    """Decode a msgpack array of token ids below 2**32 to little-endian uint32; None when it is anything else."""
