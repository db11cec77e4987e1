"""A page to look and try: kept patches and merged groups over an image, and the answers of all tokens, reduced, tuned.

    pip install 'shortzip[app]'
    python scripts/demo_app.py                                   # demo-llava, and checkpoints/demo where it was tuned
    python scripts/demo_app.py --model llava-hf/llava-1.5-7b-hf --tuned checkpoints/llava-1.5-7b-64 --images photos/

Choose or upload an image, set budget and frozen layers, ask, ask on. The weights are in memory once: the three models
share them. Listens on 127.0.0.1 unless --host says otherwise.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shortzip.data.errors import MissingExtra, MissingFile, UserError
from shortzip.data.images import BadImage, open_image
from shortzip.data.instructions import PLACEHOLDER
from shortzip.scripts.demo_models import Models
from shortzip.train.inputs.samples import demo_folder, draw_demo_scenes
from shortzip.train.settings.command_line import parse_config, run_command, say
from shortzip.train.settings.commands import AppConfig
from shortzip.train.settings.config import DataConfig

LOCAL = "127.0.0.1"
FIRST_QUESTION = "What is in the image?"
LONGEST = 4000  # characters of a conversation: whoever asks more holds the page up for all others
WAITING = 32  # questions; more are refused rather than left to wait for many minutes


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
    text = question.replace(PLACEHOLDER, "").strip()
    if path is None:
        yield talks, question, "⚠️ Choose or upload an image first."
        return
    if not text:
        yield talks, question, "⚠️ Write a question."
        return
    if len(text) + max((sum(len(_text(turn)) for turn in talk) for talk in talks), default=0) > LONGEST:
        yield talks, question, f"⚠️ A conversation holds {LONGEST:,} characters at most: ask less, or begin a new one."
        return
    after = list(talks)
    try:
        image = open_image(path)
        chats = [models.chat(kind, *budget) for kind in models.kinds]
        for place, kind in enumerate(models.kinds):
            turns = [(turn["role"], _text(turn)) for turn in after[place] if not _is_note(turn)]
            turns.append(("user", text))
            turns[0] = ("user", f"{PLACEHOLDER}\n{turns[0][1]}")
            answer, took = models.answer(chats[place], turns, image)
            after[place] = [
                *after[place],
                {"role": "user", "content": text},
                {"role": "assistant", "content": answer},
                {"role": "assistant", "content": "", "metadata": {"title": took if answer else f"(nothing) {took}"}},
            ]
            yield list(after), "", f"{kind}: {took}"
        yield after, "", ""
    except BadImage as error:
        yield talks, question, f"⚠️ {Path(path).name}: {error.detail}"
    except (ValueError, RuntimeError) as error:  # a GPU's memory that is full is a RuntimeError
        yield talks, question, f"⚠️ {error}"


class Replies:
    """What the page's events give back, in the order of the components that they fill."""

    def __init__(self, models: Models, gallery: Sequence[Path], scratch: Path) -> None:
        self.models, self.scratch = models, scratch
        self.paths = {path.name: str(path) for path in gallery}
        self.anew = [*([] for _ in models.kinds), ""]
        """Empty conversations, and no progress."""

    def look(self, path: str | None, keep: int, merge: int) -> tuple[Any, str]:
        """The picture for the image at `path`, or what is wrong with it."""
        if path is None:
            return None, "Choose or upload an image."
        try:
            picture = self.scratch / f"{time.time_ns()}.png"
            self.models.draw(open_image(path), int(keep), int(merge), picture)
        except (BadImage, ValueError) as error:
            return None, f"⚠️ {Path(path).name}: {error.detail if isinstance(error, BadImage) else error}"
        total, patches = int(keep) + int(merge), self.models.patches
        return str(picture), f"{total} of {patches} visual tokens ({total / patches:.0%})"

    def show(self, path: str | None, keep: int, merge: int) -> tuple[Any, ...]:
        """A file becomes the image, if it is one; the conversation begins anew, and the other way to give an image
        is emptied, so that its last choice can be made again."""
        picture, status = self.look(path, keep, merge)
        return (path if picture else None, picture, status, None, *self.anew)

    def choose(self, name: str, keep: int, merge: int) -> tuple[Any, ...]:
        return self.show(self.paths[name], keep, merge)

    def ask(
        self, path: str | None, question: str, keep: int, merge: int, freeze: int, *talks: Any
    ) -> Iterator[tuple[Any, ...]]:
        budget = (int(keep), int(merge), int(freeze))
        for after, rest, status in converse(self.models, path, question, budget, talks):
            yield (*after, rest, status)


class Layout:
    """The page's components, as they stand on it; made inside a `gradio.Blocks`."""

    def __init__(self, gr: Any, models: Models, paths: dict[str, str]) -> None:
        gr.Markdown(
            "# ShortZip\nWhat a tenth of the visual tokens still sees, before and after tuning the projector. They "
            f"are chosen by {models.title}."
        )
        self.image = gr.State(next(iter(paths.values()), None))
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                self._add_settings(gr, models, list(paths))
            with gr.Column(scale=3):
                # Without Gradio's button that shares, which uploads what is shown.
                self.picture = gr.Image(
                    label="kept patches and merged groups",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="picture",
                )
                self.status = gr.Markdown(elem_id="status")
        with gr.Row():
            self.talks = [
                gr.Chatbot(label=kind, height=280, buttons=["copy", "copy_all"], elem_id=kind.replace(" ", "-"))
                for kind in models.kinds
            ]
        with gr.Row():
            self.question = gr.Textbox(FIRST_QUESTION, label="question", scale=5, elem_id="question")
            self.send = gr.Button("Ask", variant="primary", elem_id="ask")
            self.clear = gr.Button("New conversation", elem_id="clear")
        self.progress = gr.Markdown(elem_id="progress")

    def _add_settings(self, gr: Any, models: Models, names: list[str]) -> None:
        dominant, contextual, frozen = models.defaults
        most = models.patches + models.cls
        self.choice = gr.Dropdown(names, value=next(iter(names), None), label="image", elem_id="choose")
        self.file = gr.File(label="or upload one", type="filepath", height=110, elem_id="upload")
        self.keep = gr.Slider(models.cls or 1, most, dominant, step=1, label="dominant", elem_id="dominant")
        merged = {"label": "contextual", "elem_id": "contextual", "visible": models.merges}
        self.merge = gr.Slider(0, models.patches, contextual, step=1, **merged)
        self.freeze = gr.Slider(0, models.depth, frozen, step=1, label="frozen layers", elem_id="frozen")


def build_page(models: Models, gallery: Sequence[Path], scratch: Path) -> Any:
    """The Gradio page; pictures are written to `scratch`."""
    import gradio as gr

    replies = Replies(models, gallery, scratch)
    with gr.Blocks(title=f"ShortZip: {models.title}", analytics_enabled=False) as page:
        on = Layout(gr, models, replies.paths)
        budget = [on.keep, on.merge]
        page.load(replies.look, [on.image, *budget], [on.picture, on.status])
        for slider in budget:
            slider.release(replies.look, [on.image, *budget], [on.picture, on.status])
        # One event for both, so that it cannot run twice at once; what begins anew ends it, lest it write back.
        asking = gr.on(
            [on.send.click, on.question.submit],
            replies.ask,
            [on.image, on.question, *budget, on.freeze, *on.talks],
            [*on.talks, on.question, on.progress],
        )
        anew = [*on.talks, on.progress]
        view = [on.image, on.picture, on.status]
        on.choice.input(replies.choose, [on.choice, *budget], [*view, on.file, *anew], cancels=[asking])
        on.file.upload(replies.show, [on.file, *budget], [*view, on.choice, *anew], cancels=[asking])
        # In the browser, at once: a reply from the server could come after the next question.
        forget = f"() => {json.dumps(replies.anew)}"
        clearing = [on.clear.click, *(talk.clear for talk in on.talks)]
        gr.on(clearing, None, None, anew, js=forget, cancels=[asking])
    return page


def _is_note(turn: dict[str, Any]) -> bool:
    """Whether a chat message is what an answer took: shown, and no part of the conversation."""
    return bool((turn.get("metadata") or {}).get("title"))


def _text(turn: dict[str, Any]) -> str:
    """A chat message's text: Gradio hands back content as a list of parts."""
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def main(argv: Sequence[str]) -> None:
    run(parse_config(AppConfig, argv, program="demo_app.py"))


def run(config: AppConfig) -> None:
    """Opens the page, until it is interrupted."""
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
