"""Measures how much faster layer contribution (LC) is than the naive loop, beside the limit, in one process.

    python scripts/benchmarks/lc.py

The naive loop runs the language model once as it is and once per layer with the visual tokens frozen in that layer:
L + 1 passes through L layers. Let C(q, k) be the cost of a plain layer for q tokens that attend to k, F that of a
frozen layer, E that of the last layer when only the last token is read (keys and values of all, one query), n the
tokens of a prompt, p of them before the image. Per prompt:

    naive   = L C(n, n) + L ((L - 1) C(n, n) + F)
    shared  = L (L + 1) / 2 C(n, n)                      the layers below the tested one computed once
    shared' = L (L + 1) / 2 C(n - p, n)                  and the text before the image, once for all prompts
    limit   = L (L - 1) / 2 C(n - p, n) + L E + P / N    and only the last token in the last layer; this is computed

with P = L C(p, p) for the N prompts together. naive / shared is just under 2: a variant's tested layer costs nothing,
but a frozen layer is cheap in the naive loop too. The measured speed-up is held against naive / limit.
FLOPs are those of `shortzip.reduction.flops.llm_layer_flops_grouped`, the LM head added on both sides. The vision
tower is in
neither: both sides start from the same embeddings. The naive loop is given its best batch size (one prompt, or as many
as the other side), rounds alternate, and the fastest round of each counts (on a CPU in the process's own time).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from shortzip.data.files import refuse_to_replace
from shortzip.reduction import ReducedLlavaConfig, ReducedLlavaForConditionalGeneration
from shortzip.reduction.calibration_prompts import EmbeddedPrompt
from shortzip.reduction.flops import llm_layer_flops_grouped, lm_head_flops
from shortzip.reduction.layer_contribution import DIRECTIONS, LayerContributionMeter
from shortzip.reduction.shortv import active_rows
from shortzip.scripts.benchmarks.timing import write_figures
from shortzip.train.settings.command_line import parse_config, run_command


@dataclass
class LcBenchmarkConfig:
    """What `scripts/benchmarks/lc.py` takes. The model has random weights of the given sizes."""

    hidden_size: int = 384
    """Width of the language model."""
    intermediate_size: int = 1032
    """Width of its FFN."""
    num_hidden_layers: int = 12
    """Its layers."""
    num_attention_heads: int = 6
    """Its heads."""
    vocab_size: int = 2000
    """Its vocabulary."""
    text_before: int = 35
    """Text tokens before the image (35 with the real tokenizer)."""
    visual_tokens: int = 64
    """Visual tokens."""
    text_after: int = 29
    """Text tokens after the image (64 in all, as in the papers)."""
    prompts: int = 4
    """Prompts measured."""
    rounds: int = 3
    """Rounds of each side; the fastest counts."""
    tokens_per_pass: int | None = None
    """How many tokens go through a layer at once. Default: 1024 on a CPU, else 8192."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    text_tokens: bool = False
    """Measure LC of the text tokens too, on both sides."""
    output: Path | None = None
    """A JSON file to write the figures to."""
    overwrite: bool = False
    """Replace the file that is there already."""


def build_models(settings: LcBenchmarkConfig) -> list[ReducedLlavaForConditionalGeneration]:
    """The model as it is, then one with visual tokens frozen in each layer; all share the first one's weights."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=settings.num_attention_heads,
        initializer_range=0.05,
    )
    tower = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    models: list[ReducedLlavaForConditionalGeneration] = []
    for layer in [None, *range(settings.num_hidden_layers)]:
        shortv = None if layer is None else {"layers": [layer]}
        config = ReducedLlavaConfig(text_config=text, vision_config=tower, image_token_index=1, shortv=shortv)
        model = ReducedLlavaForConditionalGeneration(config).eval()
        model.to(settings.device, getattr(torch, settings.dtype))
        if models:
            model.load_state_dict(models[0].state_dict(), assign=True)
        models.append(model)
    return models


@torch.no_grad()
def naive_layer_contributions(
    models: list[ReducedLlavaForConditionalGeneration], prompts: list[EmbeddedPrompt], text_tokens: bool, batch: int
) -> tuple[Tensor, Tensor | None]:
    """LC by one forward pass per layer, `batch` prompts of equal length at a time: [N, 2, L] for visual tokens, and
    for text tokens when asked for."""

    def log_probabilities(model: ReducedLlavaForConditionalGeneration, embeds: Tensor, frozen: Tensor) -> Tensor:
        decoder = model.model.language_model
        hidden = decoder(inputs_embeds=embeds, use_cache=False, active_rows=active_rows(frozen)).last_hidden_state
        weight = model.lm_head.weight.float()
        return (hidden[:, -1].float() @ weight.T).double().log_softmax(dim=-1).cpu()

    results: list[list[Tensor]] = [[], []]
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        embeds = torch.stack([prompt.embeds for prompt in chunk])
        visual = torch.stack([prompt.visual for prompt in chunk])
        full = log_probabilities(models[0], embeds, visual)
        for kind, frozen in enumerate([visual, ~visual] if text_tokens else [visual]):
            per_layer = []
            for model in models[1:]:
                variant = log_probabilities(model, embeds, frozen)
                pairs = [(full, variant), (variant, full)]
                per_layer.append(torch.stack([(p.exp() * (p - q)).sum(-1) for p, q in pairs], dim=1))
            results[kind].append(torch.stack(per_layer, dim=2))
    return torch.cat(results[0]), torch.cat(results[1]) if text_tokens else None


def limits(settings: LcBenchmarkConfig, text_config: Any) -> dict[str, float]:
    """The speed-ups that sharing allows (module docstring), by FLOPs: layers alone, with the text before the image,
    and all that is done."""
    depth, kinds = settings.num_hidden_layers, 2 if settings.text_tokens else 1
    before, visual, after = settings.text_before, settings.visual_tokens, settings.text_after
    total, rest = before + visual + after, visual + after

    def cost(queries: int, keys: int, attended: int) -> int:
        return sum(llm_layer_flops_grouped(text_config, queries, keys, attended))

    plain, head = cost(total, total, total), lm_head_flops(text_config, 1)
    frozen = [cost(before + after, total, total), cost(visual, total, total)][:kinds]
    naive = depth * plain + head + sum(depth * ((depth - 1) * plain + part + head) for part in frozen)
    # Rows that go through layer j: the full model, and of each kind the variants of lower layers.
    rows = [1 + kinds * layer for layer in range(depth)]
    heads = (1 + kinds * depth) * head
    # Of the text before the image, variants with frozen text are rows too, once for all prompts.
    beginning = sum((1 + (kinds - 1) * layer) * cost(before, before, before) for layer in range(depth))
    following = sum(rows[:-1]) * cost(rest, rest, total) + rows[-1] * cost(1, rest, total)
    return {
        "layers": naive / (sum(rows) * plain + heads),
        "layers and text before the image": naive / (sum(rows) * cost(rest, rest, total) + heads),
        "limit": naive / (following + beginning / settings.prompts + heads),
    }


def benchmark(settings: LcBenchmarkConfig) -> dict[str, Any]:
    """Times both sides; raises RuntimeError when their results differ."""
    models = build_models(settings)
    prompts = draw_prompts(settings, models[0].get_input_embeddings())

    def shared() -> tuple[Tensor, Tensor | None]:
        meter = LayerContributionMeter(
            models[0].model.language_model,
            models[0].lm_head,
            text_tokens=settings.text_tokens,
            tokens_per_pass=settings.tokens_per_pass,
        )
        contributions = meter.measure(prompts)
        return contributions.visual, contributions.text

    sides: dict[str, Callable[[], tuple[Tensor, Tensor | None]]] = {
        "naive, one prompt at a time": lambda: naive_layer_contributions(models, prompts, settings.text_tokens, 1),
        "naive, all prompts at once": lambda: naive_layer_contributions(
            models, prompts, settings.text_tokens, len(prompts)
        ),
        "shared": shared,
    }
    results = {name: run() for name, run in sides.items()}  # also the warm-up
    difference = relative_difference(results["naive, one prompt at a time"], results["shared"])
    if settings.dtype == "float32" and difference > 1e-3:
        raise RuntimeError(f"LC differs from the naive loop's by {difference:.2g} relative.")
    seconds = fastest(sides, settings)
    naive = min(seconds[name] for name in sides if name != "shared")
    speed_up, bounds = naive / seconds["shared"], limits(settings, models[0].config.text_config)
    return {
        "directions": list(DIRECTIONS),
        "relative_difference": difference,
        "seconds": seconds,
        "limits": bounds,
        "speed_up": speed_up,
        "share_of_limit": speed_up / bounds["limit"],
    }


def draw_prompts(settings: LcBenchmarkConfig, embed: Any) -> list[EmbeddedPrompt]:
    """Random prompts that begin with the same text."""
    length = settings.text_before + settings.visual_tokens + settings.text_after
    visual = torch.zeros(length, dtype=torch.bool, device=settings.device)
    visual[settings.text_before : settings.text_before + settings.visual_tokens] = True
    ids = torch.randint(2, settings.vocab_size, (settings.prompts, length), device=settings.device)
    ids[:, : settings.text_before] = ids[0, : settings.text_before].clone()
    with torch.no_grad():
        return [EmbeddedPrompt(embed(row), visual) for row in ids]


def relative_difference(expected: tuple[Tensor, Tensor | None], measured: tuple[Tensor, Tensor | None]) -> float:
    """The largest, over visual and text tokens."""
    difference = 0.0
    for right, ours in zip(expected, measured, strict=True):
        if right is not None and ours is not None:
            # Where LC is 0 (the last layer) there is rounding on one side only.
            difference = max(difference, float(((ours - right).abs() / right.clamp(min=1e-6)).max()))
    return difference


def fastest(sides: Mapping[str, Callable[[], Any]], settings: LcBenchmarkConfig) -> dict[str, float]:
    """Seconds of each side's fastest round."""
    # What else runs on a CPU would count in time on the clock.
    clock = time.process_time if settings.device == "cpu" else time.perf_counter
    seconds = dict.fromkeys(sides, float("inf"))
    for _ in range(settings.rounds):
        for name, run in sides.items():
            started = clock()
            run()
            if settings.device != "cpu":
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], clock() - started)
    return seconds


def main(argv: Sequence[str]) -> None:
    """Prints the table, and writes it to `output` when given."""
    settings = parse_config(LcBenchmarkConfig, argv, program="benchmark_lc.py")
    if settings.output is not None:
        refuse_to_replace(settings.output, overwrite=settings.overwrite)
    result = benchmark(settings)
    seconds, bounds = result["seconds"], result["limits"]
    print(
        f"LC of {settings.num_hidden_layers} layers, {settings.prompts} prompts; results agree to "
        f"{result['relative_difference']:.1e} relative"
    )
    for name, value in seconds.items():
        print(f"  {name:<32} {value:8.3f} s")
    for name, value in bounds.items():
        print(
            f"  limit by sharing {name:<32} {value:8.3f} x" if name != "limit" else f"  {'limit':<49} {value:8.3f} x"
        )
    print(f"  {'measured speed-up':<49} {result['speed_up']:8.3f} x  = {result['share_of_limit']:.0%} of the limit")
    if settings.output is not None:
        write_figures(settings.output, {"settings": asdict(settings), **result})


if __name__ == "__main__":
    run_command(main)
