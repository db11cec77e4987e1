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

    with gr.Blocks(title=f"ShortZip: {models.title}", analytics_enabled=False) as page:
        gr.Markdown(
            "# ShortZip\nWhat a tenth of the visual tokens still sees, before and after tuning the projector. They "
            f"are chosen by {models.title}."
        )
        image = gr.State(str(gallery[0]) if gallery else None)
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                chosen = gr.Dropdown(list(names), value=next(iter(names), None), label="image", elem_id="choose")
                file = gr.File(label="or upload one", type="filepath", height=110, elem_id="upload")
                most = models.patches + models.cls
                keep = gr.Slider(models.cls or 1, most, dominant, step=1, label="dominant", elem_id="dominant")
                merge = gr.Slider(
                    0, models.patches, contextual, step=1, label="contextual", elem_id="contextual",
                    visible=models.merges,
                )  # fmt: skip
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
