"""The shard's half of the parity loop: the number of cached tokens is found in what workers really send, and nowhere else."""

import orjson
import pytest

from sglfast import _counters
from sglfast.edge.parity import cached_tokens_in, outcome_word

CHAT = {"choices": [], "usage": {"prompt_tokens": 900, "prompt_tokens_details": {"cached_tokens": 896}, "completion_tokens": 3}}
GENERATE = {"text": "x", "meta_info": {"id": "1", "prompt_tokens": 9, "cached_tokens": 64, "completion_tokens": 1}}


@pytest.mark.parametrize(
    ("piece", "found"),
    [
        (orjson.dumps(CHAT), 896),
        (orjson.dumps(GENERATE), 64),
        (b'data: {"usage":{"prompt_tokens_details":{"cached_tokens": 0}}}\n\ndata: [DONE]\n\n', 0),
        (b'{"cached_tokens":1} then {"cached_tokens":2}', 2),
        (b'{"prompt_tokens_details":null}', -1),
        (b'{"cached_tokens":null}', -1),
        (b'{"cached_tokens":-5}', -1),
        (b'{"cached_tokens":12', -1),  # the network may have cut the number
        (b'{"cached_tokens":', -1),
        (b"", -1),
        (orjson.dumps({"text": 'I say "cached_tokens":77, you see'}), -1),  # a model's text cannot look like it
        (b'{"cached_tokens":123456789012345678901234567890}', -1),
    ],
)
def test_cached_tokens_are_found(piece: bytes, found: int) -> None:
    assert cached_tokens_in(piece) == found


def test_outcomes_tell_in_which_direction() -> None:
    assert outcome_word(64, 64) == _counters.W_PARITY_EXACT
    assert outcome_word(128, 64) == _counters.W_PARITY_HIGH
    assert outcome_word(0, 64) == _counters.W_PARITY_LOW
