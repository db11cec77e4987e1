"""A page to look and try: kept patches and merged groups over an image, and the answers of all tokens, reduced, tuned.

    pip install 'shortzip[app]'
    python scripts/demo_app.py                                   # demo-llava, and checkpoints/demo where it was tuned
    python scripts/demo_app.py --model llava-hf/llava-1.5-7b-hf --tuned checkpoints/llava-1.5-7b-64 --images photos/

Choose or upload an image, set budget and frozen layers, ask, ask on. The weights are in memory once: the three models
share them. Listens on 127.0.0.1 unless --host says otherwise.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from shortzip.data.dataset import Collator
from shortzip.data.errors import MissingExtra, MissingFile, UserError
from shortzip.data.images import BadImage, open_image, squared
from shortzip.data.instructions import PLACEHOLDER
from shortzip.data.supervision import Supervision
from shortzip.reduction.configuration_reduced_llava import TOWER_HAS_CLS
from shortzip.reduction.pictures import draw_images, map_tokens
from shortzip.reduction.reductions import Reductions
from shortzip.train.inputs.prompts import batch_prompts, encode_prompt
from shortzip.train.inputs.samples import demo_folder, draw_demo_scenes
from shortzip.train.release.lineage import check_tuned, check_untuned
from shortzip.train.release.opening import Release, load_release, open_release, release_projector
from shortzip.train.run.run_folder import LAYERS
from shortzip.train.settings.command_line import parse_config, run_command, say
from shortzip.train.settings.config import ConfigError, DataConfig

ALL, REDUCED, TUNED = "all tokens", "reduced", "tuned"
LOCAL = "127.0.0.1"
FIRST_QUESTION = "What is in the image?"
DEMO_RUN = "checkpoints/demo"
PREFILLS = 3
LONGEST = 4000  # characters of a conversation: whoever asks more holds the page up for all others
WAITING = 32  # questions; more are refused rather than left to wait for many minutes


@dataclass(frozen=True)
class AppConfig:
    """Settings of scripts/demo_app.py."""

    model: str = "checkpoints/demo-llava"
    """A release that is neither reduced nor tuned: folder or Hub id."""
    tuned: str | None = None
    """A run's folder or reduced checkpoint tuned from it with VisionZip; null: checkpoints/demo where it is finished,
    else none."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    images: str | None = None
    """Folder of images to choose from; null: the demo's held-out scenes."""
    ranking: list[int] | None = None
    """Layers in the order they are frozen; null: the tuned run's ranking by LC, or the deepest first."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    seconds: float = 30
    """After so many seconds an answer ends where it is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets other machines in."""
    port: int = 7860
    """Port to listen on."""

    def __post_init__(self) -> None:
        for key, least, most in (
            ("max_new_tokens", 1, 4096), ("seconds", 1, 3600), ("port", 0, 65535),
        ):  # fmt: skip
            if not least <= getattr(self, key) <= most:
                raise ConfigError(f"{key} is {getattr(self, key)}: {least} to {most} are allowed")


class Stopwatch(BaseStreamer):
    """When `generate` began, and when each of its tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, and then with each token: on the CPU, so what computes it is done."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


def open_tuned(name: str, release: Release) -> Release:
    """The checkpoint tuned from `release`. Raises ConfigError where it was tuned from another one, or with a reduction
    that the page's sliders do not set."""
    tuned = open_release(name)
    saved = tuned.saved_reductions
    if saved.visionzip is None or saved.fastv:
        method = "FastV" if saved.fastv else "all visual tokens"
    else:
        method = saved.method
    if method != "visionzip":
        raise ConfigError(
            f"tuned {tuned.name} was tuned with {method}: this page shows VisionZip and ShortV; for other methods "
            f"there is python scripts/evaluate_models.py --model {tuned.name}"
        )
    check_tuned(tuned, release)
    return tuned


class Models:
    """One release's weights, and the models that share them: all tokens, reduced, and with a tuned projector."""

    def __init__(self, config: AppConfig) -> None:
        """Loads. Raises ConfigError for models that do not fit each other, and what `load_release` raises."""
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is 'cuda', and there is no GPU here: give --device cpu")
        device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        release = open_release(config.model, config.revision)
        check_untuned(release)
        tuned = self._tuned(config, release)
        self.base, self.processor = load_release(
            release,
            Reductions(),
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        )
        self.base.to(device)
        self.max_new_tokens = config.max_new_tokens
        self.seconds = config.seconds
        vision: Any = self.base.config.vision_config
        self.cls = int(TOWER_HAS_CLS[vision.model_type])
        self.patches = (vision.image_size // vision.patch_size) ** 2
        self.depth = int(self.base.config.text_config.num_hidden_layers)
        self.tuned_projector: dict[str, torch.Tensor] | None = None
        self.saved = Reductions()
        if tuned is not None:
            self.tuned_projector = {name: t.float().to(device) for name, t in release_projector(tuned).items()}
            self.saved = tuned.saved_reductions
        self.ranking = self._ranking(config, None if tuned is None else tuned.name)

    def _tuned(self, config: AppConfig, release: Release) -> Release | None:
        if config.tuned is not None:
            return open_tuned(config.tuned, release)
        if config.model != AppConfig.model or not (Path(DEMO_RUN) / "final" / "config.json").is_file():
            return None
        try:
            return open_tuned(DEMO_RUN, release)
        except ConfigError as error:  # nobody asked for it
            print(f"without {DEMO_RUN}: {error}", flush=True)
            return None

    def _ranking(self, config: AppConfig, tuned: str | None) -> list[int]:
        ranking = config.ranking
        if ranking is None and tuned is not None and (Path(tuned) / LAYERS).is_file():
            ranking = json.loads((Path(tuned) / LAYERS).read_text(encoding="utf-8"))["ranking"]
        if ranking is None:
            first = self.saved.layers
            ranking = [*first, *(layer for layer in reversed(range(self.depth)) if layer not in first)]
        if sorted(ranking) != list(range(self.depth)):
            raise ConfigError(f"ranking must name each of the layers 0 to {self.depth - 1} once, got {ranking}")
        return ranking

    @property
    def kinds(self) -> list[str]:
        """The models there are."""
        return [ALL, REDUCED, TUNED] if self.tuned_projector is not None else [ALL, REDUCED]

    @property
    def defaults(self) -> tuple[int, int, int]:
        """Dominant, contextual and number of frozen layers to begin with."""
        visionzip = self.saved.visionzip or {
            "dominant": max(2, round(0.094 * self.patches)),
            "contextual": max(1, round(0.017 * self.patches)),
        }
        return int(visionzip["dominant"]), int(visionzip["contextual"]), len(self.saved.layers)

    def build(self, kind: str, dominant: int, contextual: int, frozen: int) -> tuple[Any, Supervision]:
        """The model of a kind and how it is prompted. Raises ValueError for a budget or layers that cannot be."""
        visionzip = None if kind == ALL else {"dominant": dominant, "contextual": contextual}
        processor = copy.copy(self.processor)
        processor.visionzip = visionzip
        if kind == ALL:
            return self.base, Supervision(processor, max_length=None)
        config = copy.deepcopy(self.base.config)
        config.visionzip = visionzip
        config.shortv = {"layers": sorted(self.ranking[:frozen])} if frozen else None
        with torch.device("meta"):
            model = type(self.base)(config)
        model.load_state_dict(self.base.state_dict(), assign=True)
        for name, module in self.base.named_modules():  # what no checkpoint holds: positions, rotary frequencies
            model.get_submodule(name)._buffers.update(module._buffers)
        if kind == TUNED and self.tuned_projector is not None:
            model.model.multi_modal_projector.load_state_dict(self.tuned_projector, assign=True)
        model.generation_config = self.base.generation_config
        return model.eval(), Supervision(processor, max_length=None)

    @torch.inference_mode()
    def answer(
        self, model: Any, supervision: Supervision, turns: Sequence[tuple[str, str]], image: Image.Image
    ) -> tuple[str, str]:
        """(answer, what it took) of what `build` gave, to `turns` that end with a question; the first shows the image.

        The time of an answer is that of the median prefill and of the further tokens.
        """
        inputs = batch_prompts(supervision, [encode_prompt(supervision, turns, [image])], self.base.device)
        longest = getattr(self.base.config.text_config, "max_position_embeddings", None)
        if longest is not None and inputs["input_ids"].shape[1] + self.max_new_tokens > longest:
            raise UserError(f"the conversation is longer than the {longest} tokens of this model: begin a new one")
        prefills, said = [], torch.empty(0)
        for limit in (*[1] * PREFILLS, self.max_new_tokens):
            watch = Stopwatch()
            said = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=limit,
                eos_token_id=supervision.tokenizer.eos_token_id,
                pad_token_id=Collator.of(supervision).pad_token_id,
                streamer=watch,
                max_time=self.seconds,
            )
            prefills.append(watch.times[1] - watch.times[0])
        prefill = statistics.median(prefills[1:])  # the first sets up what a first batch needs
        whole = prefill + watch.times[-1] - watch.times[1]
        length = inputs["input_ids"].shape[1]
        visual = int((inputs["input_ids"] == self.base.config.image_token_id).sum())
        took = f"{visual} visual tokens, prefill {1000 * prefill:.0f} ms, answer {1000 * whole:.0f} ms"
        text: Any = supervision.tokenizer.decode(said[0, length:], skip_special_tokens=True)
        return str(text).strip(), took

    def draw(self, image: Image.Image, dominant: int, contextual: int, path: Path) -> None:
        """The kept patches and merged groups over `image`, as a PNG. Raises ValueError for an impossible budget."""
        model, supervision = self.build(REDUCED, dominant, contextual, 0)
        views = map_tokens(model, supervision.processor, squared(image, supervision.processor.image_processor))
        draw_images([view[0] for view in views], path)


def choices(config: AppConfig) -> list[Path]:
    """The images to choose from: up to 12 of the folder, or of the demo's held-out scenes, drawn if needed."""
    if config.images is None:
        data = DataConfig("", eval_instructions="demo")
        draw_demo_scenes(data)
        folder = demo_folder(data.demo_scenes, held_out=True) / "images"
    else:
        folder = Path(config.images)
        if not folder.is_dir():
            raise MissingFile(f"images: {folder} is no folder")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))[:12]


def converse(
    models: Models,
    path: str | None,
    question: str,
    budget: tuple[int, int, int],
    talks: Sequence[list[dict[str, Any]]],
) -> Iterator[tuple[Sequence[list[dict[str, Any]]], str, str]]:
    """(conversations, question, status) as the models answer, each after its own earlier answers.

    `budget`: dominant, contextual, number of frozen layers. What goes wrong is said in the status, and leaves all the
    conversations as they were: they are about the same questions.
    """
    asked = question.replace(PLACEHOLDER, "").strip()
    if path is None:
        yield talks, question, "⚠️ Choose or upload an image first."
        return
    if not asked:
        yield talks, question, "⚠️ Write a question."
        return
    if len(asked) + max((sum(len(_text(turn)) for turn in talk) for talk in talks), default=0) > LONGEST:
        yield talks, question, f"⚠️ A conversation holds {LONGEST:,} characters at most: ask less, or begin a new one."
        return
    said = list(talks)
    try:
        image = open_image(path)
        built = [models.build(kind, *budget) for kind in models.kinds]
        for place, kind in enumerate(models.kinds):
            turns = [(turn["role"], _text(turn)) for turn in said[place] if not _is_note(turn)]
            turns.append(("user", asked))
            turns[0] = ("user", f"{PLACEHOLDER}\n{turns[0][1]}")
            answer, took = models.answer(*built[place], turns, image)
            said[place] = [
                *said[place],
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answer},
                {"role": "assistant", "content": "", "metadata": {"title": took if answer else f"(nothing) {took}"}},
            ]
            yield list(said), "", f"{kind}: {took}"
        yield said, "", ""
    except BadImage as error:
        yield talks, question, f"⚠️ {Path(path).name}: {error.detail}"
    except (ValueError, RuntimeError) as error:  # a GPU's memory that is full is a RuntimeError
        yield talks, question, f"⚠️ {error}"


def build_page(models: Models, gallery: Sequence[Path], scratch: Path) -> Any:
    """The Gradio page; pictures are written to `scratch`."""
    import gradio as gr

    names = {path.name: str(path) for path in gallery}
    dominant, contextual, frozen = models.defaults
    empty = [*([] for _ in models.kinds), ""]

    def look(path: str | None, keep: int, merge: int) -> tuple[Any, str]:
        """The picture for the image at `path`, or what is wrong with it."""
        if path is None:
            return None, "Choose or upload an image."
        try:
            picture = scratch / f"{time.time_ns()}.png"
            models.draw(open_image(path), int(keep), int(merge), picture)
        except (BadImage, ValueError) as error:
            return None, f"⚠️ {Path(path).name}: {error.detail if isinstance(error, BadImage) else error}"
        total = int(keep) + int(merge)
        return str(picture), f"{total} of {models.patches} visual tokens ({total / models.patches:.0%})"

    def show(path: str | None, keep: int, merge: int) -> tuple[Any, ...]:
        """A file becomes the image, if it is one; the conversation begins anew, and the other way to give an image
        is emptied, so that its last choice can be made again."""
        picture, status = look(path, keep, merge)
        return (path if picture else None, picture, status, None, *empty)

    def choose(name: str, keep: int, merge: int) -> tuple[Any, ...]:
        return show(names[name], keep, merge)

    def ask(path: str | None, text: str, keep: int, merge: int, freeze: int, *said: Any) -> Iterator[tuple[Any, ...]]:
        budget = (int(keep), int(merge), int(freeze))
        for after, left, state in converse(models, path, text, budget, said):
            yield (*after, left, state)

    with gr.Blocks(title="ShortZip", analytics_enabled=False) as page:
        gr.Markdown("# ShortZip\nWhat a tenth of the visual tokens still sees, before and after tuning the projector.")
        image = gr.State(str(gallery[0]) if gallery else None)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                chosen = gr.Dropdown(list(names), value=next(iter(names), None), label="image", elem_id="choose")
                file = gr.File(label="or upload one", type="filepath", height=110, elem_id="upload")
                most = models.patches + models.cls
                keep = gr.Slider(models.cls or 1, most, dominant, step=1, label="dominant", elem_id="dominant")
                merge = gr.Slider(0, models.patches, contextual, step=1, label="contextual", elem_id="contextual")
                freeze = gr.Slider(0, models.depth, frozen, step=1, label="frozen layers", elem_id="frozen")
            with gr.Column(scale=3):
                # Without Gradio's button that shares, which uploads what is shown.
                picture = gr.Image(
                    label="kept patches and merged groups",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="picture",
                )
                status = gr.Markdown(elem_id="status")
        with gr.Row():
            talks = [
                gr.Chatbot(label=kind, height=280, buttons=["copy", "copy_all"], elem_id=kind.replace(" ", "-"))
                for kind in models.kinds
            ]
        with gr.Row():
            question = gr.Textbox(FIRST_QUESTION, label="question", scale=5, elem_id="question")
            send = gr.Button("Ask", variant="primary", elem_id="ask")
            clear = gr.Button("New conversation", elem_id="clear")
        progress = gr.Markdown(elem_id="progress")

        page.load(look, [image, keep, merge], [picture, status])
        for slider in (keep, merge):
            slider.release(look, [image, keep, merge], [picture, status])
        asked = [image, question, keep, merge, freeze, *talks]
        # One event for both, so that it cannot run twice at once; what begins anew ends it, lest it write back.
        asking = gr.on([send.click, question.submit], ask, asked, [*talks, question, progress])
        anew = [*talks, progress]
        chosen.input(choose, [chosen, keep, merge], [image, picture, status, file, *anew], cancels=[asking])
        file.upload(show, [file, keep, merge], [image, picture, status, chosen, *anew], cancels=[asking])
        # In the browser, at once: a reply from the server could come after the next question.
        forget = f"() => {json.dumps(empty)}"
        gr.on([clear.click, *(talk.clear for talk in talks)], None, None, anew, js=forget, cancels=[asking])
    return page


def _is_note(turn: dict[str, Any]) -> bool:
    """Whether a chat message is what an answer took: shown, and no part of the conversation."""
    return bool((turn.get("metadata") or {}).get("title"))


def _text(turn: dict[str, Any]) -> str:
    """A chat message's text: Gradio hands back content as a list of parts."""
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def main(argv: Sequence[str]) -> None:
    config = parse_config(AppConfig, argv, default=None, program="demo_app.py")
    if importlib.util.find_spec("gradio") is None:
        raise MissingExtra("the page needs Gradio: pip install 'shortzip[app]'")
    models, gallery = Models(config), choices(config)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        # Gradio's own setting: where it keeps what is uploaded and shown, which goes when the server stops.
        os.environ["GRADIO_TEMP_DIR"] = str(Path(scratch, "gradio"))
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a killed server cleans up as an interrupted one
        page = build_page(models, gallery, Path(scratch, "pictures"))
        if config.host != LOCAL:
            say(f"listening on {config.host}: whoever reaches this machine can use the page", flush=True)
        page.queue(default_concurrency_limit=1, max_size=WAITING)
        try:
            page.launch(server_name=config.host, server_port=config.port, share=False)
        except OSError as error:
            raise UserError(f"host {config.host}, port {config.port}: {error}") from error


if __name__ == "__main__":
    run_command(main)
