"""The page's settings and models: a release with all tokens, reduced, and tuned, with their weights shared."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.generation.streamers import BaseStreamer

from shortzip.data.pixels import shrunk
from shortzip.data.supervision import Supervision
from shortzip.reduction.configuration_reduced_llava import TOWER_HAS_CLS
from shortzip.reduction.parsing import budget_by
from shortzip.reduction.pictures import draw_images, map_tokens
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import BASELINES, VISIONZIP, selector_of
from shortzip.train.inputs.chat import Chat
from shortzip.train.release.lineage import check_tuned, check_untuned
from shortzip.train.release.loading import load_release, share_weights
from shortzip.train.release.opening import Release, open_release, release_projector
from shortzip.train.release.spec import ReleaseSpec
from shortzip.train.run.run_folder import LAYERS
from shortzip.train.settings.checks import ConfigError
from shortzip.train.settings.commands import AppConfig

ALL, REDUCED, TUNED = "all tokens", "reduced", "tuned"
DEMO_RUN = "checkpoints/demo"
PREFILLS = 3
BUDGET, ONE_TOKEN = ("dominant", "contextual"), {"dominant": 1, "contextual": 0}


class TokenTimes(BaseStreamer):
    """When each token of an answer came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, and then with each token: on the CPU, so what computes it is done."""
        if value.dim() == 1:
            self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""


def open_tuned(name: str, release: Release) -> Release:
    """The checkpoint tuned from `release`. Raises ConfigError where it was tuned from another one, or with a reduction
    that the page's sliders do not set."""
    tuned = open_release(name)
    saved = tuned.saved_reductions
    if saved.visionzip is None or saved.fastv:
        method = saved.pruning_name if saved.fastv else "all visual tokens"
        raise ConfigError(
            f"tuned {tuned.name} was tuned with {method}: this page shows "
            f"budgets and ShortV; for others there is shortzip evaluate --model {tuned.name}"
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
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        release = open_release(ReleaseSpec(config.model, config.revision, dtype=dtype))
        check_untuned(release)
        tuned = self._tuned(config, release)
        self.saved = Reductions() if tuned is None else tuned.saved_reductions
        self.chosen_by = self._chosen_by(config.method)
        self.base, self.processor = load_release(release, Reductions())
        self.base.to(device)
        self.max_new_tokens = config.max_new_tokens
        self.seconds = config.seconds
        vision: Any = self.base.config.vision_config
        self.patches = (vision.image_size // vision.patch_size) ** 2
        self.depth = int(self.base.config.text_config.num_hidden_layers)
        self.tuned_projector: dict[str, torch.Tensor] | None = None
        if tuned is not None:
            self.tuned_projector = release_projector(tuned)
        method, selector = self.chosen_by.get("method", VISIONZIP), None
        if method not in BASELINES:
            selector = selector_of({"dominant": 1, "contextual": 0, **self.chosen_by})
        self.merges = selector is not None and selector.merges
        self.cls = int(TOWER_HAS_CLS[vision.model_type] and selector is not None and selector.keeps_cls)
        self.title = f"baseline {method}" if selector is None else selector.title
        self._chats: dict[str, tuple[tuple[int, int, int], Chat]] = {}
        self.ranking = self._ranking(config, None if tuned is None else tuned.name)

    def _chosen_by(self, method: str | None) -> dict[str, Any]:
        """The method and its parameters, beside a budget: those asked for, or of the tuned run."""
        saved = {key: value for key, value in (self.saved.visionzip or {}).items() if key not in BUDGET}
        if method is None:
            return saved
        asked = {key: value for key, value in budget_by(ONE_TOKEN, method).items() if key not in BUDGET}
        if self.saved.visionzip is not None and asked != saved:
            raise ConfigError(f"method is {method!r}, and the tuned run has {self.saved.method_words}: leave it out")
        return asked

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
            "contextual": max(1, round(0.017 * self.patches)) if self.merges else 0,
        }
        return int(visionzip["dominant"]), int(visionzip["contextual"]), len(self.saved.layers)

    def chat(self, kind: str, dominant: int, contextual: int, frozen: int) -> Chat:
        """The conversation with the model of a kind, which keeps what the last one computed. Raises as `build`."""
        settings = (dominant, contextual, frozen)
        if self._chats.get(kind, (None,))[0] != settings:
            self._chats[kind] = (settings, Chat(*self.build(kind, *settings)))
        return self._chats[kind][1]

    def build(self, kind: str, dominant: int, contextual: int, frozen: int) -> tuple[Any, Supervision]:
        """The model of a kind and how it is prompted. Raises ValueError for a budget or layers that cannot be."""
        budget = {"dominant": dominant, "contextual": contextual, **self.chosen_by}
        visionzip = None if kind == ALL else budget
        processor = copy.copy(self.processor)
        processor.visionzip = visionzip
        if kind == ALL:
            return self.base, Supervision(processor, max_length=None)
        layers = sorted(self.ranking[:frozen])
        # A tuned checkpoint's untuned neighbour differs from it in the projector alone.
        reductions = Reductions(visionzip, {"layers": layers} if layers else None, positions=self.saved.positions)
        projector = self.tuned_projector if kind == TUNED else None
        return share_weights(self.base, reductions, projector), Supervision(processor, max_length=None)

    def answer(self, chat: Chat, turns: Sequence[tuple[str, str]], image: Image.Image) -> tuple[str, str]:
        """(answer, what it took) to `turns` that end with a question; the first shows the image.

        The time of an answer is that of the median prefill and of the further tokens. Of a conversation that goes on,
        only what is new is computed.
        """
        if len(turns) == 1:  # the same question again has to take as long as it did
            chat.forget()
        prefills: list[float] = []
        for limit in (*[1] * PREFILLS, self.max_new_tokens):
            watch, last = TokenTimes(), len(prefills) == PREFILLS
            reply = chat.reply(turns, [image], limit, keep=last, streamer=watch, max_time=self.seconds)
            prefills.append(watch.times[0] - reply.began)
        prefill = statistics.median(prefills[1:])  # the first sets up what a first batch needs
        whole = prefill + watch.times[-1] - watch.times[0]
        took = f"{reply.visual} visual tokens, prefill {1000 * prefill:.0f} ms, answer {1000 * whole:.0f} ms"
        return reply.text, took

    def draw(self, image: Image.Image, dominant: int, contextual: int, path: Path) -> None:
        """The kept patches and merged groups over `image`, as a PNG. Raises ValueError for an impossible budget."""
        model, supervision = self.build(REDUCED, dominant, contextual, 0)
        views = map_tokens(model, supervision.processor, shrunk(image, supervision.processor.image_processor))
        draw_images([view[0] for view in views], path)
