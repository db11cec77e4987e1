"""Configs of the reduced models, and the one place that says which reductions a model can take."""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, LlavaConfig, LlavaNextConfig

from .configuration_budgets import check_budgets, validate_budgets
from .configuration_pruning import check_pruned_layers, is_whole, validate_fastv
from .errors import ReductionError
from .extras import extra
from .positions import COMPACT, validate_positions
from .selectors import BASELINES, VISIONZIP, merges, selector_of, settled
from .weight_files import check_json

# Whether the tower's first token is CLS. A new family of towers belongs here and in embed_patches (tower).
TOWER_HAS_CLS = {"clip_vision_model": True, "siglip_vision_model": False}
BUDGETS_PER_IMAGE = ("reduced_llava", "reduced_llava_next")
DECODERS = ("llama", "mistral", "qwen2")
_SIZES = {
    "vision_config": ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    "text_config": ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
}


def reductions_of(config: Any) -> dict[str, Any]:
    """What a config says of the three reductions, by key."""
    return {"visionzip": config.visionzip, "shortv": config.shortv, "fastv": config.fastv}


def validate(config: Any) -> None:
    """Refuse reductions that this model cannot take.

    Called by the configs and again by the models: `from_pretrained` sets its keyword arguments on a finished config.

    Raises:
        ValueError: with the key, its value and the allowed range.
    """
    validate_visionzip(config.visionzip)
    validate_shortv(config.shortv)
    validate_fastv(config.fastv)
    validate_positions(config.positions)
    validate_budgets(config.budgets)
    if config.visionzip is not None:
        tower: Any = config.vision_config
        if tower.model_type not in TOWER_HAS_CLS:
            raise ReductionError(
                f"visionzip: the tower is a {tower.model_type}; it must be one of {sorted(TOWER_HAS_CLS)}"
            )
        selected_block(config.vision_feature_layer, tower.num_hidden_layers)
        method = config.visionzip.get("method", VISIONZIP)
        keeps_cls = method not in BASELINES and selector_of(config.visionzip).keeps_cls
        cls = int(TOWER_HAS_CLS[tower.model_type] and keeps_cls)
        for key, value in (("image_size", tower.image_size), ("patch_size", tower.patch_size)):
            if not is_whole(value) or value < 1:
                raise ReductionError(f"visionzip: the tower's {key} is {value!r}; it must be a whole number from 1")
        side = tower.image_size // tower.patch_size
        limit = side * side + cls
        dominant, contextual = config.visionzip["dominant"], config.visionzip["contextual"]
        named = "" if method == VISIONZIP else f" method {method}:"
        if dominant + contextual > limit:
            raise ReductionError(
                f"visionzip:{named} dominant {dominant} + contextual {contextual} = {dominant + contextual} exceeds "
                f"the {limit} tokens of an image (a grid of {side} by {side} patches{' and CLS' if cls else ''}): "
                f"the sum must be 1 to {limit}"
            )
        if method in BASELINES:
            extra("baselines", f"visionzip: method {method}").check_grid(method, dominant, side)
        if config.visionzip.get("per_image") is not None and config.model_type not in BUDGETS_PER_IMAGE:
            raise ReductionError(
                f"visionzip.per_image: a {config.model_type} has one budget for all images: set it to null; it is for "
                f"{', '.join(BUDGETS_PER_IMAGE)}"
            )
        if config.visionzip.get("per_image") is not None:
            extra("image_budgets", "visionzip.per_image").refuse_beside(config.visionzip, config.fastv, limit)
    check_budgets(config, TOWER_HAS_CLS.get(config.vision_config.model_type, False))
    if config.shortv is not None:
        text: Any = config.text_config
        if text.model_type not in DECODERS:
            raise ReductionError(
                f"shortv: the language model is a {text.model_type}; it must be one of {list(DECODERS)}"
            )
        count = text.num_hidden_layers
        missing = [layer for layer in config.shortv["layers"] if not 0 <= layer < count]
        if missing:
            raise ReductionError(f"shortv: layers {missing} do not exist: this model has layers 0 to {count - 1}")
    if config.fastv is not None:
        text = config.text_config
        if config.shortv is not None:
            raise ReductionError("fastv and shortv are both given: one of them must be null")
        if text.model_type not in DECODERS:
            raise ReductionError(
                f"fastv: the language model is a {text.model_type}; it must be one of {list(DECODERS)}"
            )
        check_pruned_layers(config.fastv, text.num_hidden_layers)


def validate_visionzip(visionzip: Any) -> None:
    """What can be said of the `visionzip` key without a model: None, or two whole numbers; a method, its parameters.

    Raises:
        ValueError: anything else.
    """
    if visionzip is None:
        return
    form = (
        "visionzip must be null or {dominant: at least 1, contextual: at least 0}, like {dominant: 54, contextual: 10}"
    )
    if not isinstance(visionzip, dict) or not {"dominant", "contextual"} <= set(visionzip):
        raise ReductionError(f"{form}; got {visionzip!r}")
    for key, least in (("dominant", 1), ("contextual", 0)):
        value = visionzip[key]
        if not is_whole(value) or value < least:
            raise ReductionError(f"{form}; got {key}: {value!r}")
    if visionzip.get("per_image") is not None:
        extra("image_budgets", "visionzip.per_image").validate_per_image(visionzip)
    method, parameters = visionzip.get("method", VISIONZIP), settled(visionzip)
    if not merges(visionzip) and visionzip["contextual"]:
        raise ReductionError(
            f"visionzip: method {method} merges nothing: give all {visionzip['dominant'] + visionzip['contextual']} "
            f"tokens as dominant, and contextual: 0; got contextual: {visionzip['contextual']}"
        )
    if method == "random" and parameters["seed"] < 0:
        raise ReductionError(f"visionzip: method random: seed is {parameters['seed']}; at least 0 is needed")


def validate_shortv(shortv: Any) -> None:
    """What can be said of the `shortv` key without a model: None, or a list of distinct layer indices.

    Raises:
        ValueError: anything else.
    """
    if shortv is None:
        return
    form = "shortv must be null or {layers: [indices of decoder layers, each once]}, as in {layers: [2, 5, 7]}"
    if not isinstance(shortv, dict) or set(shortv) != {"layers"}:
        raise ReductionError(f"{form}; got {shortv!r}")
    layers = shortv["layers"]
    if not isinstance(layers, (list, tuple)) or not all(is_whole(layer) for layer in layers):
        raise ReductionError(f"{form}; got layers: {layers!r}")
    if not layers:
        raise ReductionError(f"{form}; got an empty list: to freeze no layer, set shortv to null")
    repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
    if repeated:
        raise ReductionError(f"{form}; got {repeated} more than once")


def selected_block(vision_feature_layer: Any, depth: int) -> int:
    """Index of the tower's block whose output is `hidden_states[vision_feature_layer]`, for a tower of `depth` blocks.

    Raises:
        ValueError: a list of layers, or an index that no block's output has.
    """
    if not is_whole(vision_feature_layer):
        raise ReductionError(
            f"visionzip: vision_feature_layer is {vision_feature_layer!r}; tokens can be chosen in one layer only: "
            "make it a single whole number, or set visionzip to null"
        )
    if vision_feature_layer == 0 or not -depth <= vision_feature_layer <= depth:
        raise ReductionError(
            f"visionzip: vision_feature_layer {vision_feature_layer} is no block of this tower: "
            f"choose {-depth} to -1 or 1 to {depth}"
        )
    return (vision_feature_layer - 1) if vision_feature_layer > 0 else (depth + vision_feature_layer)


def check_parts(name: Any, config_dict: Mapping[str, Any]) -> None:
    """Refuses what transformers would stumble over without a file's name: a part that is no object or of a type that
    it does not know (code of a release is never run), and sizes that it would divide by.

    Args:
        name: of the release, for messages.
        config_dict: its config.json.
    """
    for part, keys in _SIZES.items():
        values: Any = config_dict.get(part, {})
        if not isinstance(values, dict):
            raise ReductionError(f"{name}: {part} in config.json is {values!r}, needed is an object")
        if "model_type" in values and values["model_type"] not in CONFIG_MAPPING:
            raise ReductionError(
                f"{name}: {part}.model_type in config.json is {values['model_type']!r}, which transformers does not "
                "know, and code of a release is never run: take a release whose parts are transformers' own"
            )
        for key in keys:
            value: Any = values.get(key)
            if is_whole(value) and value < 1:
                raise ReductionError(f"{name}: {part}.{key} in config.json is {value}, needed is at least 1")


def as_reduced(config_dict: dict[str, Any], name: Any, own: str, plain: str) -> dict[str, Any]:
    """The config.json of a release or of a reduced checkpoint, as the reduced config reads it."""
    check_parts(name, config_dict)
    found = config_dict.get("model_type", own)
    if found not in (own, plain):
        raise ReductionError(f"{name} holds a model of type {found!r}; this class loads {plain!r} and {own!r}")
    if found == plain and not {"text_config", "vision_config"} <= config_dict.keys():
        raise ReductionError(
            f"{name}: config.json has no text_config or no vision_config, as in an original LLaVA release, and "
            "transformers would fill in default sizes: convert the release to the transformers format first"
        )
    return {**config_dict, "model_type": own}


class ReadsReleases:
    """Of a reduced config, which comes before the plain one: reads the config.json of a plain release as well."""

    model_type: ClassVar[str]

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        check_json(pretrained_model_name_or_path, ("config.json",), kwargs.get("subfolder"))
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        plain = cls.model_type.removeprefix("reduced_")
        return as_reduced(config_dict, pretrained_model_name_or_path, cls.model_type, plain), kwargs


class ReducedLlavaConfig(ReadsReleases, LlavaConfig):
    """LlavaConfig and the keys of the reductions, each of which may be None.

    Args:
        visionzip: {"dominant": int, "contextual": int}; `dominant` counts CLS when the tower has one and the method
            keeps it. With a `method` of selectors.METHODS, and its parameters, tokens are chosen in another way; with
            `per_image`, as many as an image asks for (image_budgets.py).
        shortv: {"layers": [int, ...]}, the frozen layers.
        fastv: {"layer": int, "keep": float}, or another `method` of pruning in the language model
            (configuration_pruning.py).
        positions: "compact" or "original": where tokens stand once `visionzip` leaves others out (positions.py).
        base_release: of a projector-only checkpoint, the release it belongs to (base_release.py).
        budgets: [{"dominant": int, "contextual": int}, ...], those that the projector was tuned for, where they are
            several: `visionzip` may be any of them (configuration_budgets.py).

    Raises:
        ValueError: see `validate`.
    """

    model_type = "reduced_llava"

    # Any, not dict | None: the strict dataclass would refuse other types before `validate` can say what is allowed.
    visionzip: Any = None
    shortv: Any = None
    fastv: Any = None
    positions: Any = COMPACT
    base_release: Any = None
    budgets: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        validate(self)


class ReducedLlavaNextConfig(ReadsReleases, LlavaNextConfig):
    """LlavaNextConfig and the keys of ReducedLlavaConfig; the budget is per tile."""

    model_type = "reduced_llava_next"

    visionzip: Any = None
    shortv: Any = None
    fastv: Any = None
    positions: Any = COMPACT
    base_release: Any = None
    budgets: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        validate(self)


ReducedLlavaConfig.register_for_auto_class()
ReducedLlavaNextConfig.register_for_auto_class()
