"""What one client may have in flight."""

import pytest

from sglfast.modelexpress.limits import ClientLimits, TooMuchError, client_of


def test_calls_and_bytes_are_counted_per_client() -> None:
    limits = ClientLimits(2, 100)
    limits.enter("a", 60)
    with pytest.raises(TooMuchError, match=r"a has 60 bytes in flight and sends 41 more, the limit is 100 .*bytes-per-client"):
        limits.enter("a", 41)
    limits.enter("a", 40)
    with pytest.raises(TooMuchError, match=r"a has 2 calls in flight, the limit is 2 \(--max-calls-per-client\)"):
        limits.enter("a", 0)
    limits.enter("b", 100)
    limits.leave("a", 60)
    limits.enter("a", 60)
    for client, size in (("a", 40), ("a", 60), ("b", 100)):
        limits.leave(client, size)
    assert len(limits) == 0


@pytest.mark.parametrize(
    ("peer", "client"),
    [("ipv4:10.0.0.5:40112", "10.0.0.5"), ("ipv6:%5B::1%5D:40112", "::1"), ("ipv6:[fd00::2]:1", "fd00::2"), ("unix:/run/x", "unix:/run/x")],
)
def test_a_client_is_an_address_without_its_port(peer: str, client: str) -> None:
    assert client_of(peer) == client
