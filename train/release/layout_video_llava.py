"""Video-LLaVA-hf has no original layout: it is transformers' own model, not the one that the authors' code builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shortzip.data.errors import UserError
from shortzip.train.release.layout_llava import LlavaLayout


class VideoLlavaLayout(LlavaLayout):
    """Nothing is of this layout, and nothing is written in it."""

    def recognises(self, config: Mapping[str, Any]) -> bool:
        return False

    def to_original(self, config: Any, vision_tower: str | None, where: str) -> dict[str, Any]:
        raise UserError(
            f"{where} is a Video-LLaVA-hf, whose video tower has no weights for attention over time "
            "(temporal_embedding, temporal_attn, temporal_layer_norm1), and Video-LLaVA's own code builds one that "
            "has: tune the original (LanguageBind/Video-LLaVA-7B) for that, or choose --shape full or projector"
        )


LAYOUT = VideoLlavaLayout()
