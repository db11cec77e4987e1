"""What processors of models that also take videos share: as many placeholders as frames' budgets, frames by Pillow.

transformers' own video processors need torchvision, which gives other values than Pillow here and there.
"""

import json
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import ReductionError
from .processing_reduced_llava import ReducedProcessorMixin


class ReducedVideosProcessorMixin(ReducedProcessorMixin):
    """A reduced processor that writes `dominant + contextual` placeholders per frame of a video; goes before the
    transformers class. A family says how a frame becomes pixels, and how many placeholders there are without a budget
    and beside the frames' own.
    """

    takes_videos = True

    video_token: str

    def _frame_processor(self) -> Any:
        """The image processor (Pillow backend) of frames."""
        raise NotImplementedError

    def pixels_of_frame(self, frame: Image.Image) -> Tensor:
        """[3, S, S] float32 of a frame, as `video_processor` makes them of it among others."""
        pixels: Tensor = self._frame_processor()([frame.convert("RGB")], return_tensors="pt")["pixel_values"][0]
        return pixels

    def frames_read_by(self) -> dict[str, Any]:
        """The settings by which a frame becomes pixels, as JSON values."""
        images = self._frame_processor()
        return {"class": type(images).__name__, **json.loads(images.to_json_string())}

    def _plain_video_tokens(self, frames: int) -> int:
        """Placeholders of the frames of a video of which every token is kept."""
        raise NotImplementedError

    def _beside_frames(self) -> int:
        """Placeholders of a video beside those of its frames."""
        return 0

    def video_processor(self, videos: list[Any], **kwargs: Any) -> Tensor:
        """[V, F, 3, S, S] float32 of V videos of F frames each, as `_frame_processor` makes pixels of a frame.

        `videos`: each a list of PIL images, or an array or tensor [F, H, W, 3] or [F, 3, H, W] of 0 to 255.

        Raises ReductionError for videos of different numbers of frames.
        """
        frames = [frames_of(video) for video in videos]
        counts = sorted({len(video) for video in frames})
        if len(counts) != 1 or counts[0] < 1:
            raise ReductionError(
                f"videos have {counts} frames: those of one batch must have the same number, 1 at least: sample them "
                "evenly, such as np.linspace(0, length - 1, 8).astype(int)"
            )
        images = self._frame_processor()
        return torch.stack([images(video, return_tensors="pt")["pixel_values"] for video in frames])

    def _process_videos(self, videos: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        one = all(isinstance(frame, Image.Image) for frame in videos) if isinstance(videos, (list, tuple)) else False
        if one or (not isinstance(videos, (list, tuple)) and np.asarray(videos).ndim == 4):
            videos = [videos]
        inputs = {"pixel_values_videos": self.video_processor(list(videos))}
        count = len(inputs["pixel_values_videos"])
        return inputs, [self.replace_video_token(inputs, number) for number in range(count)]

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        return self.video_token * self.video_tokens(len(video_inputs["pixel_values_videos"][video_idx]))

    def video_tokens(self, frames: int) -> int:
        """Placeholders of a video of so many frames."""
        if self.visionzip is None:
            return self._plain_video_tokens(frames) + self._beside_frames()
        return int(frames * (self.visionzip["dominant"] + self.visionzip["contextual"])) + self._beside_frames()


def frames_of(video: Any) -> list[Image.Image]:
    """The frames of a video as PIL images."""
    if isinstance(video, (list, tuple)) and all(isinstance(frame, Image.Image) for frame in video):
        return [frame.convert("RGB") for frame in video]
    pixels = np.asarray(video)
    if pixels.ndim == 4 and pixels.shape[-1] != 3 and pixels.shape[1] == 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    if pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise ReductionError(f"a video has shape {pixels.shape}; needed are PIL images, or [frames, height, width, 3]")
    if np.issubdtype(pixels.dtype, np.floating) and pixels.size and pixels.min() >= 0 and pixels.max() <= 1:
        pixels = (pixels * 255).round()
    return [Image.fromarray(frame.astype(np.uint8)) for frame in pixels]
