"""The endpoint before an engine: the tokens of `generate`, and what becomes of requests that are none of the usual."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import io
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration
from vllm_engine import NAME, Running, VllmEngine

from shortzip.data.errors import MissingExtra, UserError
from shortzip.data.pixels import pixel_values
from shortzip.data.supervision import Supervision
from shortzip.reduction.reductions import Reductions
from shortzip.scripts.serve import build, listen
from shortzip.train.inputs.prompts import batch_prompts, encode_prompt
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release
from shortzip.train.release.writing import write_reduced_checkpoint
from shortzip.train.serving.encoder import load_encoders
from shortzip.train.serving.engine import Engine
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.serving import Listed, ServeConfig

HTTP = httpx.Client(verify=False, trust_env=False, timeout=60)  # one: each takes a while to be made
BUDGET = {"dominant": 4, "contextual": 2}
TOKENS = 8
TWICE = [{"role": "system", "content": "be brief"}] * 2
BUDGETS = {"tuned": 6, "untuned": 4, "plain": 36}


def png(seed: int, size: tuple[int, int] = (28, 20)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def shows(*contents: bytes | str, text: str = "what colour is the picture?") -> dict[str, Any]:
    urls = [content if isinstance(content, str) else uri(content) for content in contents]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def asks(*messages: dict[str, Any], model: str = "tuned", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": list(messages), "max_tokens": TOKENS, **more}


class House:
    """A release, a projector-only checkpoint tuned from it, and what each model's own `generate` says."""

    def __init__(self, release: Path, folder: Path) -> None:
        self.folder = folder
        opened, reductions = open_release(str(release)), Reductions(BUDGET, {"layers": [1, 3]})
        model, processor = load_release(opened, reductions)
        projector = {name: p.detach() for name, p in model.model.multi_modal_projector.named_parameters()}
        moved = {name: tensor + 0.2 * torch.randn_like(tensor) for name, tensor in projector.items()}
        write_reduced_checkpoint(folder / "tuned", opened, moved, processor, reductions, shape="projector")
        self.models = [f"{folder / 'tuned'}", f"untuned={release}@3+1", f"plain={release}"]
        self.loaded = {
            "tuned": load_release(str(folder / "tuned"), Reductions(BUDGET)),
            "untuned": load_release(opened, Reductions({"dominant": 3, "contextual": 1})),
            "plain": load_release(opened, Reductions()),
        }
        engine = LlavaForConditionalGeneration.from_pretrained(release).eval()
        self.engine = VllmEngine(engine, processor, 32)

    def generate(self, name: str, turns: list[tuple[str, str]], contents: list[bytes]) -> list[int]:
        model, processor = self.loaded[name]
        supervision = Supervision(processor, max_length=None)
        images = [Image.open(io.BytesIO(content)) for content in contents]
        inputs = batch_prompts(supervision, [encode_prompt(supervision, turns, images)], model.device)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.fixture(scope="module")
def house(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> House:
    torch.manual_seed(0)
    return House(tiny_release, tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def served(house: House) -> Iterator[str]:
    """The address of a server whose engine runs the plain release."""
    (house.folder / "images").mkdir()
    with (
        Running.of(house.engine.app) as engine,
        Running(build(ServeConfig(house.models, engine.url, images=str(house.folder / "images")))) as server,
    ):
        yield server.url


class Fast:
    """A server before an engine that only looks, with small limits."""

    def __init__(self, house: House, **limits: Any) -> None:
        self.engine = VllmEngine(None, None, 32)
        self.house, self.limits = house, limits

    def __enter__(self) -> Fast:
        self._engine = Running.of(self.engine.app).__enter__()
        config = ServeConfig(self.house.models[:2], self._engine.url, **self.limits)
        self._server = Running(build(config)).__enter__()
        self.url = self._server.url
        return self

    def __exit__(self, *_: object) -> None:
        self._server.__exit__()
        self._engine.__exit__()

    def post(self, request: dict[str, Any]) -> httpx.Response:
        return HTTP.post(f"{self.url}/chat/completions", json=request)


def refused(response: httpx.Response) -> tuple[int, str, str]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["message"]


def metrics(url: str) -> str:
    return HTTP.get(url.replace("/v1", "/metrics")).text


# What is answered


@pytest.mark.parametrize("name", BUDGETS)
def test_openais_client_gets_the_tokens_of_generate(house: House, served: str, name: str) -> None:
    client = openai.OpenAI(base_url=served, api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == list(BUDGETS)
    question, one, two = "what colour is the picture?", png(1), png(2, (20, 40))
    talks = [
        ([shows(one)], [("user", f"<image>\n{question}")], [one]),
        ([shows(one, two)], [("user", f"<image><image>\n{question}")], [one, two]),
        ([{"role": "user", "content": "hello"}], [("user", "hello")], []),
        (
            [shows(one), {"role": "assistant", "content": "it is red"}, shows(two, text="is it bright?")],
            [("user", f"<image>\n{question}"), ("assistant", "it is red"), ("user", "<image>\nis it bright?")],
            [one, two],
        ),
    ]
    for messages, turns, contents in talks:
        expected = house.generate(name, turns, contents)
        house.engine.shapes.clear()
        said = client.chat.completions.create(**asks(*messages, model=name), extra_body={"return_token_ids": True})
        assert said.choices[0].model_dump()["token_ids"] == expected
        assert said.model == name
        assert house.engine.shapes == [(BUDGETS[name], 32)] * len(contents)
        events = list(
            client.chat.completions.create(
                **asks(*messages, model=name), stream=True, extra_body={"return_token_ids": True}
            )
        )
        assert [token for event in events for token in event.choices[0].model_dump()["token_ids"]] == expected
        assert {event.model for event in events} == {name}


def test_requests_at_once_get_the_tokens_that_each_gets_alone(house: House, served: str) -> None:
    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(verify=False, timeout=60) as client:
            return await asyncio.gather(
                *(client.post(f"{served}/chat/completions", json=asks(*messages, model=name, return_token_ids=True))
                  for name, messages, _, _ in talks)
            )  # fmt: skip

    question = "what colour is the picture?"
    talks = [
        (list(BUDGETS)[seed % 3], [shows(*shown)], [("user", "<image>" * len(shown) + f"\n{question}")], shown)
        for seed in range(9)
        for shown in [[png(seed)] * (1 + seed % 2)]
    ]
    for response, (name, _, turns, shown) in zip(asyncio.run(ask_all()), talks, strict=True):
        assert response.json()["choices"][0]["token_ids"] == house.generate(name, turns, shown)


def test_the_clients_key_reaches_the_engine(house: House, served: str) -> None:
    openai.OpenAI(base_url=served, api_key="sesame").chat.completions.create(**asks(shows(png(3))))
    assert house.engine.headers[-1]["authorization"] == "Bearer sesame"


def test_health_and_metrics(house: House, served: str) -> None:
    before = metrics(served)
    HTTP.post(f"{served}/chat/completions", json=asks(shows(png(4), png(5))))
    HTTP.post(f"{served}/chat/completions", json=asks(shows(png(4)), model="other"))

    def grown(sample: str) -> float:
        samples = [
            [line for line in text.splitlines() if line.startswith(sample)] for text in (before, metrics(served))
        ]
        values = [float(lines[0].rsplit(" ")[-1]) if lines else 0.0 for lines in samples]
        return values[1] - values[0]

    assert grown('shortzip_visual_tokens_total{model="tuned"}') == 12
    assert grown('shortzip_saved_tokens_total{model="tuned"}') == 2 * (36 - 6)
    assert grown('shortzip_requests_total{model="tuned",status="200"}') == 1
    assert grown('shortzip_requests_total{model="unknown",status="404"}') == 1
    assert grown('shortzip_request_seconds_count{model="tuned"}') == 1
    assert HTTP.get(served.replace("/v1", "/health")).json() == {"engine": "up"}


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": 3}, "model is 3"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\[0\]: needed is an object with a role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the user's is answered"),
        ({"messages": [{"role": "user", "content": "a <image> b"}]}, "images are parts of their own"),
        ({"messages": [{"role": "user", "content": [{"type": "image_embeds", "image_embeds": "x"}]}]}, "a part is"),
        ({"messages": [*TWICE, shows(png(0))]}, "role"),
        ({"messages": [shows(*[png(0)] * 17)]}, "17 images: 16 are allowed"),
        ({"chat_template": "{{ x }}"}, "chat_template: not taken here"),
        ({"messages": [{"role": "user", "content": "is it bright? " * 300}]}, "and the model has 512 positions"),
        ({"messages": [shows("data:image/png;base64,!!!")]}, "does not hold base64"),
        ({"messages": [shows(uri(b"GIF89a no image"))]}, "an image cannot be used"),
        ({"messages": [shows(uri(png(0)[:200]))]}, "an image cannot be used"),
    ],
    ids=str,
)  # fmt: skip
def test_a_request_that_cannot_be_answered_is_told_why(served: str, change: dict[str, Any], words: str) -> None:
    response = HTTP.post(f"{served}/chat/completions", json={**asks(shows(png(0))), **change})
    status, _, message = refused(response)
    assert status == 400
    assert re.search(words, message), message


def test_other_bodies_and_paths(served: str) -> None:
    assert refused(HTTP.post(f"{served}/chat/completions", content=b"{"))[0] == 400
    assert refused(HTTP.post(f"{served}/chat/completions", content=b"[" * 100_000))[0] == 400
    assert refused(HTTP.get(f"{served}/completions"))[:2] == (404, "not_found")
    assert HTTP.get(f"{served}/chat/completions").status_code == 405
    status, code, message = refused(HTTP.post(f"{served}/chat/completions", json=asks(shows(png(0)), model="gpt")))
    assert (status, code) == (404, "model_not_found")
    assert "tuned, untuned, plain" in message


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it has width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * 100), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_bomb_of_100_megapixels_is_not_decoded(served: str) -> None:
    start = time.process_time()
    response = HTTP.post(f"{served}/chat/completions", json=asks(shows(bomb(10_000, 10_000))))
    assert refused(response)[:2] == (400, "invalid_image")
    assert "decompression bomb" in response.text
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://example.org/a.png",
        "file:///etc/passwd",
        "file:///{images}/../secret.png",
        "file:///{images}/link.png",
        "file:///{images}%2F..%2Fsecret.png",
        "file://elsewhere/{images}/a.png",
        "file:{images}/a.png",
        "file:///{images}/%00.png",
        "ftp://example.org/a.png",
        "/etc/passwd",
        "gopher://x",
        "",
    ],
)
def test_hostile_addresses(house: House, served: str, url: str) -> None:
    images = house.folder / "images"
    (house.folder / "secret.png").write_bytes(png(0))
    (images / "a.png").write_bytes(png(0))
    if not (images / "link.png").is_symlink():
        (images / "link.png").symlink_to(house.folder / "secret.png")
    response = HTTP.post(f"{served}/chat/completions", json=asks(shows(url.format(images=str(images)[1:]))))
    assert refused(response)[:2] == (400, "address_refused")


def test_files_of_the_named_folder_are_read(house: House, served: str) -> None:
    (house.folder / "images" / "a b.png").write_bytes(png(7))
    file = (house.folder / "images" / "a b.png").as_uri()
    request = asks(shows(file), return_token_ids=True)
    said = HTTP.post(f"{served}/chat/completions", json=request).json()
    expected = house.generate("tuned", [("user", "<image>\nwhat colour is the picture?")], [png(7)])
    assert said["choices"][0]["token_ids"] == expected
    missing = HTTP.post(f"{served}/chat/completions", json=asks(shows(file + "x")))
    assert refused(missing)[:2] == (400, "invalid_image")


def test_models_that_one_engine_cannot_serve(house: House, tiny_release: Path) -> None:
    tuned = house.models[0]
    with pytest.raises(ConfigError, match="'tuned' stands there twice"):
        ServeConfig([tuned, tuned], "http://x/v1")
    with pytest.raises(ConfigError, match=r"it was saved with 4\+2 visual tokens"):
        build(ServeConfig([f"{tuned}@4+1"], "http://x/v1"))
    for word, message in (("scopes", "scopes"), ("scope:beta=1", "has no parameter 'beta'")):
        with pytest.raises(ConfigError, match=rf"model '.*@5\+1:{word}': .*({message})"):
            ServeConfig([f"{tiny_release}@5+1:{word}"], "http://x/v1")
    with pytest.raises(ConfigError, match="engine is 'x'"):
        ServeConfig([tuned], "x")


# Load, and what breaks


def test_two_hundred_at_once_are_batched(house: House) -> None:
    async def ask_all(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(verify=False, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
            names = ("tuned", "untuned")
            requests = [asks(shows(png(number % 5)), model=names[number % 2]) for number in range(200)]
            return await asyncio.gather(*(client.post(f"{url}/chat/completions", json=body) for body in requests))

    with Fast(house) as fast:
        responses = asyncio.run(ask_all(fast.url))
        assert [response.status_code for response in responses] == [200] * 200
        contents = [response.json()["choices"][0]["message"]["content"] for response in responses]
        assert contents == ["6", "4"] * 100  # each got its own model's tokens
        batches = next(line for line in metrics(fast.url).splitlines() if "batch_images_count" in line)
        assert float(batches.split()[-1]) < 200
        assert "shortzip_requests_in_flight 0.0" in metrics(fast.url)


def test_more_than_are_allowed_are_told_to_come_again(house: House) -> None:
    async def ask_all(url: str) -> list[httpx.Response]:
        async with httpx.AsyncClient(verify=False, timeout=60) as client:
            return await asyncio.gather(
                *(client.post(f"{url}/chat/completions", json=asks(shows(png(0)))) for _ in range(12))
            )

    with Fast(house, max_requests=4) as fast:
        fast.engine.pause = 0.5
        responses = asyncio.run(ask_all(fast.url))
        assert {response.status_code for response in responses} == {200, 429}
        assert fast.engine.most_at_once <= 4
        assert all(r.headers["retry-after"] == "1" for r in responses if r.status_code == 429)
        assert fast.post(asks(shows(png(0)))).status_code == 200  # the places are given back


def test_an_engine_that_fails_breaks_off_hangs_and_dies(house: House) -> None:
    with Fast(house, engine_seconds=1.0) as fast:
        fates = {
            "500": (502, "engine_failed"),
            "400": (400, "engine_refused"),
            "429": (503, "engine_busy"),
            "hangs": (504, "engine_timeout"),
        }
        for fault, fate in fates.items():
            fast.engine.faults = [fault]
            assert refused(fast.post(asks(shows(png(0)))))[:2] == fate
        fast.engine.faults = ["drops"]
        client = openai.OpenAI(base_url=fast.url, api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="broke off"):
            list(client.chat.completions.create(**asks(shows(png(0), png(1))), stream=True))
        assert fast.post(asks(shows(png(0)))).status_code == 200
        fast._engine.__exit__()
        assert refused(fast.post(asks(shows(png(0)))))[:2] == (502, "engine_unavailable")
        assert HTTP.get(fast.url.replace("/v1", "/health")).status_code == 503
        assert "shortzip_requests_in_flight 0.0" in metrics(fast.url)


def test_a_stream_that_stalls_ends_with_the_reason(house: House) -> None:
    """After `engine_seconds` without a word, long before `seconds`: the wait for each event has its own end."""
    with Fast(house, engine_seconds=0.5, seconds=20) as fast:
        fast.engine.faults = ["stalls"]
        client = openai.OpenAI(base_url=fast.url, api_key="none", max_retries=0)
        events = client.chat.completions.create(**asks(shows(png(0), png(1))), stream=True)
        assert next(events).choices[0].delta.content
        with pytest.raises(openai.APIError, match="did not answer in time"):
            next(events)
        assert "shortzip_requests_in_flight 0.0" in metrics(fast.url)


def test_a_connection_that_the_engine_closed_meanwhile_is_made_anew() -> None:
    async def once() -> tuple[dict[str, Any], int]:
        asked = 0

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal asked
            asked += 1
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))
            if asked > 1:
                writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"a": 1}')
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as running:
            engine = Engine(f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}/v1", NAME, 10)
            whole = await engine.whole({"messages": []}, None)
            await engine.close()
        return whole, asked

    assert asyncio.run(once()) == ({"a": 1}, 2)


def test_slow_clients_lose_their_place_and_hold_up_nobody(house: House) -> None:
    with Fast(house, max_requests=2, upload_seconds=0.5) as fast:
        port = int(fast.url.rpartition(":")[2].removesuffix("/v1"))
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.sendall(head)
            assert fast.post(asks(shows(png(0)))).status_code == 200
            slow.settimeout(20)
            assert b"408" in slow.recv(1000)
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(head)
        deadline = time.monotonic() + 10
        while "shortzip_requests_in_flight 0.0" not in metrics(fast.url):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_what_is_too_large_or_takes_too_long(house: House) -> None:
    with Fast(house, max_image_mb=0.01, max_request_mb=0.1, seconds=0.5) as fast:
        assert refused(fast.post(asks(shows(png(0, (100, 100))))))[:2] == (413, "image_too_large")
        assert refused(fast.post(asks({"role": "user", "content": "x" * 200_000})))[:2] == (413, "request_too_large")
        long = asks({"role": "user", "content": "x" * 60_000})
        assert refused(fast.post(long))[:2] == (400, "context_length_exceeded")
        fast.engine.pause = 1.0
        assert refused(fast.post(asks(shows(png(0)))))[:2] == (504, "timeout")


def test_a_client_that_leaves_an_answer_gives_its_place_back(house: House) -> None:
    with Fast(house, max_requests=1) as fast:
        fast.engine.pause = 0.2
        with HTTP.stream("POST", f"{fast.url}/chat/completions", json=asks(shows(png(0)), stream=True)) as response:
            assert response.status_code == 200
        deadline = time.monotonic() + 10
        while fast.post(asks(shows(png(0)))).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_missing_package_names_the_extra(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else there(name))
    with pytest.raises(MissingExtra, match=r"needs uvicorn: pip install 'shortzip\[serve\]'"):
        build(ServeConfig(house.models, "http://127.0.0.1:1/v1"))


def test_a_port_that_is_taken(house: House) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: Address already in use"):
            listen(ServeConfig(house.models, "http://127.0.0.1:1/v1", port=port))


def test_what_an_engine_does_not_do_is_said(
    house: House, tiny_release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Original positions and pruning are left out; the tokens are those of the checkpoint all the same."""
    zipped = {"dominant": 6, "contextual": 0, "method": "scope", "alpha": 2.0}
    pruned = {"method": "pyramiddrop", "layers": [1], "keep": [0.5]}
    opened, reductions = open_release(str(tiny_release)), Reductions(zipped, None, pruned, "original")
    model, processor = load_release(opened, reductions)
    projector = {name: p.detach() for name, p in model.model.multi_modal_projector.named_parameters()}
    write_reduced_checkpoint(tmp_path / "kept", opened, projector, processor, reductions, shape="projector")
    build(ServeConfig([str(tmp_path / "kept")], "http://127.0.0.1:1/v1"))
    said = capsys.readouterr().out
    assert "kept: 6+0 visual tokens (scope:alpha=2.0) of " in said
    assert "kept: served without its PyramidDrop: 0.5 of them kept before layers 1 (an engine prunes nothing)" in said
    assert "kept: served without its original positions (an engine numbers tokens as they come)" in said
    encoder = load_encoders([Listed("kept", str(tmp_path / "kept"), None)], torch.device("cpu"), torch.float32)["kept"]
    read = encoder.read(png(1))
    pixels = pixel_values(Image.open(io.BytesIO(png(1))), processor.image_processor)
    with torch.no_grad():
        expected = model.model.get_image_features(pixels[None]).pooler_output[0]
    torch.testing.assert_close(encoder.encode([read])[0], expected)


@pytest.mark.slow
def test_the_command_serves_until_it_is_stopped(house: House) -> None:
    with Running.of(house.engine.app) as engine:
        command = [sys.executable, "-m", "shortzip.scripts", "serve", "--engine", engine.url, "--port", "0"]
        process = subprocess.Popen(
            [*command, "--model", house.models[0]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        said = [process.stdout.readline()]
        while "listening on" not in said[-1]:
            said.append(process.stdout.readline())
            assert said[-1], said
        assert any("served without its 2 frozen layers" in line for line in said)
        url = said[-1].split()[2].rstrip(",")
        client = openai.OpenAI(base_url=url, api_key="none")
        answer = client.chat.completions.create(**asks(shows(png(1))), extra_body={"return_token_ids": True})
        expected = house.generate("tuned", [("user", "<image>\nwhat colour is the picture?")], [png(1)])
        assert answer.choices[0].model_dump()["token_ids"] == expected
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)


def test_the_engines_model_is_asked_for_once(house: House) -> None:
    with Fast(house) as fast:
        fast.post(asks(shows(png(0))))
        assert fast.engine.seen[0]["model"] == NAME
