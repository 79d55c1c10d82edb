"""Ask workers, with a bound on everything: time, size of the answer, and how many at once.

Runs in: control. Contract: an error's text never holds a byte that a worker sent, nor the key it was shown; answers carry secrets. Each
    request has a connection of its own: a health check is to meet what a new client would meet, and no idle connection can
    turn stale.
"""

import asyncio
import os
import ssl
from dataclasses import dataclass

import aiohttp

from sglfast import __version__

# Silent workers hold their place for a whole timeout: enough places that half of a thousand workers may be silent.
_AT_ONCE = 256


class FetchError(Exception):
    """No whole answer. The text says why; is_transient: another attempt may do better."""

    def __init__(self, text: str, *, is_transient: bool = True) -> None:
        super().__init__(text)
        self.is_transient = is_transient


@dataclass(frozen=True, slots=True)
class Answer:
    """status: of HTTP; body: empty unless it was asked for."""

    status: int
    body: bytes

    @property
    def is_good(self) -> bool:
        """2xx."""
        return 200 <= self.status < 300


class Fetcher:
    """The only HTTP client of control. Use it as an async context manager, inside the event loop. tls: for workers whose URL is https;
    may be replaced."""

    def __init__(self, tls: ssl.SSLContext | bool = True) -> None:
        self.tls = tls
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"user-agent": f"sglfast/{__version__}", "accept-encoding": "identity"},
            auto_decompress=False,
        )

    async def __aenter__(self) -> "Fetcher":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, url: str, timeout_s: float, limit_bytes: int = 0, api_key: str | None = None) -> Answer:
        """GET `url`, see `ask`."""
        return await self.ask("GET", url, timeout_s, limit_bytes, api_key)

    async def ask(self, method: str, url: str, timeout_s: float, limit_bytes: int = 0, api_key: str | None = None) -> Answer:
        """Send a request without a body; the answer's is read only when limit_bytes > 0. timeout_s counts from when it has its place.

        api_key: shown as a bearer token. Redirects are answers, not followed. Raises FetchError.
        """
        headers = None if api_key is None else {"authorization": f"Bearer {api_key}"}
        async with self._places:
            try:
                async with (
                    asyncio.timeout(timeout_s),
                    self._session.request(method, url, headers=headers, allow_redirects=False, ssl=self.tls) as response,
                ):
                    body = bytearray()
                    if limit_bytes:
                        async for piece in response.content.iter_any():
                            body += piece
                            if len(body) > limit_bytes:
                                raise FetchError(f"the answer is larger than {limit_bytes} bytes", is_transient=False)
                    return Answer(response.status, bytes(body))
            except TimeoutError:
                raise FetchError(f"no answer within {timeout_s:g} s") from None
            except aiohttp.ClientConnectorDNSError:
                raise FetchError("the host name cannot be resolved") from None
            except aiohttp.ClientConnectorCertificateError as error:
                why = getattr(error.certificate_error, "verify_message", "") or "it is not for this host name"
                raise FetchError(f"the certificate is not trusted ({why}); --ca-cert-paths says whose are") from None
            except aiohttp.ClientSSLError as error:
                raise FetchError(f"no TLS connection ({type(error.os_error).__name__})") from None
            except aiohttp.ClientConnectorError as error:
                raise FetchError(os.strerror(error.errno).lower() if error.errno else "no connection") from None
            except aiohttp.ClientPayloadError:
                raise FetchError("the answer was cut short") from None
            except aiohttp.ServerDisconnectedError:
                raise FetchError("the connection was closed before an answer") from None
            except (aiohttp.ClientError, OSError, ValueError) as error:
                # Only the kind: the text of an HTTP parser's error quotes what it could not parse.
                raise FetchError(f"no valid HTTP answer ({type(error).__name__})") from None
