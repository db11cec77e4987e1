"""LLaVA with its visual tokens reduced in its forward pass, and what its LLaVA-NeXT sibling shares with it.

The weights have the names of transformers' LLaVA: a release loads here, and a reduced checkpoint loads there.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import can_return_tuple

from .base_release import find_base, open_base
from .configuration_reduced_llava import TOWER_HAS_CLS, ReducedLlavaConfig, reductions_of, selected_block, validate
from .engines import NamesItsModelMixin, WithoutHeadMixin, refuse_attention_of_engines
from .errors import ReductionError
from .extras import extra
from .positions import (
    CountsPositions,
    ImagePositions,
    PlacedFeatures,
    encode_first,
    keeps_positions,
    moved_pass,
    patches_of_tokens,
    remember_shifts,
)
from .projector import PROJECTOR, DtypeProjector, load_projector, settle_projector, was_reduced
from .refusals import (
    refuse_changed,
    refuse_mismatch,
    refuse_missing_images,
    refuse_unmasked_attention,
    refuse_videos,
    visual_of_token_types,
)
from .selectors import BASELINES, VISIONZIP, has_own_budgets, selector_of
from .shortv import active_rows, freeze_visual_tokens
from .visual_tokens import VisualTokens, choose_tokens
from .weight_files import check_json, check_weights


class ReducedModelMixin(WithoutHeadMixin):
    """What the reduced LLaVA and LLaVA-NeXT models have in common; goes before the transformers class."""

    config: Any
    vision_tower: Any
    language_model: Any
    multi_modal_projector: Any
    get_input_embeddings: Any
    get_image_features: Any
    post_init: Any
    _token_counts: Any

    def __init__(self, config: Any) -> None:
        validate(config)
        super().__init__(config)  # type: ignore[call-arg]
        refuse_attention_of_engines(config, self.language_model.config)
        self.multi_modal_projector = DtypeProjector(config)
        self._reductions = copy.deepcopy(reductions_of(config))
        freeze_visual_tokens(self.language_model, [] if config.shortv is None else list(config.shortv["layers"]))
        if config.fastv is not None:
            extra("pruning", "fastv").prune_in_decoder(self.language_model, config.fastv, config.positions)
        self.post_init()

    def get_visual_tokens(self, pixel_values: Tensor, vision_feature_layer: Any = None) -> VisualTokens:
        """The visual tokens that are chosen, and where every patch went.

        `pixel_values`: [N, 3, S, S]. `vision_feature_layer`: overrides the config's.

        Raises:
            ValueError: `visionzip` is None, or `vision_feature_layer` is a list or out of range.
        """
        if self.config.visionzip is None:
            raise ReductionError("visionzip is null: this model keeps every visual token and chooses none")
        validate(self.config)  # it may have been changed: pictures look at several budgets
        tower, zipped = self.vision_tower, self.config.visionzip
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        selected = selected_block(layer, len(tower.encoder.layers))
        has_cls = TOWER_HAS_CLS[tower.config.model_type]
        method = zipped.get("method", VISIONZIP)
        if method in BASELINES:
            baselines = extra("baselines", f"visionzip: method {method}")
            found = baselines.baseline_tokens(tower, pixel_values, selected, zipped, has_cls)
            return VisualTokens(targets=found.kept[:, :0], **found._asdict())
        projector, selector = self.multi_modal_projector, selector_of(zipped)
        return choose_tokens(tower, projector, pixel_values, selected, selector, zipped, has_cls)

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        if not self._checks_rows():
            return super().get_placeholder_mask(input_ids, inputs_embeds, image_features)  # type: ignore[misc]
        return self._placeholders(input_ids, inputs_embeds).unsqueeze(-1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        image_sizes: Any = None,
        mm_token_type_ids: Tensor | None = None,
        fastv_query: Tensor | None = None,
        image_budgets: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' model.

        `image_budgets` [N]: visual tokens of each image (tile), as the processor gives them; None: as the config says.

        `fastv_query` [B] int64: with `config.fastv`, the position whose attention decides what is kept; the last by
        default, which in a prompt is right, and where answers follow it is given: the end of the first prompt. With
        PyramidDrop also [B, S], the positions before S supervised spans, -1 for none.

        `active_rows`: with ShortV, what `shortv.active_rows` gives of the visual positions, where that is known: then
        nothing waits for the device.

        `mm_token_type_ids` [B, L] (1 or 2 at visual tokens) is read only where nothing else says which positions are
        visual: ShortV, and `inputs_embeds` into which the image is merged already.

        Raises:
            ValueError: a row's placeholders are not filled by whole images, ShortV cannot know which positions are
                visual, pruning cannot work with the cache, or the config's reductions are not those it was loaded
                with.
        """
        refuse_changed(self.config, self._reductions)
        refuse_videos(type(self).__name__, kwargs.get("pixel_values_videos"))
        in_decoder = self.config.shortv is not None or self.config.fastv is not None
        if isinstance(image_sizes, Tensor):
            image_sizes = image_sizes.tolist()  # read several times, waited for once
        features = visual = shifts = None
        moves = keeps_positions(self.config)
        if moves or image_budgets is not None or has_own_budgets(self.config.visionzip):
            encode = partial(self.get_image_features, image_budgets=image_budgets)
            pixel_values = encode_first(encode, pixel_values, image_sizes, kwargs)
        if self.config.visionzip is not None or in_decoder:
            features = (kwargs.get("mm_encoder_outputs") or {}).get("image")
            if features is not None or (pixel_values is not None and pixel_values.shape[0] > 0):
                visual = self._placeholders(input_ids, inputs_embeds)
                if self._checks_rows():
                    lengths = (
                        self._token_counts(pixel_values, image_sizes, kwargs.get("vision_feature_select_strategy"))
                        if features is None
                        else [len(image) for image in features.pooler_output]
                    )
                    # A chunk of a prompt has been given its part of all images' tokens in one piece, and these alone.
                    in_pieces = features is not None and features.last_hidden_state is None
                    refuse_mismatch(self.config.visionzip, visual, lengths, not in_pieces, image_budgets)
            elif input_ids is not None:
                refuse_missing_images(self.config, input_ids, kwargs.get("past_key_values"))
            if in_decoder:
                key = "fastv" if self.config.shortv is None else "shortv"
                if visual is None and inputs_embeds is not None:
                    visual = visual_of_token_types(key, mm_token_type_ids, inputs_embeds)
                refuse_unmasked_attention(key, self.language_model.config, kwargs.get("output_attentions"))
                if self.config.fastv is not None:
                    length = (input_ids if input_ids is not None else inputs_embeds).shape[1]  # type: ignore[union-attr]
                    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
                    pruning, rotary = extra("pruning", "fastv"), self.language_model.rotary_emb
                    kwargs["fastv"] = pruning.pruning_of(rotary, visual, fastv_query, length, mask, cache)
                elif visual is not None and "active_rows" not in kwargs:
                    kwargs["active_rows"] = active_rows(visual)
        if moves:
            tokens: Any = inputs_embeds if input_ids is None else input_ids
            text, types = self.language_model.config, mm_token_type_ids
            kwargs, shifts = moved_pass(text, tokens, visual, features, types, kwargs)
        kwargs |= {} if image_sizes is None else {"image_sizes": image_sizes}
        outputs = super().forward(  # type: ignore[misc]
            input_ids=input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds, **kwargs
        )
        if shifts is not None:
            remember_shifts(outputs, shifts)
        return outputs

    def _checks_rows(self) -> bool:
        """Whether `forward` knows how many tokens each image gives, and compares them with each row's placeholders."""
        reduced = any(reduction is not None for reduction in reductions_of(self.config).values())
        return reduced and self.config.vision_config.model_type in TOWER_HAS_CLS

    def _patches_given(self, strategy: str | None) -> int:
        """How many tokens the tower gives of an image (a tile) when every one is kept."""
        tower = self.config.vision_config
        tokens = (tower.image_size // tower.patch_size) ** 2 + TOWER_HAS_CLS[tower.model_type]
        return tokens - ((strategy or self.config.vision_feature_select_strategy) == "default")

    def _places_in_image(self, kept: Tensor, targets: Tensor, strategy: str | None) -> Tensor:
        """Where the visual tokens of each image (tile) stand among all that the tower gives of it: [N, budget]."""
        tower = self.config.vision_config
        side = tower.image_size // tower.patch_size
        patches = patches_of_tokens(self.config.visionzip, kept, targets, side)
        # CLS may stand before the first patch, or the first patch be left out (a tower without CLS).
        return (patches + self._patches_given(strategy) - side * side).clamp(min=0)

    def _placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """[B, L] bool, True where a visual token goes."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        assert inputs_embeds is not None
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(token)).all(-1)


class ReducedForGenerationMixin(CountsPositions, NamesItsModelMixin):
    """What the reduced models with a head have in common; goes before the transformers class.

    `from_pretrained` refuses a checkpoint that does not fill the model exactly, and lays a projector-only one over the
    release that its config names (base_release.py).
    """

    config: Any

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As transformers' method. With `config.fastv`, the end of the prompt ranks the visual tokens in every pass
        that holds them: also without a cache, and where guesses are appended to it (assisted decoding).

        Raises:
            ValueError: `config.fastv` and `prefill_chunk_size`, whose chunks before the last do not hold the end.
        """
        if self.config.fastv is not None:
            settings = self.generation_config if generation_config is None else generation_config  # type: ignore[attr-defined]
            pruning = extra("pruning", "fastv")
            pruning.refuse_chunks(kwargs.get("prefill_chunk_size", settings.prefill_chunk_size))
            if kwargs.get("fastv_query") is None:
                ids = kwargs.get("input_ids", inputs)
                embeds = kwargs.get("inputs_embeds")
                mask = kwargs.get("attention_mask")
                kwargs["fastv_query"] = pruning.prompt_end(ids, embeds, mask, settings.pad_token_id)
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        fastv_query: Tensor | None = None,
        image_budgets: Any = None,
        video_frames: Any = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' method. What it names, `generate` takes: `mm_token_type_ids` beside `inputs_embeds`,
        `fastv_query`, a position of the whole prompt; towers alone are told `image_budgets` and `video_frames`."""
        given = {"inputs_embeds": inputs_embeds, "mm_token_type_ids": mm_token_type_ids, **kwargs}
        inputs = super().prepare_inputs_for_generation(input_ids, **given)
        if fastv_query is not None:
            embeds = inputs.get("inputs_embeds")
            whole, given = (input_ids, inputs["input_ids"]) if embeds is None else (inputs_embeds, embeds)
            cached = whole.shape[1] - given.shape[1]  # type: ignore[union-attr]
            inputs["fastv_query"] = (fastv_query - cached).clamp(min=0)
        return inputs

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        # An assistant finds its own prompt's end, and one that is no reduced model does not know the argument.
        own = {key: value for key, value in model_kwargs.items() if key != "fastv_query"}
        return super()._get_candidate_generator(*args, model_kwargs=own, **kwargs)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, Any]:
        """The projector of a reduced checkpoint comes in the dtype of its file, whatever the rest is loaded in."""
        plan: dict[str, Any] = super()._get_dtype_plan(dtype)  # type: ignore[misc]
        return {**plan, **({PROJECTOR: None} if was_reduced(self.config) else {})}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' method, with `visionzip` and `shortv` among the keyword arguments.

        `dtype` is of everything but a tuned projector: what a reduced checkpoint holds in float32, as it was tuned,
        stays float32. A plain release is loaded as transformers' own class loads it.

        Raises:
            ValueError: missing, unexpected or misshapen weights, by name; an impossible reduction; another release
                than the one that a projector-only checkpoint was tuned over.
        """
        with_info = kwargs.pop("output_loading_info", False)
        source, projector = pretrained_model_name_or_path, None
        base_release = find_base(cls.config_class, source, kwargs)  # type: ignore[attr-defined]
        if base_release is not None:
            source, projector, kwargs = open_base(cls.config_class, base_release, source, kwargs)  # type: ignore[attr-defined]
        check_json(source, ("generation_config.json",), kwargs.get("subfolder"))
        check_weights(Path(str(source), kwargs.get("subfolder") or ""))
        # Misshapen weights are let through to be refused below, by name: transformers only logs which they are.
        kwargs = {**kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = super().from_pretrained(source, *args, **kwargs)  # type: ignore[misc]
        problems = [
            f"{len(info[key])} {key.replace('_', ' ')} ({', '.join(sorted(map(str, info[key]))[:3])} …)"
            for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info[key]
        ]
        if problems:
            raise ReductionError(
                f"{pretrained_model_name_or_path} does not fill {cls.__name__}: {'; '.join(problems)}"
            )
        if projector is not None:
            load_projector(model, projector)
        else:
            settle_projector(model)
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
        image_budgets: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Projected visual tokens of N images: `pooler_output` is a list of N tensors [budget, H of the decoder].

        `image_budgets`: see `forward`. Under VisionZip `vision_feature_select_strategy` plays no part but in original
        positions, which are those of plain LLaVA: the budget counts CLS and always contains it.
        """
        refuse_changed(self.config, self._reductions)
        layer, strategy = vision_feature_layer, vision_feature_select_strategy
        if image_budgets is not None or has_own_budgets(self.config.visionzip):
            own = extra("image_budgets", "image_budgets")
            return own.features_of_images(self, pixel_values, image_budgets, layer=layer, strategy=strategy)
        if self.config.visionzip is None:
            return super().get_image_features(
                pixel_values=pixel_values,
                vision_feature_layer=layer,
                vision_feature_select_strategy=strategy,
                **kwargs | ({} if image_sizes is None else {"image_sizes": image_sizes}),
            )
        visual: Any = self.get_visual_tokens(pixel_values, layer)
        features: Any = self.project(visual.tokens)  # transformers types pooler_output as one tensor, reads a list
        return PlacedFeatures(
            last_hidden_state=visual.tokens,
            pooler_output=features,
            positions=self.image_positions(visual.kept, visual.targets, strategy=strategy),
        )

    def project(self, tokens: Tensor, kept: Tensor | None = None, image_sizes: Tensor | None = None) -> list[Tensor]:
        """Projected visual tokens of each image, [budget, H of the decoder], of `get_visual_tokens`' tokens."""
        return list(self.multi_modal_projector(tokens))

    def image_positions(
        self, kept: Tensor, targets: Tensor, image_sizes: Any = None, strategy: str | None = None
    ) -> ImagePositions | None:
        """Where the visual tokens of `get_visual_tokens` stand; None where they are numbered as they come.

        `kept` [N, D] and `targets` [N, C] int64, as there; `strategy`: plain LLaVA's, the config's by default.
        """
        if not keeps_positions(self.config):
            return None
        places = self._places_in_image(kept, targets, strategy)
        return ImagePositions(list(places), [self._patches_given(strategy)] * len(places))

    def _token_counts(self, pixel_values: Tensor, image_sizes: Any, strategy: str | None) -> list[int]:
        """How many visual tokens each image gives."""
        visionzip = self.config.visionzip
        each = self._patches_given(strategy) if visionzip is None else visionzip["dominant"] + visionzip["contextual"]
        return [each] * pixel_values.shape[0]


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
ReducedLlavaModel.with_head = ReducedLlavaForConditionalGeneration
ReducedLlavaModel.register_for_auto_class("AutoModel")
ReducedLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
