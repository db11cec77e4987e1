"""Models at full size on fake tensors: their config, their modules, and the shapes and dtypes of their weights."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from shortzip.data.errors import UserError
from shortzip.reduction.reductions import Reductions
from shortzip.train.release.opening import model_classes
from shortzip.train.release.towers import towerless
from shortzip.train.step.objective import train_only_projector


def reduced(config: Any, reductions: Reductions) -> Any:
    """The config of the reduced model of a LLaVA's or LLaVA-NeXT's `config`."""
    config_class, _, _ = model_classes(config.model_type)
    return config_class.from_dict(config.to_dict() | reductions.as_config())


def fake_model(config: Any, dtype: torch.dtype, *, four_bit: bool, cached_features: bool) -> Any:
    """A reduced model as a run loads it, ready to be tuned. To be called under a FakeTensorMode.

    Args:
        config: of a reduced model.
        dtype: of all that is not trained.
        four_bit: the language model's layers in NF4.
        cached_features: without a tower.

    Raises UserError for 4 bits without bitsandbytes.
    """
    _, model_class, _ = model_classes(config.model_type)
    config._attn_implementation = "sdpa"
    with no_init_weights():
        model = (towerless(model_class) if cached_features else model_class)(config)
    if four_bit:
        quantise(model.model.language_model.layers, dtype)
    train_only_projector(model, dtype)
    return model


class FakeLinear4bit(nn.Module):
    """bitsandbytes' Linear4bit, whose class of parameters takes no fake tensors: the same product, forward and back.

    NF4 with double quantisation: 4 bits per weight, 8 per block of 64 and 32 per 256 blocks.
    """

    def __init__(self, plain: nn.Linear, dtype: torch.dtype) -> None:
        from bitsandbytes.functional import QuantState

        super().__init__()
        count = plain.weight.numel()
        blocks = -(-count // 64)
        nested = QuantState(
            absmax=torch.zeros(-(-blocks // 256)), blocksize=256, code=torch.zeros(256), dtype=torch.float32
        )
        self.quant_state = QuantState(
            absmax=torch.zeros(blocks, dtype=torch.uint8), shape=plain.weight.shape, code=torch.zeros(16),
            blocksize=64, quant_type="nf4", dtype=dtype, offset=torch.zeros(()), state2=nested,
        )  # fmt: skip
        packed = torch.zeros(-(-count // 2), 1, dtype=torch.uint8)
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), plain.bias

    def forward(self, states: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        return matmul_4bit(states, self.weight, bias=self.bias, quant_state=self.quant_state)

    @property
    def beside(self) -> tuple[Tensor, ...]:
        """What is stored beside the weight."""
        state = self.quant_state
        return state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code


def quantise(layers: nn.Module, dtype: torch.dtype) -> None:
    """Puts 4-bit modules in the place of all linear ones."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("4 bits: bitsandbytes is not installed: pip install 'shortzip[4bit]'")
    for name, module in list(layers.named_modules()):
        if type(module) is nn.Linear:
            layers.set_submodule(name, FakeLinear4bit(module, dtype))
