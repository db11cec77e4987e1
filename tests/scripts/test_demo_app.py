"""The page: what it computes, and the page itself in headless Chromium (slow).

The slow test fails, and says what to install, where Chromium or Gradio is missing: a page that nobody opened is not
tested.
"""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import LLM_LAYERS, PATCHES

from scripts.demo_app import ALL, REDUCED, TUNED, AppConfig, Models, choices
from train.prompts import batch_prompts, encode_prompt
from train.reduced_checkpoint import write_reduced_checkpoint
from train.release import load_release, open_release, read_release_projector

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "apt-get install --no-install-recommends chromium chromium-driver"


@pytest.fixture(scope="module")
def tuned(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reduced checkpoint over the tiny release, its projector moved."""
    release = open_release(str(tiny_release))
    _, processor = load_release(release)
    projector = {name: tensor + 0.05 for name, tensor in read_release_projector(tiny_release).items()}
    folder = tmp_path_factory.mktemp("tuned") / "final"
    write_reduced_checkpoint(
        folder, release, projector, processor, visionzip={"dominant": 6, "contextual": 3}, shortv={"layers": [1, 2]}
    )
    return folder


@pytest.fixture(scope="module")
def models(tiny_release: Path, tuned: Path) -> Models:
    return Models(AppConfig(model=str(tiny_release), tuned=str(tuned), device="cpu", max_new_tokens=4))


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


def test_the_models_share_their_weights_and_are_what_loads(
    models: Models, tiny_release: Path, tuned: Path, photograph: Image.Image
) -> None:
    loaded = {
        ALL: load_release(str(tiny_release), visionzip=None, shortv=None)[0],
        REDUCED: load_release(
            str(tiny_release), visionzip={"dominant": 6, "contextual": 3}, shortv={"layers": [1, 2]}
        )[0],
        TUNED: load_release(str(tuned))[0],
    }
    assert models.kinds == [ALL, REDUCED, TUNED]
    assert models.defaults == (6, 3, 2)
    assert models.ranking[:2] == [1, 2]
    for kind in models.kinds:
        model, supervision = models.build(kind, 6, 3, 2)
        prompt = encode_prompt(supervision, [("user", "<image>\nname the colour")], [photograph])
        inputs = batch_prompts(supervision, [prompt], torch.device("cpu"))
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, loaded[kind](**inputs).logits), kind
        weights = model.model.language_model.layers[1].mlp.up_proj.weight
        assert weights.data_ptr() == models.base.model.language_model.layers[1].mlp.up_proj.weight.data_ptr()


def test_answers_go_on_over_turns(models: Models, photograph: Image.Image) -> None:
    turns = [("user", "<image>\nname the colour"), ("assistant", "red"), ("user", "is it bright?")]
    for kind in models.kinds:
        answer, took = models.answer(kind, turns, photograph, 6, 3, 1)
        assert isinstance(answer, str)
        assert took.startswith(f"{PATCHES if kind == ALL else 9} visual tokens, prefill ")


def test_the_picture_changes_with_the_budget(models: Models, photograph: Image.Image, tmp_path: Path) -> None:
    models.draw(photograph, 6, 3, tmp_path / "a.png")
    models.draw(photograph, 12, 3, tmp_path / "b.png")
    first, second = (np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    assert first.shape != second.shape or (first != second).any()
    with pytest.raises(ValueError, match="the sum must be 1 to 37"):
        models.draw(photograph, 30, 30, tmp_path / "c.png")


def test_bad_settings_are_refused(tiny_release: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"each of the layers 0 to {LLM_LAYERS - 1} once"):
        Models(AppConfig(model=str(tiny_release), ranking=[0, 1], device="cpu"))
    with pytest.raises(FileNotFoundError, match="is no folder"):
        choices(AppConfig(images=str(tmp_path / "nowhere")))


# ----------------------------------------------------------------------------------------------- the page in a browser


class Browser:
    """Headless Chromium through chromedriver's WebDriver protocol."""

    def __init__(self, port: int, profile: Path) -> None:
        self.base = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--window-size=1400,1600", f"--user-data-dir={profile}"]  # fmt: skip
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": {"args": arguments}}}}
        self.session = f"/session/{self.call('POST', '/session', wanted)['sessionId']}"

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if method in ("GET", "DELETE") else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["value"]

    def open(self, address: str) -> None:
        self.call("POST", f"{self.session}/url", {"url": address})

    def run(self, script: str) -> Any:
        return self.call("POST", f"{self.session}/execute/sync", {"script": script, "args": []})

    def find(self, selector: str) -> str:
        found = self.call("POST", f"{self.session}/element", {"using": "css selector", "value": selector})
        return str(next(iter(found.values())))

    def type(self, selector: str, text: str) -> None:
        self.call("POST", f"{self.session}/element/{self.find(selector)}/value", {"text": text})

    def click(self, selector: str) -> None:
        self.call("POST", f"{self.session}/element/{self.find(selector)}/click")

    def text(self, selector: str) -> str:
        return str(self.run(f"return document.querySelector({selector!r})?.innerText ?? ''"))

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("GET", f"{self.session}/screenshot")))

    def close(self) -> None:
        self.call("DELETE", self.session)


def wait_for(what: Callable[[], Any], seconds: float = 240) -> Any:
    """The first true value of `what`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            value = what()
        except (OSError, urllib.error.HTTPError):
            value = None
        if value:
            return value
        time.sleep(0.5)
    raise AssertionError(f"waited {seconds} s in vain")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def page(tiny_release: Path, tuned: Path, tmp_path: Path, photograph: Image.Image) -> Iterator[tuple[str, int]]:
    """The running script: its address, and the process id."""
    port, images = free_port(), tmp_path / "images"
    images.mkdir()
    photograph.save(images / "noise.png")
    Image.new("RGB", (50, 40), (220, 30, 30)).save(images / "red.png")
    command = [
        sys.executable, "scripts/demo_app.py", "--model", str(tiny_release), "--tuned", str(tuned), "--device", "cpu",
        "--images", str(images), "--port", str(port), "--max_new_tokens", "6",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    with (tmp_path / "page.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"

            def is_up() -> bool:
                assert process.poll() is None, (tmp_path / "page.log").read_text()
                return urllib.request.urlopen(address, timeout=20).status == 200

            wait_for(is_up)
            yield address, process.pid
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.fail(f"the page is tested in headless Chromium: {INSTALL}")
    port = free_port()
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        opened = wait_for(lambda: Browser(port, tmp_path / "profile"), 120)
        yield opened
        opened.close()
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_visit(page: tuple[str, int], browser: Browser, tmp_path: Path) -> None:
    address, _ = page
    browser.open(address)

    def picture() -> str:
        return str(browser.run("return document.querySelector('#picture img')?.src ?? ''"))

    def said(name: str) -> str:
        return browser.text(f"#{name}")

    # It loads with an image, and shows what is kept of it.
    first = wait_for(picture)
    assert "9 of 36 visual tokens" in wait_for(lambda: said("status"))

    # A photograph is uploaded; the picture follows.
    photograph = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(1).integers(0, 255, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(photograph)
    browser.type("#upload input[type=file]", str(photograph))
    second = wait_for(lambda: picture() if picture() != first else "")

    # A slider is moved; the picture and the count follow.
    browser.run(
        "const s = document.querySelector('#dominant input[type=range]'); s.value = 12;"
        "for (const e of ['input', 'change', 'pointerup']) s.dispatchEvent(new Event(e, {bubbles: true}));"
    )
    wait_for(lambda: "15 of 36" in said("status"))
    assert picture() != second

    # A question is asked, and another; all three answer with their times.
    browser.click("#ask button, button#ask")
    wait_for(lambda: all("prefill" in said(name) for name in ("all-tokens", "reduced", "tuned")))
    assert "36 visual tokens" in said("all-tokens")
    assert "15 visual tokens" in said("reduced")
    before = said("tuned")
    browser.type("#question textarea", "is it bright?")
    browser.click("#ask button, button#ask")
    wait_for(lambda: said("tuned").count("prefill") == 2)
    assert said("tuned") != before
    browser.screenshot(tmp_path / "page.png")

    # A file that is no image meets a message; a budget over the grid does too.
    wrong = tmp_path / "notes.txt"
    wrong.write_text("not an image")
    browser.run("document.querySelector('#upload button[aria-label=Clear], #upload [aria-label=\"Remove this file\"]')?.click()")  # fmt: skip  # noqa: E501
    wait_for(lambda: browser.run("return !!document.querySelector('#upload input[type=file]')"))
    browser.type("#upload input[type=file]", str(wrong))
    message = wait_for(lambda: said("status") if "notes.txt" in said("status") else "")
    assert "Traceback" not in browser.text("body")
    assert "not an image" in message or "image" in message
    assert "Traceback" not in (tmp_path / "page.log").read_text()
