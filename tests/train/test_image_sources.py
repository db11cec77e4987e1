"""Images from addresses: of public machines only, whatever a name or a redirect leads to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from image_server import Server, jpeg

from shortzip.train.serving.refusal import Refused
from shortzip.train.serving.sources import ImageSources, is_public


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        running.files["/a.jpg"] = jpeg(1)
        yield running


async def names(host: str, port: int) -> list[str]:
    """What a name server says: rebinding.example answers first with an address that may be asked."""
    known = {
        "public.example": ["127.0.0.1"],
        "metadata.example": ["169.254.169.254"],
        "both.example": ["127.0.0.1", "10.0.0.1"],
        "127.0.0.1": ["127.0.0.1"],
        "localhost": ["127.0.0.2"],
    }
    if host not in known:
        raise OSError("no such name")
    return known[host]


def read(url: str, largest: int = 10_000, seconds: float = 5.0) -> bytes:
    """With this machine's 127.0.0.1 in the place of the public net."""

    async def once() -> bytes:
        sources = ImageSources(
            None,
            allow_http=True,
            largest=largest,
            seconds=seconds,
            resolver=names,
            may_connect=lambda address: address == "127.0.0.1",
        )
        try:
            return await sources.read(url)
        finally:
            await sources.close()

    return asyncio.run(once())


def refusal(url: str, **limits: float) -> tuple[int, str]:
    with pytest.raises(Refused) as told:
        read(url, **limits)  # type: ignore[arg-type]
    return told.value.status, told.value.code


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
        "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "ff02::1", "fd00:ec2::254",
    ],
)  # fmt: skip
def test_addresses_that_are_not_of_the_public_net(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_of_the_public_net(address: str) -> None:
    assert is_public(address)


def test_an_image_is_fetched(server: Server) -> None:
    assert read(f"http://public.example:{server.server_port}/a.jpg") == jpeg(1)


@pytest.mark.parametrize(
    "url",
    [
        "http://metadata.example/latest",
        "http://both.example/a.jpg",  # one address of several is enough
        "http://localhost/a.jpg",
        "http://user:password@public.example/a.jpg",
    ],
)
def test_names_that_lead_to_private_addresses(url: str) -> None:
    assert refusal(url) == (400, "address_refused")


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("http://metadata.example/latest", "address_refused"),
        ("file:///etc/passwd", "address_refused"),
        ("//both.example/a", "address_refused"),
        ("/turn", "image_not_fetched"),  # to itself, without an end
    ],
)
def test_redirects_are_looked_at_like_addresses(target: str, code: str) -> None:
    async def once() -> tuple[int, str]:
        async def turn(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(f"HTTP/1.1 302 Found\r\nlocation: {target}\r\nContent-Length: 0\r\n\r\n".encode())
            writer.close()

        running = await asyncio.start_server(turn, "127.0.0.1", 0)
        async with running:
            port = running.sockets[0].getsockname()[1]
            sources = ImageSources(
                None,
                allow_http=True,
                largest=1000,
                seconds=5,
                resolver=names,
                may_connect=lambda address: address == "127.0.0.1",
            )
            with pytest.raises(Refused) as told:
                await sources.read(f"http://public.example:{port}/turn")
            await sources.close()
            return told.value.status, told.value.code

    assert asyncio.run(once()) == (400, code)


def test_what_is_too_large_late_or_not_there(server: Server) -> None:
    server.files["/large.jpg"] = bytes(20_000)
    server.files["/late.jpg"] = jpeg(1)
    server.faults = {"/late.jpg": ["hangs"]}
    url = f"http://public.example:{server.server_port}"
    assert refusal(f"{url}/large.jpg") == (413, "image_too_large")
    assert refusal(f"{url}/none.jpg") == (400, "image_not_fetched")
    assert refusal(f"{url}/late.jpg", seconds=0.3) == (408, "image_timeout")
    assert refusal("http://unknown.example/a.jpg") == (400, "image_not_fetched")
    assert refusal("http://[::bad/a.jpg") == (400, "image_not_fetched")
