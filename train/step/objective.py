"""What is minimised, summed over a micro-batch's supervised tokens: cross-entropy, or a part of it and of a teacher's
divergence (train/step/teacher.py); and what is trained to do so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shortzip.data.dataset import MicroBatch
from shortzip.data.errors import UserError
from shortzip.data.supervision import IGNORE_INDEX
from shortzip.reduction.families import family_of
from shortzip.reduction.flops import projector_input
from shortzip.reduction.positions import ImagePositions, keeps_positions, shifts_of
from shortzip.reduction.refusals import change_budget
from shortzip.reduction.shortv import ActiveRows
from shortzip.train.settings.distill import DistillConfig
from shortzip.train.step.cross_entropy import summed_cross_entropy
from shortzip.train.step.lean_autograd import Take
from shortzip.train.step.places import EveryToken, FullRows, LayOut, Layout, Rows, keep_positions
from shortzip.train.step.pruning_queries import fastv_query as fastv_query
from shortzip.train.step.sandwich import Turn
from shortzip.train.step.supervised_states import FixedText, can_walk, compute_fixed_text, supervised_states
from shortzip.train.step.teacher import Lesson, Teacher, TopTokens, plain_lesson_loss, summed_lesson_loss
from shortzip.train.step.visual_features import image_features, in_order, video_features, visual_features

Llava = Any  # transformers' or a reduced one, of any family

FIXED_TEXTS = 4  # beginnings that are kept; nearly every row has the same one
MODEL_INPUTS = (
    "input_ids", "attention_mask", "pixel_values", "image_sizes", "image_budgets", "pixel_values_videos",
    "video_frames",
)  # fmt: skip


def count_supervised(labels: Tensor) -> int:
    """Supervised tokens of `labels` [B, L] that a next-token loss sees: the first position has nothing before it."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


class SupervisedLoss(nn.Module):
    """The module that an engine wraps: a micro-batch in, the sum of its supervised tokens' cross-entropies out.

    A sum, not a mean, because the mean that training wants is over the global batch: the caller divides by its count,
    which no cut into micro-batches or processes changes.

    Where `can_walk` allows it, the language model computes only what the loss and the projector's gradient need
    (train/step/supervised_states.py): the same loss and gradient up to rounding. That is asked here, once: what is
    trained, and where the weights lie, is to be settled before. `plain` turns it off. `logits_at_once`: values; None
    takes what suits the device. `videos`: whether rows may have videos.

    With `distill` the cross-entropy is replaced, in micro-batches laid out as taught, by the sum that
    train/step/teacher.py describes: of what the `teacher` says, or, without one, of the rows' lessons
    (train/inputs/lesson_cache.py). In others (held-out conversations) labels alone count.

    A micro-batch with a `budget` of its own is read under it, and one with a `turn` as train/step/sandwich.py says.
    """

    def __init__(
        self,
        model: Llava,
        *,
        plain: bool = False,
        logits_at_once: int | None = None,
        teacher: Teacher | None = None,
        distill: DistillConfig | None = None,
        videos: bool = False,
    ) -> None:
        super().__init__()
        self.videos = videos
        self.model, self.logits_at_once = model, logits_at_once
        self.teacher, self.distill = teacher, distill
        self.teacher_projector = None if teacher is None else teacher.projector  # a module: it moves with the model
        self.plain = plain or not can_walk(model.model.language_model)
        self._fixed: dict[bytes, FixedText] = {}

    def forward(self, batch: MicroBatch) -> Tensor:
        """float32 scalar. `batch.inputs`: input_ids, attention_mask, labels [B, L], and pixel_values (with image_sizes
        for LLaVA-NeXT) or visual_tokens (with visual_kept and image_sizes; for original positions visual_targets) if
        it has images, and taught_log_probs, taught_ids [T, k] if it has lessons. `batch.layout`: the `Layout` of its
        integers; without one, they are laid out here.

        A micro-batch, not its tensors: DDP would move all of these to the device, and the integers be waited for.

        One without images still has the projector in its graph, times zero: engines that average gradients
        by hooks would wait for it for ever. The gradient gains exact zeros.

        Raises:
            ValueError: placeholders and visual tokens do not match.
        """
        if batch.budget is not None:
            change_budget(self.model.model, batch.budget)
        layout, turn = batch.layout, batch.turn
        if layout is not None and self.distill is None:
            layout = replace(layout, taught=False)
        if layout is None:
            integers = {key: batch.inputs[key].cpu() for key in ("input_ids", "attention_mask", "labels")}
            config = self.model.config
            video = config.video_token_id if family_of(config.model_type).video_frames else None
            layout = LayOut(config.image_token_id, video_token_id=video)(
                {**integers, **{key: batch.inputs[key] for key in ("video_frames",) if key in batch.inputs}}
            )
        return (self._plain_loss if self.plain else self._needed_loss)(batch.inputs, layout, turn)

    def _plain_loss(self, batch: Mapping[str, Tensor], layout: Layout, turn: Turn | None) -> Tensor:
        """Every token through every layer.

        Every process calls the same modules in the same order, forward and backward, whatever is in its micro-batch:
        engines that gather sharded weights when a module is called would wait for one that does not for ever.
        """
        inner: Any = self.model.model
        embedding = inner.get_input_embeddings()
        device = embedding.weight.device
        ids, mask, labels = (
            batch[key].to(device, non_blocking=True) for key in ("input_ids", "attention_mask", "labels")
        )
        every, visual = layout.every_token.to(device), self._is_visual(ids)
        features, images, unused = self._every_feature(batch, layout, device)
        _refuse_mismatch(layout.placeholders, 0 if features is None else len(features))
        embeds = embedding(ids)
        if unused is not None:
            embeds = embeds + 0 * unused.sum().to(embeds)
        if features is not None:
            embeds = embeds.masked_scatter(visual.unsqueeze(-1), features.to(embeds))
        moved: dict[str, Tensor] = {}
        if keeps_positions(self.model.config):
            counted = torch.arange(ids.shape[1], device=ids.device)
            moved["position_ids"] = counted + shifts_of(visual, images)[:, :-1]
        outputs = inner(
            inputs_embeds=embeds,
            attention_mask=mask,
            mm_token_type_ids=visual.long(),
            use_cache=False,
            **moved,
            **self._frozen_rows(every),
            **fastv_query(self.model, labels),
        )
        states = Take.apply(outputs.last_hidden_state.flatten(0, 1), every.ends)
        if turn is not None and turn.follows:
            return plain_lesson_loss(self.model.lm_head, states, every.targets, self._lesson_of(turn))
        if turn is not None:
            turn.widest.keep(states)
        if not layout.taught:
            return nn.functional.cross_entropy(self.model.lm_head(states).float(), every.targets, reduction="sum")
        if layout.full is not None:
            lesson, taught = self._lesson(self._plain_teacher_states(batch, layout.full)), None
        else:
            lesson, taught = self._lesson(self._kept_lessons(batch, device)), every.taught
        return plain_lesson_loss(self.model.lm_head, states, every.targets, lesson, taught)

    def _is_visual(self, ids: Tensor) -> Tensor:
        """Which of these ids [B, L] are placeholders, of images and of videos alike."""
        config = self.model.config
        visual = ids == config.image_token_id
        return visual | (ids == config.video_token_id) if self._takes_videos else visual

    @property
    def _takes_videos(self) -> bool:
        return family_of(self.model.config.model_type).video_frames > 0

    def _every_feature(
        self, batch: Mapping[str, Tensor], layout: Layout, device: torch.device
    ) -> tuple[Tensor | None, ImagePositions | None, Tensor | None]:
        """As `visual_features`, and what empty images and videos give in the place of those that are not there."""
        images, unused = image_features(self.model.model, batch), []
        has_videos = "video_frames" in batch
        if images is None and (self.videos or not has_videos):
            unused.append(self._no_features(device))
        videos = video_features(self.model.model, batch)
        if videos is None and self.videos:
            unused.append(self._no_features(device, video=True))
        return *in_order(images, videos, layout.is_video), torch.cat(unused) if unused else None

    def _frozen_rows(self, every: EveryToken) -> dict[str, ActiveRows]:
        frozen = self.model.config.shortv is not None
        return {"active_rows": ActiveRows(every.active, every.is_active)} if frozen else {}

    def teacher_states(self, batch: MicroBatch) -> Tensor:
        """[S, H], the teacher's hidden states at the supervised positions of a micro-batch whose rows all answer an
        image, laid out for a teacher."""
        full: FullRows = batch.layout.full
        if self.plain:
            return self._plain_teacher_states(batch.inputs, full)
        return self._teacher_states(batch.inputs, full.layout)

    @torch.no_grad()
    def _plain_teacher_states(self, batch: Mapping[str, Tensor], full: FullRows) -> Tensor:
        """[S, H] of the teacher at the supervised positions, every token through every layer."""
        inner: Any = self.model.model
        embedding = inner.get_input_embeddings()
        rows = full.to(embedding.weight.device)
        embeds = embedding(rows.input_ids)
        visual, has_videos = rows.input_ids == self.model.config.image_token_id, "video_frames" in batch
        assert self.teacher is not None
        if "pixel_values" not in batch and (self.videos or not has_videos):
            self.teacher.features(self._empty(embeds.device))
        if "pixel_values" in batch or has_videos:
            embeds = embeds.masked_scatter(visual.unsqueeze(-1), self._teacher_features(batch, full.layout).to(embeds))
        if self.videos and not has_videos:
            frames = self._empty(embeds.device, video=True)["pixel_values_videos"][0]
            count = torch.tensor([len(frames)])
            self.teacher.features({"pixel_values_videos": frames, "video_frames": count})
        outputs = inner.language_model(inputs_embeds=embeds, attention_mask=rows.attention_mask, use_cache=False)
        return Take.apply(outputs.last_hidden_state.flatten(0, 1), rows.layout.every_token.ends)

    def _teacher_features(self, batch: Mapping[str, Tensor], layout: Layout) -> Tensor:
        assert self.teacher is not None
        features = self.teacher.features(batch, layout.is_video)
        _refuse_mismatch(layout.placeholders, len(features))
        return features

    def _lesson(self, said: Tensor | TopTokens) -> Lesson:
        assert self.distill is not None
        return Lesson(said, self.distill.weight, self.distill.temperature)

    def _lesson_of(self, turn: Turn) -> Lesson:
        """What the widest reading said, which is all that narrower ones learn."""
        return Lesson(turn.widest.said(), 1.0, 1.0 if self.distill is None else self.distill.temperature)

    def _kept_lessons(self, batch: Mapping[str, Tensor], device: torch.device) -> TopTokens:
        """The lessons [T, k] of the rows that answer an image; [0, 1] of a micro-batch without such."""
        if "taught_ids" not in batch:
            return TopTokens(torch.zeros(0, 1, device=device), torch.zeros(0, 1, dtype=torch.int64, device=device))
        ids = batch["taught_ids"].to(device, non_blocking=True).long()
        return TopTokens(batch["taught_log_probs"].to(device, non_blocking=True), ids)

    def _needed_loss(self, batch: Mapping[str, Tensor], layout: Layout, turn: Turn | None) -> Tensor:
        features, images = visual_features(self.model.model, batch, layout.is_video)
        _refuse_mismatch(layout.placeholders, 0 if features is None else len(features))
        device = self._device
        loss = torch.zeros((), device=device)
        if layout.with_image is not None:
            assert features is not None
            lesson = None
            if turn is not None and turn.follows:
                lesson = self._lesson_of(turn)
            elif layout.taught:
                full = layout.full
                said = self._kept_lessons(batch, device) if full is None else self._teacher_states(batch, full.layout)
                lesson = self._lesson(said)
            loss = loss + self._loss_of(layout.with_image, _used(features, layout), images, lesson, turn)
        else:
            projector = self.model.model.multi_modal_projector
            connected = projector(self._no_token(device)) if features is None else features
            loss = loss + 0 * connected.float().sum() + self._unread(projector)
        if layout.text_only is not None and (turn is None or not turn.follows):
            with torch.no_grad():  # these rows give the projector no gradient: their loss is only reported
                reported = self._loss_of(layout.text_only, None)
            if layout.taught:
                assert self.distill is not None
                reported = (1 - self.distill.weight) * reported  # from text alone the teacher says the same
            loss = loss + reported
        return loss

    @torch.no_grad()
    def _teacher_states(self, batch: Mapping[str, Tensor], layout: Layout) -> Tensor:
        """[S, H] of the teacher at the supervised positions of the rows that see an image."""
        rows = layout.with_image
        assert rows is not None
        features = _used(self._teacher_features(batch, layout), layout)
        fixed, places = self._fixed_text(rows, keep=True), rows.places.to(self._device)
        return supervised_states(self.model.model.language_model, features, places, fixed, frozen=False)

    def _loss_of(
        self,
        rows: Rows,
        visual: Tensor | None,
        images: ImagePositions | None = None,
        lesson: Lesson | None = None,
        turn: Turn | None = None,
    ) -> Tensor:
        """Summed loss of rows that see these visual tokens [N, H], or none. `images`: where the tokens of the
        micro-batch's images stand, if not where they are counted."""
        decoder: Any = self.model.model.language_model
        fixed = self._fixed_text(rows, keep=visual is not None)
        places, again = rows.places.to(self._device), decoder.layers[0].gradient_checkpointing
        if images is not None:
            places = keep_positions(places, images)
        states = supervised_states(decoder, visual, places, fixed, again)
        if turn is not None and not turn.follows:
            turn.widest.keep(states)
        if lesson is not None:
            return summed_lesson_loss(self.model.lm_head, states, places.targets, lesson, self.logits_at_once)
        return summed_cross_entropy(self.model.lm_head, states, places.targets, self.logits_at_once)

    @property
    def _device(self) -> torch.device:
        embedding: Any = self.model.model.language_model.embed_tokens
        return embedding.weight.device

    def _fixed_text(self, rows: Rows, *, keep: bool) -> FixedText | None:
        """The text [p] that rows begin with; `keep` it for the next rows that begin with the very same.

        A longer or shorter one that is known already is of no use: its rounding would make a micro-batch's result
        depend on those before it, and a resumed run would differ from one that was never interrupted.
        """
        if not rows.key:
            return None
        fixed = self._fixed.get(rows.key)
        if fixed is None:
            fixed = compute_fixed_text(self.model.model.language_model, rows.beginning)
            if keep:
                while len(self._fixed) >= FIXED_TEXTS:
                    del self._fixed[next(iter(self._fixed))]
                self._fixed[rows.key] = fixed
        return fixed

    def _no_token(self, device: torch.device) -> Tensor:
        """[1, input of the projector]: read from the config, for a sharded weight has no shape."""
        return torch.zeros(1, projector_input(self.model.config), device=device)

    def _unread(self, projector: nn.Module) -> Tensor | int:
        """Zero, through what is trained of the projector's module and is no part of its forward pass."""
        parts = family_of(self.model.config.model_type).untuned_parts("projector")
        weights = (weight for name in parts for weight in projector.get_submodule(name).parameters())
        return sum(0 * weight.sum() for weight in weights if weight.requires_grad)

    def _no_features(self, device: torch.device, video: bool = False) -> Tensor:
        """What an empty image, or video, gives, through the tower where there is one."""
        if isinstance(self.model.model.vision_tower, nn.Identity):
            return self.model.model.multi_modal_projector(self._no_token(device))
        if video:
            seen = self.model.model.get_video_features(**self._empty(device, video=True))
            return torch.cat(list(seen.pooler_output))
        features = self.model.model.get_image_features(**self._empty(device))
        return torch.cat(list(features.pooler_output))

    def _empty(self, device: torch.device, video: bool = False) -> dict[str, Tensor]:
        """An empty image, or video, as the model takes it."""
        config: Any = self.model.config
        zero, family = torch.zeros((), device=device, dtype=self.model.dtype), family_of(config.model_type)
        return family.no_video(config, zero) if video else family.no_image(config, zero)


def _used(features: Tensor, layout: Layout) -> Tensor:
    """Those of a micro-batch's visual tokens [N, H] that are computed further."""
    return features if layout.used is None else features[layout.used.to(features.device, non_blocking=True)]


def _refuse_mismatch(placeholders: int, features: int) -> None:
    if placeholders != features and not features:
        raise UserError(f"the prompts hold {placeholders} placeholders and there are 0 visual tokens")
    if placeholders != features:
        raise UserError(
            f"the prompts hold {placeholders} placeholders, the images give {features} visual tokens: build the "
            "inputs with the processor that belongs to this model"
        )


def train_only_projector(model: Llava, compute_dtype: torch.dtype, tune: str = "projector") -> None:
    """Makes the projector, in fp32, all that requires a gradient; the rest: `compute_dtype` and eval mode.

    `tune`: of a family whose projector has further parts, whether they are trained too (Family.untuned_parts); they
    are in fp32 either way. Raises UserError for what the model's family does not have.
    """
    family = family_of(model.config.model_type)
    if tune not in family.tunes:
        raise UserError(f"tune is {tune!r}; of a {family.title} there is {', '.join(family.tunes)}: set projector")
    model.requires_grad_(False)
    model.eval()  # no dropout in what is not trained
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None and not weight.is_floating_point():
            layer.training = True  # in eval mode bitsandbytes repacks it, on some CPUs, for kernels without a backward
    # Parameters only: buffers such as the rotary frequencies stay exact, and 4-bit weights as they are.
    projector = model.model.multi_modal_projector.requires_grad_(True)
    trained = set(projector.parameters())
    for name in family.untuned_parts(tune):
        projector.get_submodule(name).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter in trained else compute_dtype)


def recompute_layers(model: Llava, again: bool = True) -> None:
    """Has the language model's layers computed again in the backward pass, instead of keeping what is in them; or,
    without `again`, no longer."""
    if again:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # transformers has the embeddings' outputs require a gradient, the tower's too: its activations would be kept,
        # and a backward pass run through it, for nothing. What is not reentrant needs no such help.
        model.disable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()
    for layer in model.model.language_model.layers:
        layer.training = again  # transformers checkpoints layers in training mode; what is in them stays in eval mode


def projector_parameters(model: Llava) -> dict[str, nn.Parameter]:
    """The trained parameters under the names that the release gives them."""
    prefix = "model.multi_modal_projector."
    named = model.named_parameters()
    return {name: parameter for name, parameter in named if name.startswith(prefix) and parameter.requires_grad}
