"""Images that requests name: data: URIs, files of one folder, and, if allowed, addresses of public machines."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpcore
import httpx

from shortzip.data.data_uris import inline_image, is_data_uri
from shortzip.data.errors import shown
from shortzip.data.images import BadImage, check_image_file
from shortzip.train.serving.refusal import Refused

REDIRECTS = 3
_MOVED = (301, 302, 303, 307, 308)
# Addresses that carry another one, to which a gateway may pass on what it is sent: NAT64, 6to4, Teredo.
_CARRIERS = [ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")]

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a name."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def is_public(address: str) -> bool:
    """Whether an IP address is of the public net: not this machine's, a private, link-local or reserved one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip
    carries = any(ip.version == net.version and ip in net for net in _CARRIERS)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not carries


class _Checked(httpcore.AnyIOBackend):
    """Connects to the address that was looked at, and not to what the name means a moment later."""

    def __init__(self, resolver: Resolve, may_connect: Callable[[str], bool]) -> None:
        super().__init__()
        self.resolver, self.may_connect = resolver, may_connect

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            addresses = await self.resolver(host, port)
        except OSError as error:
            raise httpcore.ConnectError(f"{host} is not known") from error
        if not addresses or not all(map(self.may_connect, addresses)):
            raise Refused(400, "address_refused", f"{host} is no public machine: images are not fetched from there")
        return await super().connect_tcp(addresses[0], port, timeout, local_address, socket_options)


class ImageSources:
    """Reads images.

    Args:
        folder: of files that may be asked for; None: none may.
        allow_http: whether images are fetched from http(s) addresses.
        largest: bytes of one image.
        seconds: in which an image from an address must have come.
        resolver, may_connect: how names are resolved, and which addresses are connected to.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        allow_http: bool,
        largest: int,
        seconds: float,
        resolver: Resolve = resolve,
        may_connect: Callable[[str], bool] = is_public,
    ) -> None:
        self.folder = None if folder is None else Path(os.path.realpath(folder))
        self.allow_http, self.largest, self.seconds = allow_http, largest, seconds
        self._pool = httpcore.AsyncConnectionPool(network_backend=_Checked(resolver, may_connect), max_connections=32)

    async def close(self) -> None:
        """Gives the connections back."""
        await self._pool.aclose()

    async def read(self, url: str) -> bytes:
        """The encoded image. Raises `Refused` with the reason."""
        if is_data_uri(url):
            return await asyncio.to_thread(self._inline, url)
        scheme = url.partition(":")[0].lower()
        if scheme == "file":
            return await asyncio.to_thread(self._file, url)
        if scheme not in ("http", "https"):
            raise Refused(
                400, "address_refused", f"{shown(url, 80)}: an image is a data: URI, a file:// or an http(s) one"
            )
        if not self.allow_http:
            raise Refused(
                400, "address_refused", f"{shown(url, 80)}: this server fetches no images: send it as a data: URI"
            )
        try:
            async with asyncio.timeout(self.seconds):
                return await self._fetched(url)
        except TimeoutError as error:
            raise Refused(408, "image_timeout", f"{shown(url, 80)} did not come in {self.seconds:g} s") from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, httpx.InvalidURL) as error:
            raise Refused(400, "image_not_fetched", f"{shown(url, 80)} cannot be fetched: {error}") from error

    def _inline(self, url: str) -> bytes:
        if len(url) > self.largest * 3:  # percent signs: three characters a byte
            raise self._too_large(f"a data: URI of {len(url)} characters")
        try:
            content = inline_image(url).read()
        except ValueError as error:
            raise Refused(400, "invalid_image", f"an image_url cannot be read: {error}") from error
        return self._checked(content, "a data: URI")

    def _file(self, url: str) -> bytes:
        if self.folder is None:
            raise Refused(400, "address_refused", "this server reads no files: send the image as a data: URI")
        host, slash, path = url[5:].removeprefix("//").partition("/")
        outside = Refused(400, "address_refused", f"{shown(url, 80)} is no file of the folder that may be read")
        if not url[5:].startswith("//") or host not in ("", "localhost") or not slash:
            raise outside
        try:
            file = Path(os.path.realpath("/" + unquote(path)))
        except (OSError, ValueError) as error:
            raise outside from error
        if not file.is_relative_to(self.folder):  # links are followed first: none leads out
            raise outside
        try:
            check_image_file(file, hint=False)
            if file.stat().st_size > self.largest:
                raise self._too_large(shown(url, 80))
            return file.read_bytes()
        except (BadImage, OSError) as error:
            raise Refused(400, "invalid_image", f"{shown(url, 80)} cannot be read") from error

    async def _fetched(self, url: str) -> bytes:
        address = httpx.URL(url)
        for _ in range(REDIRECTS + 1):
            if address.scheme not in ("http", "https") or address.userinfo:
                raise Refused(400, "address_refused", f"{shown(str(address), 80)}: images are fetched by http(s) only")
            timeout = dict.fromkeys(("connect", "read", "write", "pool"), self.seconds)
            headers = [("Host", address.netloc.decode()), ("Accept", "image/*"), ("Accept-Encoding", "identity")]
            async with self._pool.stream(
                "GET", _httpcore_url(address), headers=headers, extensions={"timeout": timeout}
            ) as response:
                if response.status in _MOVED:
                    target = dict(response.headers).get(b"Location") or dict(response.headers).get(b"location", b"")
                    address = address.join(target.decode("ascii", "replace"))
                    continue
                if response.status != 200:
                    raise Refused(400, "image_not_fetched", f"{shown(url, 80)} answered {response.status}")
                content = bytearray()
                async for piece in response.aiter_stream():
                    content += piece
                    self._checked(content, shown(url, 80))
                return bytes(content)
        raise Refused(400, "image_not_fetched", f"{shown(url, 80)} leads from one address to another without an end")

    def _checked(self, content: Any, name: str) -> Any:
        if len(content) > self.largest:
            raise self._too_large(name)
        return content

    def _too_large(self, name: str) -> Refused:
        return Refused(413, "image_too_large", f"{name}: an image has at most {self.largest / 1e6:g} MB here")


def _httpcore_url(address: httpx.URL) -> httpcore.URL:
    return httpcore.URL(scheme=address.raw_scheme, host=address.raw_host, port=address.port, target=address.raw_path)
