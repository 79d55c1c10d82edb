"""sglfast.tls: contexts, and what is said of files that cannot be used."""

import ssl
from pathlib import Path

import pytest
import trustme

from sglfast.config import ServeConfig
from sglfast.errors import ConfigError
from sglfast.tls import server_context, worker_context


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    ca, other = trustme.CA(), trustme.CA()
    issued = ca.issue_cert("localhost")
    issued.private_key_pem.write_to_path(tmp_path / "key")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert")
    other.issue_cert("localhost").private_key_pem.write_to_path(tmp_path / "other")
    ca.cert_pem.write_to_path(tmp_path / "ca")
    (tmp_path / "text").write_text("no certificate")
    return {name: str(tmp_path / name) for name in ("key", "cert", "other", "ca", "text")}


def test_without_settings_there_is_none_for_clients() -> None:
    assert server_context(ServeConfig()) is None
    assert worker_context(ServeConfig()).verify_mode == ssl.CERT_REQUIRED


def test_contexts(files: dict[str, str]) -> None:
    served = server_context(ServeConfig(tls_cert_path=files["cert"], tls_key_path=files["key"]))
    assert served is not None
    assert served.minimum_version == ssl.TLSVersion.TLSv1_2
    asking = worker_context(ServeConfig(ca_cert_paths=(files["ca"],), client_cert_path=files["cert"], client_key_path=files["key"]))
    assert asking.check_hostname
    assert len(asking.get_ca_certs()) >= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tls_cert_path": "text", "tls_key_path": "key"}, "--tls-cert-path .*text: cannot be used with --tls-key-path"),
        ({"tls_cert_path": "cert", "tls_key_path": "other"}, "--tls-cert-path .*cert: cannot be used"),
        ({"client_cert_path": "cert", "client_key_path": "text"}, "--client-cert-path .*cert: cannot be used"),
        ({"ca_cert_paths": "text"}, "--ca-cert-paths: holds no CA certificates"),
    ],
)
def test_what_cannot_be_used_is_named(settings: dict[str, str], message: str, files: dict[str, str]) -> None:
    paths = {name: (files[value],) if name == "ca_cert_paths" else files[value] for name, value in settings.items()}
    config = ServeConfig(**paths)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        (server_context if "tls_cert_path" in settings else worker_context)(config)
