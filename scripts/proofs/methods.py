"""Every way of choosing visual tokens on the device, and LLaVA-NeXT's tiles."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig

from shortzip.reduction import ReducedLlavaNextConfig, ReducedLlavaNextForConditionalGeneration
from shortzip.reduction.parsing import parse_method
from shortzip.reduction.reductions import Reductions
from shortzip.reduction.selectors import BASELINES, SELECTORS, merges
from shortzip.scripts.proofs.section import Proof
from shortzip.scripts.proofs.subjects import BUDGET, FLOAT32, GRADIENT, Subject, Subjects, gap, on_both, scenes, small

# Every method with its parameters at their defaults, and those that take another path with other ones.
METHODS = (*SELECTORS, "divprune:space=projected", *BASELINES)
IMAGES = 4
IMAGE_TOKEN, SIDE, TILES = 3, 16, (3, 3)
SIZES = torch.tensor([[16, 32], [32, 16]])


def every_method(proof: Proof) -> None:
    """Kept patches and visual tokens of every method as on the CPU, and training's batch through each in bfloat16."""
    data = scenes(proof.settings.folder)
    cpu, device = on_both(proof, data)
    coarse = Subjects(data, proof.settings.device, torch.bfloat16)
    rows = []
    for words in METHODS:
        with proof.part(words):
            reductions = Reductions(budget_of(words))
            expected, found = (_chosen(subjects.reduced(reductions)) for subjects in (cpu, device))
            same = sum(torch.equal(a.cpu(), b) for a, b in zip(found.kept, expected.kept, strict=True))
            difference = gap(found.tokens, expected.tokens)
            holds = same == len(expected.kept) and difference <= FLOAT32
            proof.check(words, holds, f"{same} of {IMAGES} images as on the CPU, tokens differ by {small(difference)}")
            in_bf16 = _chosen(coarse.reduced(reductions))
            proof.check(f"{words}, bfloat16", bool(in_bf16.tokens.isfinite().all()), "not finite")
            shared = _shared(in_bf16.kept.cpu(), expected.kept)
            rows.append([words, f"{same} of {IMAGES}", small(difference), shared])
    headings = ["method", "images with the CPU's patches", "tokens: difference", "patches shared with bfloat16"]
    proof.table(f"{IMAGES} images, 16 of 144 tokens, against the CPU in float32", headings, rows)


def budget_of(words: str) -> dict[str, Any]:
    """16 visual tokens by the method that is named; 4 of them merged where it merges."""
    alone = {"dominant": 16, "contextual": 0, **parse_method(words)}
    return {**alone, **BUDGET} if merges(alone) else alone


@torch.no_grad()
def _chosen(subject: Subject) -> Any:
    pixels = subject.batch(IMAGES).inputs["pixel_values"][:IMAGES].to(subject.model.device, subject.model.dtype)
    return subject.model.model.get_visual_tokens(pixels)


def _shared(found: Tensor, expected: Tensor) -> str:
    if not expected.shape[1]:
        return "keeps none"
    pairs = zip(found.tolist(), expected.tolist(), strict=True)
    return f"{sum(len(set(a) & set(b)) for a, b in pairs) / expected.numel():.0%}"


def tiles(proof: Proof) -> None:
    """A small LLaVA-NeXT with random weights: logits, gradient and greedy answers of rows with one image each."""
    rows = []
    kinds: dict[str, dict[str, Any]] = {
        "all tokens": {},
        "VisionZip and ShortV": {"visionzip": {"dominant": 4, "contextual": 2}, "shortv": {"layers": [1, 2]}},
        "duet": {"visionzip": {"dominant": 4, "contextual": 2, "method": "duet"}},
        "scope, FastV": {
            "visionzip": {"dominant": 5, "contextual": 0, "method": "scope"},
            "fastv": {"layer": 1, "keep": 0.5},
        },
    }
    for name, keys in kinds.items():
        with proof.part(name):
            model = small_next(keys)
            inputs = rows_of_tiles(model)
            device = copy.deepcopy(model).to(proof.settings.device)
            expected, gradient, answer = _pass(model, inputs)
            found, slope, said = _pass(device, inputs)
            differences = gap(found, expected), gap(slope, gradient)
            same = torch.equal(answer, said.cpu())
            detail = f"logits {small(differences[0])}, gradient {small(differences[1])}"
            proof.check(name, differences[0] <= FLOAT32 and differences[1] <= GRADIENT, detail)
            proof.check(
                f"{name}, generated", torch.equal(answer, said.cpu()), f"{said.tolist()} for {answer.tolist()}"
            )
            rows.append([name, *map(small, differences), "yes" if same else "no"])
    proof.table(
        "LLaVA-NeXT of random weights, two images of three tiles, against the CPU in float32",
        ["reductions", "logits: difference", "gradient: difference", "same tokens generated"],
        rows,
    )


def small_next(keys: dict[str, Any]) -> Any:
    parts: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
            patch_size=4, initializer_range=0.5,
        ),
        "text_config": LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        ),
        "image_token_index": IMAGE_TOKEN, "image_grid_pinpoints": [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]],
        "attn_implementation": "sdpa", "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    model = ReducedLlavaNextForConditionalGeneration(ReducedLlavaNextConfig(**parts, **keys)).eval()
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(0, 0.3)
        model.lm_head.weight[IMAGE_TOKEN] = 0  # a model that writes placeholders by itself is not what is tried
    return model


@torch.no_grad()
def rows_of_tiles(model: Any) -> dict[str, Tensor]:
    """Two rows with an image each, one wide and one high, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, TILES[0], 3, SIDE, SIDE, generator=generator)
    counts = [len(image) for image in model.get_image_features(pixels, SIZES).pooler_output]
    rows = [[5, 6] + [IMAGE_TOKEN] * counts[0] + [7, 8, 9], [10] + [IMAGE_TOKEN] * counts[1] + [11]]
    length = max(map(len, rows))
    padded = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": padded, "attention_mask": mask, "pixel_values": pixels, "image_sizes": SIZES}


def _pass(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The last tokens' logits, the projector's gradient, and four tokens generated."""
    moved = {key: tensor.to(model.device) for key, tensor in inputs.items()}
    logits = model(**moved).logits[:, -1]
    logits.square().mean().backward()
    gradient = model.model.multi_modal_projector.linear_1.weight.grad
    with torch.no_grad():
        answer = model.generate(**moved, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, -4:]
    return logits, gradient, answer
