"""TLS for both sides: contexts made of the settings.

Runs in: control (checks them at start and at SIGHUP, asks workers), shards (serve clients, connect to workers). Contract: TLS 1.2 or
    newer; workers' certificates are checked against the CAs given, else the system's, host name included. Raises ConfigError
    that names the flag.
"""

import ssl

from sglfast.config import ServeConfig
from sglfast.errors import ConfigError


def server_context(config: ServeConfig) -> ssl.SSLContext | None:
    """For clients; None when they are served in plain text."""
    if config.tls_cert_path is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, config.tls_cert_path, config.tls_key_path, "--tls-cert-path", "--tls-key-path")
    return context


def worker_context(config: ServeConfig) -> ssl.SSLContext:
    """For workers whose URL is https."""
    try:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        for path in config.ca_cert_paths:
            context.load_verify_locations(cafile=path)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"--ca-cert-paths: holds no CA certificates in PEM form ({_why(error)})") from None
    if config.client_cert_path is not None:
        _load_pair(context, config.client_cert_path, config.client_key_path, "--client-cert-path", "--client-key-path")
    return context


def renew_server(context: ssl.SSLContext, config: ServeConfig) -> None:
    """Read the certificate files again into a context in use; connections that begin from now on get them. Raises ConfigError, and then
    nothing has changed."""
    server_context(config)  # tried apart: halves of two pairs in one context would serve nobody
    if config.tls_cert_path is not None:
        _load_pair(context, config.tls_cert_path, config.tls_key_path, "--tls-cert-path", "--tls-key-path")


def _load_pair(context: ssl.SSLContext, cert_path: str, key_path: str | None, cert_flag: str, key_flag: str) -> None:
    try:
        # Without the function OpenSSL would ask the terminal for a password.
        context.load_cert_chain(cert_path, key_path, password=lambda: "")
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"{cert_flag} {cert_path}: cannot be used with {key_flag} {key_path} ({_why(error)})") from None


def _why(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or error)
