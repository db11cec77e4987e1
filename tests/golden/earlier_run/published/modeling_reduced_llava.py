"""LLaVA with VisionZip and ShortV in its forward pass, and what its LLaVA-NeXT sibling shares with it.

The weights have the names of transformers' LLaVA: a release loads here, and a reduced checkpoint loads there.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, LlavaModel, SiglipVisionModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.utils import ModelOutput, can_return_tuple
from transformers.utils.import_utils import torch_compilable_check

from .base_release import find_base, lay_projector, open_base
from .baselines import downsample_images, downsampled_tokens, grid_shape, keep_patches
from .configuration_reduced_llava import TOWER_HAS_CLS, ReducedLlavaConfig, selected_block, validate
from .fastv import Pruning, last_attended, prune_in_decoder
from .shortv import SUPPORTED_ATTENTION, active_rows, freeze_visual_tokens
from .visionzip import at_least_float32, reduce_tokens


@dataclass
class VisualTokens(ModelOutput):
    """What the tower and VisionZip make of N images (tiles in LLaVA-NeXT), before the projector.

    Attributes:
        tokens: [N, budget, H] in the tower's dtype: CLS (if any), dominant patches in spatial order, contextual.
        kept: [N, D] int64, patch indices (row-major in the grid) of the dominant tokens, ascending.
        targets: [N, C] int64, patch indices of the tokens that the contextual ones grew from.
        groups: [N, P] int64, the contextual token that each patch was merged into; -1 for a dominant or dropped patch.
        attention: [N, P] float32, the score of each patch.
    """

    tokens: Tensor | None = None
    kept: Tensor | None = None
    targets: Tensor | None = None
    groups: Tensor | None = None
    attention: Tensor | None = None


class DtypeProjector(LlavaMultiModalProjector):
    """LLaVA's projector in a dtype of its own: float32 while it is trained, whatever the tower computes in."""

    def forward(self, image_features: Tensor) -> Tensor:
        dtype = self.linear_1.weight.dtype
        return super().forward(image_features.to(dtype) if dtype.is_floating_point else image_features)


class ReducedModelMixin:
    """What the reduced LLaVA and LLaVA-NeXT models have in common; goes before the transformers class."""

    config: Any
    vision_tower: Any
    language_model: Any
    multi_modal_projector: Any
    get_input_embeddings: Any
    post_init: Any

    def __init__(self, config: Any) -> None:
        validate(config)
        super().__init__(config)  # type: ignore[call-arg]
        self.multi_modal_projector = DtypeProjector(config)
        self._frozen_layers = [] if config.shortv is None else list(config.shortv["layers"])
        freeze_visual_tokens(self.language_model, self._frozen_layers)
        if config.fastv is not None:
            prune_in_decoder(self.language_model, config.fastv["layer"])
        self.post_init()

    def get_visual_tokens(self, pixel_values: Tensor, vision_feature_layer: Any = None) -> VisualTokens:
        """The visual tokens that VisionZip leaves, and where every patch went.

        Args:
            pixel_values: [N, 3, S, S].
            vision_feature_layer: overrides the config's.

        Raises:
            ValueError: `visionzip` is None, or `vision_feature_layer` is a list or out of range.
        """
        if self.config.visionzip is None:
            raise ValueError("visionzip is null: this model keeps every visual token and chooses none")
        tower = self.vision_tower
        blocks = tower.encoder.layers
        if vision_feature_layer is None:
            vision_feature_layer = self.config.vision_feature_layer
        selected = selected_block(vision_feature_layer, len(blocks))
        if self.config.visionzip.get("method", "visionzip") != "visionzip":
            return self._baseline_tokens(pixel_values, selected)
        hidden = embed_patches(tower, pixel_values)
        for block in blocks[:selected]:
            hidden = block(hidden, None)
        has_cls = TOWER_HAS_CLS[tower.config.model_type]
        queries, keys = _queries_and_keys(blocks[selected], hidden, has_cls)
        reduced = reduce_tokens(
            blocks[selected](hidden, None),
            queries,
            keys,
            blocks[selected].self_attn.scale,
            self.config.visionzip["dominant"],
            self.config.visionzip["contextual"],
            has_cls,
        )
        return VisualTokens(**reduced._asdict())

    def _baseline_tokens(self, pixel_values: Tensor, selected: int) -> VisualTokens:
        """The tokens of the baseline that the config names (baselines.py), from the output of block `selected`."""
        tower, method, count = self.vision_tower, self.config.visionzip["method"], self.config.visionzip["dominant"]
        side = tower.config.image_size // tower.config.patch_size
        pixels = pixel_values
        if method == "downsample":
            pixels = downsample_images(pixel_values, grid_shape(count, side), tower.config.patch_size)
        hidden = embed_patches(tower, pixels, interpolate=method == "downsample")
        for block in tower.encoder.layers[: selected + 1]:
            hidden = block(hidden, None)
        patches = hidden[:, int(TOWER_HAS_CLS[tower.config.model_type]) :]
        if method == "downsample":
            found = downsampled_tokens(patches, count, side)
        else:
            found = keep_patches(patches, pixel_values, method, count, self.config.visionzip.get("seed", 0))
        return VisualTokens(targets=found.kept[:, :0], **found._asdict())

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        if self.config.visionzip is None:
            return super().get_placeholder_mask(input_ids, inputs_embeds, image_features)  # type: ignore[misc]
        mask = self._placeholders(input_ids, inputs_embeds)
        placeholders, features = mask.sum(), image_features.shape[0]
        torch_compilable_check(placeholders == features, lambda: self._mismatch(int(placeholders), features))
        return mask.unsqueeze(-1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        fastv_query: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' model.

        `fastv_query` [B] int64: with FastV, the position whose attention decides what is kept; the last by default,
        which in a prompt is right, and where answers follow it is given: the end of the first prompt.

        `mm_token_type_ids` [B, L] (1 at visual tokens) is read only where nothing else says which positions are
        visual: ShortV, and `inputs_embeds` into which the image is merged already.

        Raises:
            ValueError: placeholders and visual tokens do not match, or ShortV cannot know which positions are visual.
        """
        in_decoder = self.config.shortv is not None or self.config.fastv is not None
        if self.config.visionzip is not None or in_decoder:
            features = (kwargs.get("mm_encoder_outputs") or {}).get("image")
            has_image = features is not None or (pixel_values is not None and pixel_values.shape[0] > 0)
            if input_ids is not None and not has_image:
                self._refuse_missing_images(input_ids, kwargs.get("past_key_values"))
            if in_decoder:
                visual = None
                if has_image:
                    visual = self._placeholders(input_ids, inputs_embeds)
                elif inputs_embeds is not None:
                    visual = _from_token_types(mm_token_type_ids, inputs_embeds)
                self._refuse_unmasked_attention(kwargs)
                if self.config.fastv is not None:
                    length = (input_ids if input_ids is not None else inputs_embeds).shape[1]  # type: ignore[union-attr]
                    query = last_attended(kwargs.get("attention_mask"), length) if fastv_query is None else fastv_query
                    kwargs["fastv"] = Pruning(self.config.fastv["keep"], visual, query)
                elif visual is not None:
                    kwargs["active_rows"] = active_rows(visual)
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds, **kwargs
        )

    def _placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """[B, L] bool, True where a visual token goes."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        assert inputs_embeds is not None
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)

    def _mismatch(self, placeholders: int, features: int) -> str:
        visionzip = self.config.visionzip
        return (
            f"the prompts hold {placeholders} image placeholders, the images give {features} visual tokens: this "
            f"model keeps {visionzip['dominant'] + visionzip['contextual']} per image (per tile in LLaVA-NeXT). Build "
            f"the inputs with the processor saved beside this model or with from_pretrained(…, visionzip={visionzip})"
        )

    def _refuse_missing_images(self, input_ids: Tensor, past_key_values: Any) -> None:
        if input_ids.shape[1] == 1:
            return
        allowed = 0
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            # After the prompt, a few may be what the model itself wrote or assisted decoding guessed; an image is not.
            visionzip, tower = self.config.visionzip, self.config.vision_config
            patches = (tower.image_size // tower.patch_size) ** 2
            allowed = (patches if visionzip is None else visionzip["dominant"] + visionzip["contextual"]) - 1
        placeholders = (input_ids == self.config.image_token_id).sum()
        torch_compilable_check(
            placeholders <= allowed,
            lambda: (
                f"the prompts hold {int(placeholders)} image placeholders and there are 0 visual tokens: "
                "pass the pixel_values of their images"
            ),
        )

    def _refuse_unmasked_attention(self, kwargs: dict[str, Any]) -> None:
        text, key = self.language_model.config, "fastv" if self.config.shortv is None else "shortv"
        if text._attn_implementation not in SUPPORTED_ATTENTION:
            raise ValueError(
                f"{key}: attention {text._attn_implementation!r} cannot leave out the queries of visual tokens: "
                f"load the language model with attn_implementation one of {list(SUPPORTED_ATTENTION)}"
            )
        if key == "shortv" and sorted(self.config.shortv["layers"]) != sorted(self._frozen_layers):
            raise ValueError(
                f"shortv: config.shortv now says layers {self.config.shortv['layers']}, but this model was loaded "
                f"with {self._frozen_layers} frozen: load it again with from_pretrained(…, shortv=…)"
            )
        if kwargs.get("output_attentions", text.output_attentions):
            raise ValueError(
                "shortv: output_attentions is not available, visual tokens have no attention in frozen layers: "
                "load the model with shortv=None to look at attention"
            )


class ReducedForGenerationMixin:
    """What the reduced models with a head have in common; goes before the transformers class.

    `from_pretrained` refuses a checkpoint that does not fill the model exactly, and lays a projector-only one over the
    release that its config names (base_release.py).
    """

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' method. What it names, `generate` takes: `mm_token_type_ids` beside `inputs_embeds`."""
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, mm_token_type_ids=mm_token_type_ids, **kwargs
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' method, with `visionzip` and `shortv` among the keyword arguments.

        Raises:
            ValueError: missing, unexpected or misshapen weights, by name; an impossible reduction; another release
                than the one that a projector-only checkpoint was tuned over.
        """
        with_info = kwargs.pop("output_loading_info", False)
        source, projector = pretrained_model_name_or_path, None
        base_release = find_base(cls.config_class, source, kwargs)  # type: ignore[attr-defined]
        if base_release is not None:
            source, projector, kwargs = open_base(cls.config_class, base_release, source, kwargs)  # type: ignore[attr-defined]
        # Misshapen weights are let through to be refused below, by name: transformers only logs which they are.
        kwargs = {**kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = super().from_pretrained(source, *args, **kwargs)  # type: ignore[misc]
        problems = [
            f"{len(info[key])} {key.replace('_', ' ')} ({', '.join(sorted(map(str, info[key]))[:3])} …)"
            for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info[key]
        ]
        if problems:
            raise ValueError(f"{pretrained_model_name_or_path} does not fill {cls.__name__}: {'; '.join(problems)}")
        if projector is not None:
            lay_projector(model, projector)
        return (model, info) if with_info else model


class ReducedLlavaModel(ReducedModelMixin, LlavaModel):
    """LlavaModel whose images come as `budget` visual tokens each and whose decoder has frozen layers."""

    config: ReducedLlavaConfig
    config_class = ReducedLlavaConfig

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: Any = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Projected visual tokens of N images: `pooler_output` is a list of N tensors [budget, H of the decoder].

        Under VisionZip `vision_feature_select_strategy` plays no part: the budget counts CLS and always contains it.
        """
        if self.config.visionzip is None:
            return super().get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=vision_feature_layer,
                vision_feature_select_strategy=vision_feature_select_strategy,
                **({} if image_sizes is None else {"image_sizes": image_sizes}),
                **kwargs,
            )
        visual: Any = self.get_visual_tokens(pixel_values, vision_feature_layer)
        features: Any = self.project(visual.tokens)  # transformers types pooler_output as one tensor, reads a list
        return BaseModelOutputWithPooling(last_hidden_state=visual.tokens, pooler_output=features)

    def project(self, tokens: Tensor, kept: Tensor | None = None, image_sizes: Tensor | None = None) -> list[Tensor]:
        """Projected visual tokens of each image, [budget, H of the decoder], of `get_visual_tokens`' tokens."""
        return list(self.multi_modal_projector(tokens))


class ReducedLlavaForConditionalGeneration(  # type: ignore[misc]
    ReducedForGenerationMixin, LlavaForConditionalGeneration
):
    """LlavaForConditionalGeneration with `config.visionzip` and `config.shortv`; with both None, exactly that.

    Its forward takes what transformers' takes; ValueError where placeholders and visual tokens do not match.
    """

    config: ReducedLlavaConfig
    config_class = ReducedLlavaConfig

    def __init__(self, config: ReducedLlavaConfig) -> None:
        # Past LlavaForConditionalGeneration's own __init__, which would build a plain model first.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = ReducedLlavaModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


def embed_patches(tower: Any, pixel_values: Tensor, interpolate: bool = False) -> Tensor:
    """What the tower's first block reads: [N, T, H] of images [N, 3, S, S].

    With `interpolate`, images may be of another size, and the position embeddings are interpolated.

    Raises:
        ValueError: a tower of an unsupported family.
    """
    if isinstance(tower, CLIPVisionModel):
        return tower.pre_layrnorm(tower.embeddings(pixel_values, interpolate_pos_encoding=interpolate))
    if isinstance(tower, SiglipVisionModel):
        return tower.embeddings(pixel_values, interpolate_pos_encoding=interpolate)
    raise ValueError(f"visionzip: the tower is a {type(tower).__name__}, not a CLIPVisionModel or SiglipVisionModel")


@torch.no_grad()
def _queries_and_keys(block: Any, hidden: Tensor, has_cls: bool) -> tuple[Tensor, Tensor]:
    """Queries [N, heads, Q, d] (Q = 1 with CLS: its own, else T) and keys [N, heads, T, d] of a block.

    In float32 or better, so that a tower in bfloat16 or float16 keeps the patches that float32 keeps.
    """
    attention, norm = block.self_attn, block.layer_norm1
    linears = (attention.q_proj, attention.k_proj)
    # Without autocast, as in reduce_tokens.
    with torch.autocast(hidden.device.type, enabled=False):
        if all(type(linear) is nn.Linear for linear in linears) and not norm.weight.is_meta:
            weight, bias = at_least_float32(norm.weight), at_least_float32(norm.bias)
            normed = nn.functional.layer_norm(at_least_float32(hidden), norm.normalized_shape, weight, bias, norm.eps)
            project = _project_in_float32
        else:  # Quantised, adapted or offloaded weights are not to be had: the modules run as they are.
            normed = norm(hidden)
            project = nn.Module.__call__
        queries = project(linears[0], normed[:, :1] if has_cls else normed)
        keys = project(linears[1], normed)

    def split_heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    return split_heads(queries), split_heads(keys)


def _project_in_float32(linear: nn.Linear, states: Tensor) -> Tensor:
    return nn.functional.linear(states, at_least_float32(linear.weight), at_least_float32(linear.bias))


def _from_token_types(mm_token_type_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor:
    if mm_token_type_ids is None:
        raise ValueError(
            "shortv: inputs_embeds alone do not say which positions are visual: pass input_ids and pixel_values, or "
            "mm_token_type_ids (1 at visual tokens, else 0) of the same length"
        )
    if mm_token_type_ids.shape != inputs_embeds.shape[:2]:
        raise ValueError(
            f"shortv: mm_token_type_ids has shape {tuple(mm_token_type_ids.shape)}, "
            f"inputs_embeds is {tuple(inputs_embeds.shape[:2])} positions"
        )
    return mm_token_type_ids == 1


def register_key_mapping(reduced: str, plain: str) -> None:
    """Let a class or model type load old releases as transformers' own does.

    transformers renames the keys of old releases by class name and model type, and skips classes that are not its own:
    without this a release loads with a random lm_head.
    """
    mapping = get_checkpoint_conversion_mapping(plain)
    if mapping is not None:
        register_checkpoint_conversion_mapping(reduced, mapping, overwrite=True)


register_key_mapping("ReducedLlavaModel", "LlavaModel")
register_key_mapping("reduced_llava", "llava")
ReducedLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
