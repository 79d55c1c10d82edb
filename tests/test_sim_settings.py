"""sim/settings.py: what cannot work is refused with the flag's name."""

from typing import Any

import pytest

from sglfast.errors import ConfigError
from sglfast.sim.settings import SimSettings, check


def test_defaults_work_and_count_in_blocks() -> None:
    settings = check(SimSettings(page_size=64, cache_tokens=1000))
    assert settings.cache_blocks == 15
    assert settings.context_tokens == 960


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        ({"workers": 0}, "--workers 0"),
        ({"page_size": 0}, "--page-size 0"),
        ({"dp_size": -1}, "--dp-size -1"),
        ({"prefill_tokens_per_s": 0.0}, "--prefill-tokens-per-s 0.0"),
        ({"decode_tokens_per_s_per_request": float("nan")}, "--decode-tokens-per-s-per-request nan"),
        ({"chunked_prefill_tokens": 63}, "--chunked-prefill-tokens 63"),
        ({"cache_tokens": 63}, "--cache-tokens 63"),
        ({"base_port": 65_535, "workers": 2}, "--base-port 65535"),
        ({"kv_base_port": 65_530, "workers": 4}, "--kv-base-port 65530"),
        ({"base_port": 30_000, "kv_base_port": 30_003, "workers": 4}, "--kv-base-port 30003"),
        ({"base_port": 30_010, "kv_base_port": 30_003, "workers": 4}, "--kv-base-port 30003"),
        ({"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 30_004}, "--disaggregation-bootstrap-port 30004: its ports"),
        ({"disaggregation_mode": "prefill", "disaggregation_bootstrap_port": 65_535}, "--disaggregation-bootstrap-port 65535"),
        ({"disaggregation_mode": "decode", "disaggregation_bootstrap_port": 65_536}, "--disaggregation-bootstrap-port 65536"),
        ({"disaggregation_bootstrap_timeout": 0.0}, "--disaggregation-bootstrap-timeout 0.0"),
        ({"disaggregation_bootstrap_timeout": 1e6}, "--disaggregation-bootstrap-timeout 1000000.0"),
    ],
)
def test_a_setting_that_cannot_work_is_named(wrong: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        check(SimSettings(**wrong))


def test_port_ranges_may_touch() -> None:
    check(SimSettings(base_port=30_000, kv_base_port=30_004, workers=4))
    check(SimSettings(base_port=30_008, kv_base_port=30_000, workers=4))
    check(SimSettings(disaggregation_mode="prefill", disaggregation_bootstrap_port=30_005))
    # Only a prefill worker listens there.
    check(SimSettings(disaggregation_mode="decode", disaggregation_bootstrap_port=30_004))
