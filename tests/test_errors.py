"""sglfast.errors: the table of router-made answers, whose codes and positions are frozen, and the exceptions."""

import inspect
import re

import pytest

from sglfast import errors
from sglfast.errors import REASON_INDEX, REASONS, Reason, SglfastError

# Position = word of the shards' columns; code and status are what clients match on. Rows are added at the end only.
FROZEN = (
    ("bad_request", 400, "client", False),
    ("not_found", 404, "client", False),
    ("method_not_allowed", 405, "client", False),
    ("request_timeout", 408, "client", True),
    ("payload_too_large", 413, "client", False),
    ("headers_too_large", 431, "client", False),
    ("model_not_found", 404, "client", False),
    ("upstream_unreachable", 502, "worker", True),
    ("upstream_bad_response", 502, "worker", True),
    ("upstream_closed", 502, "worker", True),
    ("upstream_timeout", 504, "worker", True),
    ("no_healthy_workers", 503, "router", True),
    ("shutting_down", 503, "router", True),
    ("control_unavailable", 503, "router", True),
    ("internal_error", 500, "router", False),
    ("expectation_failed", 417, "client", False),
    ("uri_too_long", 414, "client", False),
    ("upstream_body_incomplete", 502, "worker", True),
)


def test_positions_codes_and_statuses_are_frozen() -> None:
    rows = tuple((reason.code, reason.status, reason.side, reason.is_retryable) for reason in REASONS)
    assert rows[: len(FROZEN)] == FROZEN
    assert len(rows) <= 64, "shared memory has 64 words for them"


def test_every_reason_of_the_module_is_in_the_table_once() -> None:
    named = {name: value for name, value in vars(errors).items() if isinstance(value, Reason)}
    assert sorted(reason.code for reason in named.values()) == sorted(reason.code for reason in REASONS)
    assert all(name.lower() == reason.code for name, reason in named.items())
    assert len({reason.code for reason in REASONS}) == len(REASONS)
    assert {reason.code: position for position, reason in enumerate(REASONS)} == REASON_INDEX


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: reason.code)
def test_a_reason_is_consistent(reason: Reason) -> None:
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", reason.code)
    assert 400 <= reason.status <= 599
    assert (reason.status < 500) == (reason.side == "client"), "4xx is the client's fault, and nobody else's"
    of_side = {"client": "invalid_request_error"}.get(reason.side, "server_error")
    assert reason.error_type == ("rate_limit_error" if reason.status == 429 else of_side)
    assert reason.message
    assert reason.message.isprintable()
    assert not re.search(r"https?://|\d+\.\d+|[{%]", reason.message), "no URL, address or template in a client's text"


def test_reasons_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        REASONS[0].status = 500  # type: ignore[misc]


def test_all_exceptions_are_ours_and_documented() -> None:
    kinds = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]
    assert {kind.__name__ for kind in kinds} >= {
        "SglfastError", "ConfigError", "ShmLayoutError", "KvEventError", "WorkerInfoError", "PromptError",
    }  # fmt: skip
    for kind in kinds:
        assert issubclass(kind, SglfastError)
        assert kind.__doc__
        assert kind.__name__ in (errors.__doc__ or ""), "the tree at the top of the file shows it"
        assert not issubclass(kind, (OSError, ValueError)), "nobody catches it by accident"
