"""The page: what it computes, and the page itself in headless Chromium (slow).

The slow test fails, and says what to install, where Chromium or Gradio is missing: a page that nobody opened is not
tested.
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import LLM_LAYERS, PATCHES, write_release

from shortzip.data.errors import UserError
from shortzip.data.generated.scenes import render_scene, sample_scene
from shortzip.reduction.reductions import Reductions
from shortzip.scripts import demo_models
from shortzip.scripts.demo_app import choices, converse, main
from shortzip.scripts.demo_models import ALL, REDUCED, TUNED, AppConfig, Models
from shortzip.train.inputs.prompts import batch_prompts, encode_prompt
from shortzip.train.release.loading import load_release
from shortzip.train.release.opening import open_release, read_release_projector
from shortzip.train.release.writing import Shape, write_reduced_checkpoint
from shortzip.train.settings.checks import ConfigError

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "apt-get install --no-install-recommends chromium chromium-driver"


BUDGET = {"dominant": 6, "contextual": 3}


def write_tuned(folder: Path, base: Path, shape: Shape = "full", **keys: Any) -> Path:
    """A checkpoint over the release `base`, its projector moved."""
    release = open_release(str(base))
    _, processor = load_release(release)
    projector = {name: tensor + 0.05 for name, tensor in read_release_projector(base).items()}
    reductions = Reductions(**{"visionzip": BUDGET, "shortv": {"layers": [1, 2]}, **keys})
    write_reduced_checkpoint(folder, release, projector, processor, reductions, shape=shape)
    return folder


@pytest.fixture(scope="module")
def tuned(tiny_release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tuned(tmp_path_factory.mktemp("tuned") / "final", tiny_release)


@pytest.fixture(scope="module")
def models(tiny_release: Path, tuned: Path) -> Models:
    return Models(AppConfig(model=str(tiny_release), tuned=str(tuned), device="cpu", max_new_tokens=4))


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


@pytest.fixture
def photo(photograph: Image.Image, tmp_path: Path) -> Path:
    photograph.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_models_share_their_weights_and_are_what_loads(
    models: Models, tiny_release: Path, tuned: Path, photograph: Image.Image
) -> None:
    loaded = {
        ALL: load_release(str(tiny_release), Reductions())[0],
        REDUCED: load_release(str(tiny_release), Reductions({"dominant": 6, "contextual": 3}, {"layers": [1, 2]}))[0],
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
        answer, took = models.answer(models.chat(kind, 6, 3, 1), turns, photograph)
        assert isinstance(answer, str)
        assert took.startswith(f"{PATCHES if kind == ALL else 9} visual tokens, prefill ")


def test_a_second_question_costs_no_tower(models: Models, photograph: Image.Image) -> None:
    chat, turns, towers = models.chat(REDUCED, 6, 3, 1), [("user", "<image>\nname the colour")], []
    hook = chat.model.model.vision_tower.embeddings.register_forward_hook(lambda *_: towers.append(1))
    answer, _ = models.answer(chat, turns, photograph)
    assert towers
    towers.clear()
    turns += [("assistant", answer), ("user", "is it bright?")]
    models.answer(models.chat(REDUCED, 6, 3, 1), turns, photograph)
    hook.remove()
    assert not towers
    assert models.chat(REDUCED, 7, 3, 1) is not chat


def test_an_answers_time_holds_its_prefill_and_no_hiccup(models: Models, photograph: Image.Image) -> None:
    chat = models.chat(REDUCED, 6, 3, 0)
    prefills = []

    def hiccup(projector: Any, given: Any) -> None:
        prefills.append(1)
        time.sleep(0.8 if len(prefills) == 2 else 0)

    chat.model.model.multi_modal_projector.register_forward_pre_hook(hiccup)
    _, took = models.answer(chat, [("user", "<image>\nname the colour")], photograph)
    prefill, answer = (float(part.split()[-2]) for part in took.split(", ")[1:])
    assert len(prefills) > 3
    assert 0 < prefill <= answer < 800


@pytest.mark.parametrize(
    ("visionzip", "title"),
    [({"dominant": 9, "contextual": 0, "method": "divprune"}, "DivPrune"),
     ({"dominant": 6, "contextual": 3, "method": "duet", "window": 2}, "DUET-VLM"),
     ({"dominant": 9, "contextual": 0, "method": "pool"}, "baseline pool")],
    ids=str,
)  # fmt: skip
def test_a_tuned_run_of_another_method_is_shown_by_it(
    visionzip: dict[str, Any], title: str, tiny_release: Path, tmp_path: Path, photograph: Image.Image
) -> None:
    folder = write_tuned(tmp_path / "final", tiny_release, visionzip=visionzip)
    models = Models(AppConfig(model=str(tiny_release), tuned=str(folder), device="cpu"))
    assert (models.title, models.merges, models.defaults[1]) == (title, title == "DUET-VLM", visionzip["contextual"])
    model, _ = models.build(TUNED, *models.defaults)
    assert model.config.visionzip == Reductions(visionzip).visionzip
    models.draw(photograph, *models.defaults[:2], tmp_path / "picture.png")
    with pytest.raises(ConfigError, match=f"method is 'scope', and the tuned run has {visionzip['method']}"):
        Models(AppConfig(model=str(tiny_release), tuned=str(folder), device="cpu", method="scope"))


def test_a_release_is_shown_by_the_method_that_is_asked_for(tiny_release: Path) -> None:
    models = Models(AppConfig(model=str(tiny_release), device="cpu", method="scope:alpha=0.5"))
    assert (models.title, models.merges, models.cls) == ("SCOPE", False, 0)
    assert models.build(REDUCED, 4, 0, 0)[0].config.visionzip["alpha"] == 0.5


def test_the_picture_changes_with_the_budget(
    models: Models, photograph: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(demo_models, "draw_images", lambda maps, path: drawn.extend(maps))
    models.draw(photograph, 6, 3, tmp_path / "a.png")
    models.draw(photograph, 12, 4, tmp_path / "b.png")
    assert [int(item.kept.sum()) for item in drawn] == [5, 11]  # and CLS
    assert [len(item.targets) for item in drawn] == [3, 4]
    with pytest.raises(ValueError, match="the sum must be 1 to 37"):
        models.draw(photograph, 30, 30, tmp_path / "c.png")


def talk_of(*answers: str) -> list[dict[str, Any]]:
    """A conversation as the page keeps it."""
    return [
        turn
        for answer in answers
        for turn in (
            {"role": "user", "content": "what is there?"},
            {"role": "assistant", "content": [{"text": answer, "type": "text"}]},
            {"role": "assistant", "content": "", "metadata": {"title": "9 visual tokens"}},
        )
    ]


def test_conversations_stay_in_step_when_a_budget_is_refused(models: Models, photo: Path) -> None:
    image = str(photo)
    talks = [talk_of("red"), talk_of("a star"), talk_of("")]
    for budget in ((30, 30, 1), (0, 0, 0)):
        seen = list(converse(models, image, "is it bright?", budget, talks))
        assert [(after, left) for after, left, _ in seen] == [(talks, "is it bright?")], budget
        assert seen[0][2].startswith("⚠️ visionzip")
    *_, (after, left, _) = converse(models, image, "is it bright?", (6, 3, 1), talks)
    assert left == ""
    assert [[turn["role"] for turn in talk].count("user") for talk in after] == [2, 2, 2]


def test_conversations_stay_in_step_when_a_model_fails(photo: Path) -> None:
    def answer(kind: str, turns: Sequence[tuple[str, str]], image: Image.Image) -> tuple[str, str]:
        if kind == TUNED:
            raise RuntimeError("out of memory")
        return "red", "9 visual tokens"

    failing: Any = SimpleNamespace(kinds=[ALL, REDUCED, TUNED], chat=lambda kind, *budget: kind, answer=answer)
    talks = [talk_of("red"), talk_of("a star"), talk_of("")]
    *_, last = converse(failing, str(photo), "is it bright?", (6, 3, 1), talks)
    assert last == (talks, "is it bright?", "⚠️ out of memory")


def test_an_answer_without_words_is_shown_and_not_fed_back(photo: Path) -> None:
    heard: list[list[tuple[str, str]]] = []

    def answer(kind: str, turns: Sequence[tuple[str, str]], image: Image.Image) -> tuple[str, str]:
        heard.append(list(turns))
        return "", "9 visual tokens"

    silent: Any = SimpleNamespace(kinds=[ALL], chat=lambda kind, *budget: kind, answer=answer)
    talks: Sequence[Any] = [[]]
    for question in ("what is there?", "and?"):
        *_, (talks, _, _) = converse(silent, str(photo), question, (6, 3, 1), talks)
    assert heard[1] == [("user", "<image>\nwhat is there?"), ("assistant", ""), ("user", "and?")]
    assert talks[0][2]["metadata"]["title"] == "(nothing) 9 visual tokens"


def test_bad_settings_are_refused(tiny_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=f"each of the layers 0 to {LLM_LAYERS - 1} once"):
        Models(AppConfig(model=str(tiny_release), ranking=[0, 1], device="cpu"))
    with pytest.raises(FileNotFoundError, match="is no folder"):
        choices(AppConfig(images=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="device: 'bogus' is not of type"):
        main(["--device", "bogus"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device is 'cuda', and there is no GPU here: give --device cpu"):
        Models(AppConfig(model=str(tiny_release), device="cuda"))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"the page needs Gradio: pip install 'shortzip\[app\]'"):
        main(["--model", str(tiny_release), "--device", "cpu"])


def test_a_tuned_checkpoint_of_another_release_is_refused(tiny_release: Path, tuned: Path, tmp_path: Path) -> None:
    other = write_release(tmp_path / "other", seed=1)
    cure = f"give the release it was tuned from as --model \\({tiny_release.name}\\)"
    with pytest.raises(ConfigError, match=f"was tuned from other weights than model {other}: {cure}"):
        Models(AppConfig(model=str(other), tuned=str(tuned), device="cpu"))
    light = write_tuned(tmp_path / "projector", tiny_release, shape="projector")
    with pytest.raises(ConfigError, match=f"was tuned from other weights than model {other}: {cure}"):
        Models(AppConfig(model=str(other), tuned=str(light), device="cpu"))
    assert Models(AppConfig(model=str(tiny_release), tuned=str(light), device="cpu")).defaults == (6, 3, 2)
    shape = r"its projector's linear_1.bias is \(32,\), needed by model checkpoints/demo-llava is \(\d+,\)"
    with pytest.raises(ConfigError, match=f"{shape}: {cure}"):
        Models(AppConfig(tuned=str(tuned), device="cpu"))


@pytest.mark.parametrize(
    ("keys", "method"),
    [
        ({"shortv": None, "fastv": {"layer": 2, "keep": 0.5}}, "FastV"),
        ({"visionzip": None}, "all visual tokens"),
    ],
)
def test_what_has_no_budget_is_refused(tiny_release: Path, tmp_path: Path, keys: dict[str, Any], method: str) -> None:
    folder = write_tuned(tmp_path / "final", tiny_release, **keys)
    with pytest.raises(ConfigError, match=f"was tuned with {method}.*shortzip evaluate --model {folder}"):
        Models(AppConfig(model=str(tiny_release), tuned=str(folder), device="cpu"))


def test_a_tuned_checkpoint_is_no_model(tiny_release: Path, tuned: Path, tmp_path: Path) -> None:
    control = write_tuned(tmp_path / "control", tiny_release, visionzip=None, shortv=None)
    for folder in (tuned, control):
        with pytest.raises(ConfigError, match=rf"tuned from \({tiny_release.name}\); .* --tuned {folder}"):
            Models(AppConfig(model=str(folder), device="cpu"))


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


# The script, with a model that takes its time where a question asks for it.
SCRIPT = """
import sys, time
from shortzip.scripts import demo_app, demo_models
answer = demo_app.Models.answer
def slow(self, *given):
    time.sleep(2.5 if any("slowly" in str(turns) for turns in given if isinstance(turns, list)) else 0)
    return answer(self, *given)
demo_app.Models.answer = slow
demo_app.main(sys.argv[1:])
"""
QUESTION = "What is in the image?"
NAMES = ("all-tokens", "reduced", "tuned")


@dataclass(frozen=True)
class Server:
    address: str
    process: subprocess.Popen[bytes]
    images: Path
    temporary: Path
    log: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The running script, with the demo model: what a random one says hardly depends on what it is shown."""
    port, folder = free_port(), tmp_path_factory.mktemp("page")
    images, temporary, log = folder / "images", folder / "temporary", folder / "page.log"
    for made in (images / "within", temporary):
        made.mkdir(parents=True)
    for index in (10, 100):
        Image.fromarray(render_scene(sample_scene(102, index))).save(images / f"scene-{index}.png")
    (images / "within" / "private.txt").write_text("private")
    demo = ROOT / "checkpoints" / "demo-llava"
    tuned = write_tuned(folder / "final", demo, visionzip={"dominant": 12, "contextual": 4}, shortv=None)
    command = [
        sys.executable, "-c", SCRIPT, "--model", str(demo), "--tuned", str(tuned), "--device", "cpu",
        "--images", str(images), "--port", str(port), "--max_new_tokens", "12",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(temporary),
    }
    with log.open("w") as written:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=written, stderr=written)
        try:
            started = Server(f"http://127.0.0.1:{port}", process, images, temporary, log)

            def is_up() -> bool:
                assert process.poll() is None, log.read_text()
                return urllib.request.urlopen(started.address, timeout=20).status == 200

            wait_for(is_up)
            yield started
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.fail(f"the page is tested in headless Chromium: {INSTALL}")
    port, profile = free_port(), tmp_path_factory.mktemp("browser") / "profile"
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        opened = wait_for(lambda: Browser(port, profile), 120)
        yield opened
        opened.close()
    finally:
        process.terminate()
        process.wait(60)


class Visit:
    """A visitor's view of the page, opened anew."""

    def __init__(self, server: Server, browser: Browser) -> None:
        self.server, self.browser = server, browser
        browser.open(server.address)
        wait_for(lambda: self.picture_address() and " of 144" in self.said("status"))

    def said(self, name: str) -> str:
        return self.browser.text(f"#{name}")

    def picture_address(self) -> str:
        return str(self.browser.run("return document.querySelector('#picture img')?.src ?? ''"))

    def panels(self) -> np.ndarray:
        """The drawn panels alone: title and captions, above, name the budget."""
        with urllib.request.urlopen(self.picture_address(), timeout=60) as answer:
            return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB"))[125:490]

    def upload(self, path: Path) -> None:
        clear = "#upload [aria-label=Clear], #upload [aria-label='Remove this file']"
        self.browser.run(f'document.querySelector("{clear}")?.click()')
        wait_for(lambda: self.browser.run("return !!document.querySelector('#upload input[type=file]')"))
        self.browser.type("#upload input[type=file]", str(path))

    def choose(self, name: str) -> None:
        self.browser.click("#choose input")
        option = f'[...document.querySelectorAll("[role=option]")].find(o => o.innerText.includes("{name}"))'
        wait_for(lambda: self.browser.run(f"return !!{option}"))
        self.browser.run(f"{option}.dispatchEvent(new MouseEvent('mousedown', {{bubbles: true}}))")

    def slide(self, name: str, value: int) -> None:
        self.browser.run(
            f"const s = document.querySelector('#{name} input[type=range]'); s.value = {value};"
            "for (const e of ['input', 'change', 'pointerup']) s.dispatchEvent(new Event(e, {bubbles: true}));"
        )

    def ask(self, question: str) -> None:
        box = f"{self.browser.session}/element/{self.browser.find('#question textarea')}"
        self.browser.call("POST", f"{box}/clear")
        self.browser.type("#question textarea", question)
        self.browser.click("button#ask")

    def questions(self) -> list[int]:
        """How many questions each conversation shows."""
        return [self.said(name).count("?") for name in NAMES]

    def answers(self, question: str = QUESTION) -> dict[str, str]:
        """Asks in a new conversation; each model's answer, with what it took."""
        self.browser.click("button#clear")
        wait_for(lambda: self.questions() == [0, 0, 0])
        self.ask(question)
        wait_for(lambda: all("prefill" in self.said(name) for name in NAMES))
        return {name: self.said(name).split("?", 1)[1].split(" ms", 1)[0].strip() for name in NAMES}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_visit(server: Server, browser: Browser, tmp_path: Path) -> None:
    # It loads with an image, and shows what is kept of it.
    visit = Visit(server, browser)
    first, address = visit.panels(), visit.picture_address()
    assert "16 of 144 visual tokens" in visit.said("status")

    # A photograph is uploaded; the picture follows.
    photograph = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (90, 70, 3), dtype=np.uint8)).save(photograph)
    visit.upload(photograph)
    wait_for(lambda: visit.picture_address() not in ("", address))
    address = visit.picture_address()
    assert (visit.panels() != first).any()

    # The image from before is chosen again, and is there again.
    visit.choose("scene-10.png")
    wait_for(lambda: visit.picture_address() not in ("", address))
    assert (visit.panels() == first).all()

    # A slider is moved; picture, count, and what the reduced models say and take follow.
    before = visit.answers()
    visit.slide("dominant", 1)
    wait_for(lambda: "5 of 144 visual tokens (3%)" in visit.said("status"))
    assert (visit.panels() != first).any()
    after = visit.answers()
    assert "144 visual tokens" in before["all-tokens"]
    assert before["all-tokens"].splitlines()[0] == after["all-tokens"].splitlines()[0]
    assert "16 visual tokens" in before["reduced"]
    assert "5 visual tokens" in after["reduced"]
    assert before["reduced"].splitlines()[0] != after["reduced"].splitlines()[0]

    # Another question goes on.
    visit.ask("How many shapes are there?")
    wait_for(lambda: all(visit.said(name).count("prefill") == 2 for name in NAMES))
    assert visit.questions() == [2, 2, 2]

    # A budget over the grid meets a message, the conversations stay in step, and a budget that fits goes on.
    visit.slide("dominant", 100)
    visit.slide("contextual", 100)
    visit.ask("Is it red?")
    wait_for(lambda: "exceeds the 145 tokens" in visit.said("progress"))
    assert visit.questions() == [2, 2, 2]
    visit.slide("contextual", 4)
    browser.click("button#ask")
    wait_for(lambda: all(visit.said(name).count("prefill") == 3 for name in NAMES))
    assert visit.questions() == [3, 3, 3]

    # A file that is no image meets a message.
    wrong = tmp_path / "notes.txt"
    wrong.write_text("some words")
    visit.upload(wrong)
    message = wait_for(lambda: visit.said("status") if "notes.txt" in visit.said("status") else "")
    assert "is no image that Pillow knows" in message
    assert "Traceback" not in browser.text("body")
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", ["button", "upload", "choose"])
def test_a_new_conversation_stays_new(server: Server, browser: Browser, tmp_path: Path, way: str) -> None:
    visit = Visit(server, browser)
    visit.ask("What comes slowly?")
    wait_for(lambda: "prefill" in visit.said("all-tokens"))
    if way == "button":
        browser.click("button#clear")
    elif way == "upload":
        Image.new("RGB", (50, 40), (220, 30, 30)).save(tmp_path / "red.png")
        visit.upload(tmp_path / "red.png")
    else:
        visit.choose("scene-100.png")
    wait_for(lambda: visit.questions() == [0, 0, 0])
    time.sleep(7)  # the other two answers would have come
    assert visit.questions() == [0, 0, 0]
    visit.ask(QUESTION)
    wait_for(lambda: all("prefill" in visit.said(name) for name in NAMES))
    assert visit.questions() == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_visitors_are_shown_no_more_than_is_shown(server: Server, browser: Browser) -> None:
    visit = Visit(server, browser)
    visit.answers()
    labels = browser.run("return [...document.querySelectorAll('button')].map(b => `${b.title} ${b.ariaLabel}`)")
    assert any("ownload" in label for label in labels)
    assert not any("share" in label.lower() for label in labels)
    for path in (server.images / "within" / "private.txt", server.images / "scene-10.png"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{server.address}/gradio_api/file={path}", timeout=60)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_was_shown_goes_when_the_server_stops(server: Server, browser: Browser) -> None:
    Visit(server, browser)
    assert list(server.temporary.rglob("*.png"))
    server.process.terminate()
    server.process.wait(60)
    assert not list(server.temporary.rglob("*.png"))


def test_a_question_is_bounded_in_length_and_an_answer_in_time(models: Models, photo: Path) -> None:
    before: list[list[Any]] = [[] for _ in models.kinds]
    for talks, question in (
        (before, "why? " * 40_000),
        ([*before[1:], [{"role": "user", "content": "x" * 150_000}]], "why?"),
    ):
        ((after, left, said),) = converse(models, str(photo), question, (6, 3, 1), talks)
        assert (after, left) == (talks, question)
        assert "4,000 characters at most" in said
    chat = models.chat(REDUCED, 6, 3, 1)
    with pytest.raises(UserError, match=r"longer than the .* tokens of this model: begin a new one"):
        models.answer(chat, [("user", f"<image>\n{'hello ' * 3000}")], Image.open(photo))
    slow, models.seconds, models.max_new_tokens = models.seconds, 1e-9, 50
    chat.model.generation_config.eos_token_id = None
    _, took = models.answer(chat, [("user", "<image>\nwhat?")], Image.open(photo))
    models.seconds, models.max_new_tokens = slow, 4
    assert "answer" in took
    for key in ("seconds", "max_new_tokens", "port"):
        with pytest.raises(ConfigError, match=f"{key} is -1"):
            AppConfig(**{key: -1})
