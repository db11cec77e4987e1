"""Video-LLaVA's video tower (LanguageBind's): a CLIP whose layers first attend over time, at every place of a frame.

Before CLIP's own layer, each layer adds an embedding to the F frames of a video, and a pre-norm attention over those
F, with a residual behind the embedding (arXiv 2310.01852; the authors' code). CLS takes part as a patch does. How many
frames there are is a matter of the weights: an embedding each.

N is the number of frames of all videos, V * F, video after video; T of tokens of a frame; H the hidden size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

from .tower import embed_patches, queries_and_keys
from .visual_tokens import BlockStates


class TemporalLayer(CLIPEncoderLayer):
    """CLIP's layer behind a step over time."""

    def __init__(self, config: Any, frames: int) -> None:
        super().__init__(config)
        self.temporal_embedding = nn.Parameter(torch.zeros(1, frames, config.hidden_size))
        self.temporal_attn = CLIPAttention(config)
        self.temporal_layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def over_time(self, hidden: Tensor) -> Tensor:
        """The step over time, on the frames of whole videos: [N, T, H] as it comes."""
        frames = self.temporal_embedding.shape[1]
        places = hidden.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)  # [V * T, F, H]
        places = places + self.temporal_embedding.to(places.dtype)
        places = places + self.temporal_attn(self.temporal_layer_norm1(places))[0]
        return places.unflatten(0, (-1, hidden.shape[1])).transpose(1, 2).flatten(0, 1)

    def within_frames(self, hidden: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        """CLIP's own layer, [N, T, H] as it comes."""
        return super().forward(hidden, attention_mask, **kwargs)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        return self.within_frames(self.over_time(hidden_states), attention_mask, **kwargs)


class TemporalTower(CLIPVisionModel):
    """CLIPVisionModel of the frames of videos [N, 3, S, S]; `frames` of each."""

    def __init__(self, config: Any, frames: int) -> None:
        super().__init__(config)
        self.frames = frames
        self.encoder.layers = nn.ModuleList(TemporalLayer(config, frames) for _ in range(config.num_hidden_layers))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TemporalLayer):
            nn.init.normal_(module.temporal_embedding, std=module.embed_dim**-0.5)


def run_frames_to_block(
    tower: TemporalTower, pixel_values: Tensor, selected: int, reads_attention: bool
) -> BlockStates:
    """As `run_to_block`, of frames [N, 3, S, S] of whole videos: score and keys are those of the attention within
    frames, after the block's step over time."""
    blocks: Any = tower.encoder.layers
    hidden = embed_patches(tower, pixel_values)
    for before in blocks[:selected]:
        hidden = before(hidden, None)
    block = blocks[selected]
    hidden = block.over_time(hidden)
    queries = keys = None
    if reads_attention:
        queries, keys = queries_and_keys(block, hidden, has_cls=True)
    return BlockStates(block.within_frames(hidden), queries, keys, block.self_attn.scale)
