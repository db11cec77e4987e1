"""What differs between families of LLaVA, behind one interface; `family_NAME.py` holds what is true of one.

The code that travels with its checkpoints (config, model, processor) is in files of its own, its original layout
in `train/release/layout_NAME.py`. Nothing else of ShortZip asks which family a model is of.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

from .errors import ReductionError

# Adding a family is a line here (README.md, "Adding a family").
FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "mini_gemini",
    "llava_next_video",
    "temporal_video_llava",
    "video_llava",
)
_REDUCED = "reduced_"


class Family:
    """What is true of all releases of one family; a family is a subclass, which says what is not as it is here.

    Attributes:
        name: as in FAMILIES, and in the names of its files.
        title: as messages call it.
        model_type: of its releases in transformers' layout; a reduced checkpoint's has "reduced_" before it.
        stem: what its classes are called after: LlavaNext for LlavaNextModel and ReducedLlavaNextModel.
        configuration, modeling, processing: the files of its reduced classes.
        inputs: what a prompt may hold: "image", "images" (several), "video".
        towers: its vision towers, as attributes of the model and in the names of weights, the one for images first.
        usual_tiles: tiles of an image as papers count them.
        video_frames: frames of a video that the releases were trained with; 0: the family takes no videos.
        any_frames: whether videos of other numbers of frames can be read too.
        counts_by_size: whether an image's number of visual tokens depends on its size.
        tunes: what of the projector's module may be trained: all of it, unless `untuned_parts` says otherwise.
        tower_keys: keys of the config beside `vision_config` that visual tokens depend on.
        releases: those known by a short name: the language model (a class of transformers) and its sizes.
        releases_side: pixels of a side of what their CLIP reads.
        image_processors: kinds of image processor that releases ship, and the class of transformers (Pillow backend)
            that gives the pixels that they were trained on.
    """

    name: str
    title: str
    model_type: str
    stem: str
    configuration: str
    modeling: str
    processing: str
    inputs: frozenset[str] = frozenset({"image", "images"})
    towers: tuple[str, ...] = ("vision_tower",)
    usual_tiles = 1
    video_frames = 0
    any_frames = True
    counts_by_size = False
    tunes: tuple[str, ...] = ("projector",)
    tower_keys: tuple[str, ...] = ()
    releases: ClassVar[Mapping[str, tuple[str, Mapping[str, int]]]] = {}
    releases_side = 336
    image_processors: ClassVar[Mapping[str, tuple[str, str]]] = {}

    @property
    def plain_config_class(self) -> Any:
        """transformers' config."""
        return getattr(import_module("transformers"), f"{self.stem}Config")

    @property
    def config_class(self) -> Any:
        """The reduced model's config."""
        return self._own(self.configuration, "Config")

    @property
    def model_class(self) -> Any:
        """The reduced model, with its head."""
        return self._own(self.modeling, "ForConditionalGeneration")

    @property
    def headless_class(self) -> Any:
        """The reduced model without its head."""
        return self._own(self.modeling, "Model")

    @property
    def processor_class(self) -> Any:
        """The reduced model's processor."""
        return self._own(self.processing, "Processor")

    def _own(self, module: str, what: str) -> Any:
        return getattr(import_module(f".{module}", __package__), f"Reduced{self.stem}{what}")

    def image_processor(self, kind: str, settings: Mapping[str, Any]) -> Any:
        """The image processor (Pillow backend) of a release that ships `settings` for one of a kind in
        `image_processors`; "" stands for settings that name none."""
        module, name = self.image_processors[kind]
        return getattr(import_module(f"transformers.models.{module}"), name).from_dict(dict(settings))

    def tiles(self, config: Any) -> int:
        """Tiles of an image as papers count them, or, where the config says, as they are."""
        return self.usual_tiles

    def pixels(self, config: Any, tiles: int) -> int:
        """Pixels that the model is given of images in so many tiles."""
        return int(tiles * config.vision_config.image_size**2)

    def build_tower(self, config: Any, name: str) -> Any:
        """The vision tower `name`, one of `towers`, alone, with random weights."""
        return import_module("transformers").AutoModel.from_config(config.vision_config)

    def untuned_parts(self, tune: str) -> tuple[str, ...]:
        """The submodules of the projector that `tune`, one of `tunes`, leaves as they are."""
        return ()

    def complete_processor(self, processor: Any, own: Mapping[str, Any], config: Any) -> None:
        """Gives a processor what its files do not say: those of some years lack one or all of these, and transformers'
        defaults are then one placeholder short. `own`: its processor_config.json; `config`: the model's."""
        if own.get("patch_size") is None:
            processor.patch_size = config.vision_config.patch_size
        if own.get("vision_feature_select_strategy") is None:
            processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        if own.get("num_additional_image_tokens") is None:
            processor.num_additional_image_tokens = int(config.vision_config.model_type == "clip_vision_model")

    def refuse_weights(self, names: Iterable[str], where: str) -> None:
        """Refuses weights of another model than the config's, by their names. `where`: what a message calls them.

        Raises ReductionError.
        """

    def no_image(self, config: Any, zero: Any) -> dict[str, Any]:
        """An empty image as the model's get_image_features takes it: what a micro-batch without images runs, so that
        all processes call the same layers. `zero`: a scalar tensor of the model's dtype, on its device."""
        side = config.vision_config.image_size
        return {"pixel_values": zero.expand(1, 3, side, side)}

    def no_video(self, config: Any, zero: Any) -> dict[str, Any]:
        """As `no_image`, an empty video as get_video_features takes it; of a family that takes videos."""
        side, frames = config.vision_config.image_size, 1 if self.any_frames else self.frames_read(config)
        return {"pixel_values_videos": zero.expand(1, frames, 3, side, side)}

    def frames_read(self, release: Any) -> int:
        """The frames of a video that a release was trained with, by its config or its processor."""
        return self.video_frames

    def check_frames(self, frames: int | None, release: Any) -> int:
        """How many frames of a video are seen where a user asks for `frames` (None: as `frames_read` says).

        Raises:
            ReductionError: the family takes no videos, or only those of its own number of frames.
        """
        if not self.video_frames:
            raise ReductionError(f"frames of a video is {frames}: a {self.title} takes no videos")
        own = self.frames_read(release)
        if frames is not None and frames != own and not self.any_frames:
            raise ReductionError(
                f"frames of a video is {frames}: a {self.title} was built for {own} and reads no other number"
            )
        return own if frames is None else frames

    def video_tokens(self, config: Any, visionzip: Mapping[str, Any] | None, frames: int) -> int:
        """Visual tokens of a video of so many frames: of each the budget, or, where `visionzip` is None, all."""
        side = config.vision_config.image_size // config.vision_config.patch_size
        per_frame = side * side if visionzip is None else visionzip["dominant"] + visionzip["contextual"]
        return int(frames * per_frame)

    def tokens_of_budgets(self, model: Any, pixel_values: Any, budgets: Sequence[dict[str, Any]]) -> list[Any]:
        """What `get_visual_tokens` of a model without its head gives of images under each of several `visionzip` keys
        of one method. The tower runs once; of a baseline, once a budget."""
        from .image_budgets import tokens_of_budgets

        return tokens_of_budgets(model, pixel_values, budgets)

    def own_parameters(self, config: Any) -> int:
        """Parameters beside the tower, the two-layer projector and the language model; counted with the projector."""
        return 0

    def more_tower_parameters(self, config: Any) -> int:
        """Parameters of towers beside the one of `vision_config`."""
        return 0

    def more_tower_bytes(self, config: Any, bytes_per_value: int) -> int:
        """Bytes at work at once, beside the tower of `vision_config`."""
        return 0

    def more_tower_flops(self, config: Any, tiles: int) -> int:
        """FLOPs of an image, in so many tiles, before the projector and beside the tower of `vision_config`."""
        return 0


@cache
def family_named(name: str) -> Family:
    """The family of a name in FAMILIES."""
    return import_module(f".family_{name}", __package__).FAMILY


def family_of_processor(processor: Any) -> Family:
    """The family of a processor, reduced or transformers' own. Raises ReductionError: of none."""
    by_processor = {f"{family.stem}Processor": family for family in all_families()}
    for kind in type(processor).__mro__:  # its own before those that it is made of
        family = by_processor.get(kind.__name__.removeprefix("Reduced"))
        if family is not None:
            return family
    raise ReductionError(f"a {type(processor).__name__} is the processor of none of {', '.join(FAMILIES)}")


def all_families() -> list[Family]:
    """Every family, in the order of FAMILIES."""
    return [family_named(name) for name in FAMILIES]


def known_model_types() -> list[str]:
    """The model types of releases and of reduced checkpoints."""
    return [kind for family in all_families() for kind in (family.model_type, _REDUCED + family.model_type)]


def family_of(model_type: Any, where: str = "config.json") -> Family:
    """The family of a release's, or a reduced checkpoint's, model type; `where`: what a message calls the release.

    Raises:
        ReductionError: no family has it.
    """
    for family in all_families():
        if model_type in (family.model_type, _REDUCED + family.model_type):
            return family
    known = ", ".join(known_model_types())
    titles = " or ".join(family.title for family in all_families())
    raise ReductionError(
        f"{where}: model_type is {model_type!r}, known are {known}: this release has another architecture; take a "
        f"{titles} one, or add its family (reduction/README.md, 'Adding a family')"
    )
