"""Get one image over HTTP from an untrusted server, or the reason why not.

A catalogue's URLs are untrusted input. By default no redirect is followed and no connection is made to an address that
is not public; the type, size and first bytes of a response are checked while it arrives.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import ipaddress
import logging
import socket
import time
from collections.abc import Awaitable
from typing import Any

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult

from rating_train.prepare.images.fetch_options import FetchOptions
from rating_train.prepare.images.lookup import ImageProblem, is_url

logger = logging.getLogger(__name__)

_RETRIED = {408, 425, 429}  # and 5xx
_GONE = {404, 410}
_UNTYPED = {"", "application/octet-stream", "binary/octet-stream"}
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_CHUNK_BYTES = 1 << 16
_MAX_URL_CHARS = 4096
_DNS_SECONDS = 300.0  # how long a checked address is used
_DNS_FAILED_SECONDS = 3.0
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class Transient(Exception):
    """A request failed in a way that may be temporary; ``asked_s`` is the server's Retry-After in seconds."""

    def __init__(self, cause: str, asked_s: float = 0.0) -> None:
        super().__init__(cause)
        self.asked_s = asked_s


class ImageClient:
    """Gets images; its connections live as long as an ``async with`` block."""

    def __init__(self, options: FetchOptions) -> None:
        self._options = o = options
        self._addresses = _CheckedAddresses(o.allow_private, o.connect_timeout_s)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=o.concurrency,
                resolver=self._addresses,
                use_dns_cache=False,  # its cache would bypass the checked addresses
                socket_factory=self._addresses.socket,
            ),
            timeout=aiohttp.ClientTimeout(
                total=o.total_timeout_s, sock_connect=o.connect_timeout_s, sock_read=o.read_timeout_s
            ),
            headers={"User-Agent": o.user_agent, "Accept": "image/*", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a small response may inflate to a huge one; none was requested
            middlewares=(_no_second_request,),
            trust_env=False,  # a proxy would connect in our place, to unchecked addresses
        )

    async def __aenter__(self) -> ImageClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, url: str) -> bytes:
        """Return the bytes of an image.

        Raises:
            ImageProblem: it cannot be fetched, and a retry will not help.
            Transient: a retry may help.
        """
        target = _parse(url)
        for _ in range(self._options.max_redirects + 1):
            answer = await self._guarded(self._request(target))
            if isinstance(answer, bytes):
                return answer
            logger.debug("%s redirects to %s", target, answer)
            url, target = answer, _parse(answer)
        raise ImageProblem("fetch_redirect", f"to {url[:200]}")

    async def _guarded(self, request: Awaitable[bytes | str]) -> bytes | str:
        """Await a request; whatever an untrusted server causes becomes one of two exceptions."""
        try:
            return await request
        except (ImageProblem, Transient):
            raise
        except Exception as e:  # ClientError, TimeoutError, OSError, and what a malformed header may raise
            raise _outcome_of(e) from e

    async def _request(self, target: yarl.URL) -> bytes | str:
        """Return the body of one response, or the target of its redirect."""
        await self._addresses.check(target.raw_host or "")
        async with self._session.get(target, allow_redirects=False) as response:
            try:
                return await self._body(response)
            except BaseException:
                response.close()  # otherwise the rest of an unwanted body is still read
                raise

    def _redirect(self, source: yarl.URL, location: str) -> str:
        if self._options.max_redirects:
            with contextlib.suppress(ValueError):
                return str(source.join(yarl.URL(location)))
        raise ImageProblem("fetch_redirect", f"to {location[:200]}")

    async def _body(self, response: aiohttp.ClientResponse) -> bytes | str:
        status, headers = response.status, response.headers
        if 300 <= status < 400 and "Location" in headers:
            return self._redirect(response.url, headers["Location"])
        if status in _GONE:
            raise ImageProblem("fetch_gone", f"HTTP {status}")
        if status in _RETRIED or status >= 500:
            raise Transient(f"HTTP {status}", _retry_after_s(headers.get("Retry-After", "")))
        if status != 200:
            raise ImageProblem("fetch_refused", f"HTTP {status}")
        kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        packed = headers.get("Content-Encoding", "identity").strip().lower()
        if packed not in ("", "identity"):
            raise ImageProblem("fetch_not_an_image", f"content-encoding {packed[:80]}")
        if not kind.startswith("image/") and kind not in _UNTYPED:
            raise ImageProblem("fetch_not_an_image", f"content-type {kind[:80]}")
        most = self._options.max_bytes
        if (response.content_length or 0) > most:
            raise ImageProblem("image_too_large", f"{response.content_length} bytes, at most {most}")
        data = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):  # raises if the body is truncated
            data += chunk
            if len(data) > most:
                raise ImageProblem("image_too_large", f"more than {most} bytes")
        if not data:
            raise ImageProblem("image_empty", "the response has no bytes")
        if not (data.startswith(_MAGIC) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")):
            raise ImageProblem(
                "fetch_not_an_image", f"content-type {kind[:80]}, starts with {bytes(data[:8])!r}"
            )
        return bytes(data)


async def _no_second_request(
    request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Keep the client from repeating a request at once, uncounted, when a connection breaks: retries wait."""
    try:
        return await send(request)
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as e:
        raise _outcome_of(e) from e


def _outcome_of(error: Exception) -> ImageProblem | Transient:
    """Return what an exception of the HTTP client means for the image."""
    cause = error.__cause__
    while cause is not None:  # the client wraps what its resolver and socket factory raise
        if isinstance(cause, ImageProblem):
            return ImageProblem(cause.reason, cause.detail)
        cause = cause.__cause__
    what = f"{type(error).__name__}: {error}"[:200]
    return ImageProblem("fetch_bad_url", what) if isinstance(error, aiohttp.InvalidURL) else Transient(what)


class _CheckedAddresses(AbstractResolver):
    """Resolves host names to addresses that were all checked, and makes sockets for no other address.

    The HTTP client connects to what is returned here, never to the result of a second look-up: a name that resolves
    to a public address first and to a private one next gains nothing. Addresses written as numbers bypass the
    resolver; for them, and as a second check for all, the address is checked again at the socket.
    """

    def __init__(self, allow_private: bool, timeout_s: float) -> None:
        self._allow_private, self._timeout_s = allow_private, timeout_s
        self._known: dict[str, tuple[float, list[str]]] = {}  # host -> (until, addresses)
        self._locks: dict[str, asyncio.Lock] = {}

    async def check(self, host: str) -> list[str]:
        """Return the host's addresses.

        Raises:
            ImageProblem: ``fetch_address_refused``, if any of them is not public.
            OSError: the name cannot be resolved.
        """
        async with self._locks.setdefault(host, asyncio.Lock()):
            until, addresses = self._known.get(host, (0.0, []))
            if time.monotonic() >= until:
                try:
                    addresses = await asyncio.wait_for(_look_up(host), self._timeout_s)
                except Exception:  # otherwise each task waiting for the lock would try and time out in turn
                    self._known[host] = (time.monotonic() + _DNS_FAILED_SECONDS, [])
                    raise
                self._known[host] = (time.monotonic() + _DNS_SECONDS, addresses)
        if not addresses:
            raise OSError(f"the name {host[:200]} was not found a moment ago")
        for address in addresses:
            self._refuse(host, address)
        return addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the checked addresses to the HTTP client.

        Raises:
            OSError: as :meth:`check`, or wrapping its ``ImageProblem``.
        """
        try:
            addresses = await self.check(host)
        except ImageProblem as e:
            raise OSError(str(e)) from e
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
        ]

    def socket(self, info: Any) -> socket.socket:
        """Return a socket to the HTTP client, for (family, type, protocol, name, address), if that is allowed."""
        family, kind, protocol, _, address = info
        self._refuse(address[0], address[0])
        return socket.socket(family, kind, protocol)

    def _refuse(self, host: str, address: str) -> None:
        if not self._allow_private and not _is_public(address):
            raise ImageProblem("fetch_address_refused", f"{host[:200]} is {address}, not a public address")

    async def close(self) -> None:
        """Do nothing: no resource is held."""


async def _look_up(host: str) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _is_public(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):  # it may contain an IPv4 address
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _parse(url: str) -> yarl.URL:
    """Return the URL as the HTTP client sees it, so that what is checked is what is requested.

    Raises:
        ImageProblem: ``fetch_bad_url``.
    """
    if not is_url(url) or len(url) > _MAX_URL_CHARS:
        raise ImageProblem("fetch_bad_url", f"not an http(s) address: {url[:200]}")
    try:
        parsed = yarl.URL(url)
        if parsed.raw_host and parsed.user is None and parsed.password is None and parsed.port:
            return parsed
    except ValueError as e:
        raise ImageProblem("fetch_bad_url", f"{e}: {url}"[:200]) from e
    raise ImageProblem("fetch_bad_url", f"without a host, or with a user: {url[:200]}")


def _retry_after_s(value: str) -> float:
    """Return the seconds that a Retry-After header asks for (a number or a date); 0 if it is not usable."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0
