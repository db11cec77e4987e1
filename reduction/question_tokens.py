"""CDPruner beside a reduced model: visual tokens chosen by the question (functions in cdpruner.py).

    reader = QuestionReader.from_pretrained("openai/clip-vit-large-patch14-336")  # the CLIP of the vision tower
    features = reader.image_features(model, pixel_values, questions)
    model.generate(input_ids=input_ids, attention_mask=mask, mm_encoder_outputs={"image": features})

For evaluation: the choice changes with the question, so that no cache of features and no published config holds it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from shortzip.reduction.cdpruner import choose_for_question, cut_text, embed_patches_with_text, embed_text
from shortzip.reduction.configuration_reduced_llava import selected_block
from shortzip.reduction.errors import ReductionError
from shortzip.reduction.positions import ImagePositions, PlacedFeatures, keeps_positions, takes_encoded_images
from shortzip.reduction.tensors import take
from shortzip.reduction.tower import embed_patches


@dataclass(frozen=True)
class QuestionReader:
    """What CDPruner reads questions with, of the CLIP whose vision tower the model has."""

    name: str
    """Of the CLIP release, for messages."""
    text_tower: Any
    """A CLIPTextModelWithProjection."""
    visual_projection: nn.Linear
    """From the vision tower's width to the joint space."""
    token_ids: Callable[[str], Sequence[int]]
    """A question's token ids, with start and end, of any length."""

    @classmethod
    def from_pretrained(cls, name: str, **kwargs: Any) -> Self:
        """Reads the text tower, its tokenizer and the visual projection of a CLIP release.

        `kwargs` are transformers' (revision, cache_dir, dtype). Raises ReductionError for what is no CLIP release.
        """
        try:
            tokenizer: Any = CLIPTokenizer.from_pretrained(name, **kwargs)
            clip: Any = CLIPModel.from_pretrained(name, **kwargs)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ReductionError(f"text_tower is {name!r}: it must be a CLIP release; {reason}") from error
        with torch.device("meta"):  # its parts are CLIP's
            text_tower: Any = CLIPTextModelWithProjection(clip.config.text_config).eval()
        text_tower.text_model, text_tower.text_projection = clip.text_model, clip.text_projection
        return cls(name, text_tower, clip.visual_projection, lambda text: tokenizer(text).input_ids)

    @torch.no_grad()
    def embed_questions(self, questions: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
        """Questions in the joint space, [N, M, E], and which of their M segments each has, [N, M] bool."""
        text_tower: Any = self.text_tower.to(device)
        length = self.text_tower.config.max_position_embeddings
        cut = [cut_text(self.token_ids(question), length) for question in questions]
        ids, mask = (torch.cat(parts).to(device) for parts in zip(*cut, strict=True))
        counts = [len(segments) for segments, _ in cut]
        embeds = embed_text(text_tower, ids, mask).split(counts)
        texts = nn.utils.rnn.pad_sequence(list(embeds), batch_first=True)
        present = torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)
        return texts, present.to(device)

    @torch.no_grad()
    def image_features(self, model: Any, pixel_values: Tensor, questions: Sequence[str]) -> PlacedFeatures:
        """The model's image features with its budget chosen by the questions, as its `get_image_features` gives them,
        with where they stand.

        Args:
            model: a ReducedLlavaForConditionalGeneration whose config has a budget; its method plays no part.
            pixel_values: [N, 3, S, S], every image of the batch.
            questions: N, the question that each image is looked at for.

        Raises:
            ReductionError: no budget, tiles (LLaVA-NeXT), or a CLIP whose vision tower is another.
        """
        inner, visionzip = model.model, model.config.visionzip
        tower = inner.vision_tower
        self.check_model(model.config)
        if len(pixel_values) != len(questions):
            raise ReductionError(
                f"cdpruner: {len(pixel_values)} images and {len(questions)} questions: give each image its question"
            )
        blocks, hidden = tower.encoder.layers, embed_patches(tower, pixel_values)
        for block in blocks[: selected_block(model.config.vision_feature_layer, len(blocks)) + 1]:
            hidden = block(hidden, None)
        patches = hidden[:, 1:]
        projected = inner.multi_modal_projector(patches)
        self.visual_projection.to(patches.device, patches.dtype)
        images = embed_patches_with_text(patches, tower.post_layernorm, self.visual_projection)
        texts, present = self.embed_questions(questions, patches.device)
        count = visionzip["dominant"] + visionzip["contextual"]
        # Autocast would bring back the rounding that float32 is here to avoid.
        with torch.autocast(patches.device.type, enabled=False):
            kept = choose_for_question(projected, images, texts, count, present).sort(dim=-1).values
        features: Any = list(take(projected, kept))
        tokens = take(patches, kept)
        positions = _positions(model.config, kept, patches.shape[1])
        return PlacedFeatures(last_hidden_state=tokens, pooler_output=features, positions=positions)

    def given(self, model: Any, inputs: Mapping[str, Any], questions: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of the model with its images' features, as `image_features` gives them, in the place of
        `pixel_values`; as they are where there are none. Raises what it raises."""
        rest = dict(inputs)
        if "pixel_values" in rest:
            pixels = rest.pop("pixel_values")
            rest["mm_encoder_outputs"] = {"image": self.image_features(model, pixels, questions)}
        return rest

    def check_model(self, config: Any) -> None:
        """Raises ReductionError for a reduced model's config that it cannot choose for; reads no weights of it."""
        if not takes_encoded_images():
            raise ReductionError("cdpruner: this transformers takes pixels only: version 5.18 or later is needed")
        if config.visionzip is None:
            raise ReductionError("cdpruner: visionzip is null: load the model with a budget")
        if config.model_type != "reduced_llava":
            raise ReductionError(f"cdpruner: the model is a {config.model_type}; it must be a reduced_llava")
        vision = config.vision_config
        if vision.model_type != "clip_vision_model":
            raise ReductionError(f"cdpruner: the tower is a {vision.model_type}; it must be CLIP's, as {self.name}")
        if vision.hidden_size != self.visual_projection.in_features:
            raise ReductionError(
                f"cdpruner: {self.name} projects patches of width {self.visual_projection.in_features}, the model's "
                f"tower gives {vision.hidden_size}: name the CLIP that the tower comes from"
            )


def _positions(config: Any, kept: Tensor, patches: int) -> ImagePositions | None:
    """Where patches [N, budget] stand, of CLIP's `patches` of an image; None where they are numbered as they come."""
    if not keeps_positions(config):
        return None
    cls = int(config.vision_feature_select_strategy != "default")  # stands before them
    return ImagePositions(list(kept + cls), [patches + cls] * len(kept))
