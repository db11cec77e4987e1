"""The papers' figures, and estimates against what PyTorch really does."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from shortzip.reduction import flops
from shortzip.train.step import memory as training_cost
from shortzip.train.step.activations import layer_activation_bytes

SIZES_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
SIZES_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
SMALL = {"hidden_size": 64, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 4}
TOWER = {
    "hidden_size": 48,
    "intermediate_size": 90,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}


def small_llava() -> LlavaConfig:
    return LlavaConfig(text_config=LlamaConfig(vocab_size=300, **SMALL), vision_config=CLIPVisionConfig(**TOWER))


# ---------------------------------------------------------------------------------------------- the papers' figures


@pytest.mark.parametrize(
    ("sizes", "visual_tokens", "frozen", "plain_tflops", "frozen_tflops"),
    [
        pytest.param(SIZES_7B, 576, 19, 8.504, 4.694, id="llava-1.5-7b"),
        pytest.param(SIZES_13B, 576, 24, 16.576, 9.074, id="llava-1.5-13b"),
        pytest.param(SIZES_7B, 2880, 19, 42.675, 21.560, id="llava-next-7b"),
        pytest.param(SIZES_13B, 2880, 24, 81.806, 41.037, id="llava-next-13b"),
    ],
)
def test_shortv_published_flops(sizes, visual_tokens, frozen, plain_tflops, frozen_tflops):
    text = LlamaConfig(**sizes)
    assert round(flops.llm_prefill_flops(text, 64, visual_tokens) / 1e12, 3) == plain_tflops
    assert round(flops.llm_prefill_flops(text, 64, visual_tokens, frozen) / 1e12, 3) == frozen_tflops
    # Which layers are frozen does not matter, only how many.
    assert flops.llm_prefill_flops(text, 64, visual_tokens, range(frozen)) == flops.llm_prefill_flops(
        text, 64, visual_tokens, frozen
    )


def test_grouped_equals_the_papers_formula_without_groups_and_is_less_with():
    plain = LlamaConfig(**SIZES_7B)
    for frozen in (0, 19, 32):
        assert flops.llm_prefill_flops_grouped(plain, 64, 576, frozen) == flops.llm_prefill_flops(
            plain, 64, 576, frozen
        )
    grouped = MistralConfig(**SIZES_7B, num_key_value_heads=8)
    saved = flops.llm_prefill_flops(grouped, 64, 576) - flops.llm_prefill_flops_grouped(grouped, 64, 576)
    assert saved == 32 * 640 * 2 * 4096 * 2 * (4096 - 1024)


def test_prefill_flops_are_those_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    text = LlamaConfig(vocab_size=50, num_key_value_heads=2, attn_implementation="eager", **SMALL)
    model = LlamaForCausalLM(text)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model(inputs_embeds=torch.randn(1, 37, 64))
    rotary = 2 * 37 * 8  # some versions write the outer product of positions and frequencies as a matrix product
    assert counter.get_total_flops() - flops.llm_prefill_flops_grouped(text, 20, 17) in (0, rotary)


def test_tower_and_projector_flops_are_those_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = small_llava()
    config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.vision_tower(torch.randn(2, 3, 56, 56))
    config.vision_feature_layer = -1
    assert counter.get_total_flops() == flops.vision_tower_flops(config, tiles=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.multi_modal_projector(torch.randn(5, 48))
    assert counter.get_total_flops() == flops.projector_flops(config, 5)


@pytest.mark.parametrize(("layer", "blocks"), [(-2, 3), (-1, 4), (2, 2), ([-3, -1], 4)])
def test_tower_runs_to_the_selected_layer_only(layer, blocks):
    config = small_llava()
    config.vision_feature_layer = layer
    assert flops.tower_blocks_run(config) == blocks


def test_training_step_flops_against_pytorch():
    """Forward and backward of a LLaVA whose projector alone is trained, attention eager (its matrices counted)."""
    from torch.utils.flop_counter import FlopCounterMode

    config = small_llava()
    config.image_token_id = 299
    config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration(config).requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    ids = torch.cat([torch.full((1, 16), 299), torch.arange(21)[None]], dim=1)
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(input_ids=ids, pixel_values=torch.randn(1, 3, 56, 56), use_cache=False).last_hidden_state
        model.lm_head(hidden[:, 16:]).float().logsumexp(-1).mean().backward()
    step = training_cost.TrainingStep(
        text_tokens=21, visual_tokens=16, global_batch_size=1, micro_batch_size=1, gradient_checkpointing=False
    )
    config.vision_feature_layer = -1  # plain LLaVA runs the whole tower
    expected = training_cost.training_step_flops(config, step)
    assert counter.get_total_flops() == pytest.approx(expected, rel=2e-3)
    # One more forward through the layers, and nothing else, with gradient checkpointing.
    with_checkpointing = training_cost.TrainingStep(
        text_tokens=21, visual_tokens=16, global_batch_size=1, micro_batch_size=1
    )
    difference = training_cost.training_step_flops(config, with_checkpointing) - expected
    assert difference == flops.llm_prefill_flops_grouped(config.text_config, 21, 16)


# ---------------------------------------------------------------------------------------------- memory and counts


def test_kv_cache_bytes():
    # LLaVA-1.5-7B in bf16: 2 · 32 layers · 4096 · 2 bytes = 512 KiB a token; Mistral's groups quarter that.
    assert flops.kv_cache_bytes(LlamaConfig(**SIZES_7B), 640) == 640 * 512 * 1024
    assert flops.kv_cache_bytes(MistralConfig(**SIZES_7B, num_key_value_heads=8), 640) == 640 * 128 * 1024


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        LlamaConfig(vocab_size=300, **SMALL),
        LlamaConfig(vocab_size=300, num_key_value_heads=2, attention_bias=True, mlp_bias=True, **SMALL),
        MistralConfig(vocab_size=300, num_key_value_heads=2, head_dim=24, **SMALL),
        Qwen2Config(vocab_size=300, num_key_value_heads=2, **SMALL),
    ],
    ids=["llama", "llama-biases", "mistral", "qwen2"],
)
@pytest.mark.parametrize("tower", [CLIPVisionConfig(**TOWER), SiglipVisionConfig(**TOWER)], ids=["clip", "siglip"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_parameter_counts_are_the_models(family, tower, text, tied):
    config_class, model_class = {
        "llava": (LlavaConfig, LlavaForConditionalGeneration),
        "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    }[family]
    config = config_class(text_config=text, vision_config=tower, tie_word_embeddings=tied)
    with torch.device("meta"):
        model = model_class(config)
    counts = flops.parameter_counts(config)
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.vision_tower == sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
    assert counts.llm_layers == sum(parameter.numel() for parameter in model.model.language_model.layers.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_activations_are_what_autograd_keeps(dtype):
    def kept_bytes(num_layers: int) -> int:
        sizes = {**SMALL, "num_hidden_layers": num_layers}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **sizes)).to(dtype)
        model.requires_grad_(False)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            inputs = torch.randn(2, 50, 64, dtype=dtype, requires_grad=True)
            output = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            assert output.requires_grad
            return sum(storage.nbytes() for storage in storages.values())

    text = LlamaConfig(vocab_size=50, num_key_value_heads=2, **SMALL)
    expected = 2 * layer_activation_bytes(text, 50, 50, torch.finfo(dtype).bits // 8)
    assert kept_bytes(3) - kept_bytes(2) == expected


def test_memory_of_a_training_step_moves_as_it_must():
    config = LlavaConfig(text_config=LlamaConfig(**SIZES_7B), vision_config=CLIPVisionConfig())

    def memory(**changes):
        return training_cost.training_step_memory(
            config, training_cost.TrainingStep(**{"text_tokens": 512, "visual_tokens": 576, **changes})
        )

    full = memory()
    counts = flops.parameter_counts(config)
    assert full.weights == 2 * (counts.total - counts.projector)
    assert full.projector == 16 * counts.projector
    assert memory(visual_tokens=64).activations < full.activations
    assert memory(micro_batch_size=1).total < memory(micro_batch_size=2).total
    assert memory(global_batch_size=64) == full
    assert memory(gradient_checkpointing=False).total > full.total
    assert (
        memory(gradient_checkpointing=False, frozen_layers=19).activations
        < memory(gradient_checkpointing=False).activations
    )
    assert memory(weights="4bit").weights < 0.3 * full.weights
    assert memory(weights="float32").weights == 2 * full.weights


# ------------------------------------------------------------------------------------------------------ bad input


def test_visual_tokens_per_image_and_its_range():
    config = small_llava()
    assert flops.visual_tokens_per_image(config, None) == 16
    assert flops.visual_tokens_per_image(config, (5, 2), tiles=5) == 35
    assert flops.visual_tokens_per_image(config, (17, 0)) == 17
    for budget in [(16, 2), (0, 4), (3, -1)]:
        with pytest.raises(ValueError, match=r"at most 17 .*4x4 patches"):
            flops.visual_tokens_per_image(config, budget)
    with pytest.raises(ValueError, match="tiles=0"):
        flops.visual_tokens_per_image(config, None, tiles=0)
    siglip = LlavaConfig(text_config=LlamaConfig(**SMALL), vision_config=SiglipVisionConfig(**TOWER))
    with pytest.raises(ValueError, match="at most 16"):
        flops.visual_tokens_per_image(siglip, (17, 0))


@pytest.mark.parametrize(
    ("frozen", "message"),
    [(4, "has 3 layers"), (-1, "has 3 layers"), ([0, 3], "from 0 to 2"), ([1, 1], "distinct layers")],
)
def test_frozen_layers_that_are_not_there(frozen, message):
    with pytest.raises(ValueError, match=message):
        flops.llm_prefill_flops(LlamaConfig(**SMALL), 5, 5, frozen)
    with pytest.raises(ValueError, match=message):
        flops.llm_prefill_flops_grouped(LlamaConfig(**SMALL), 5, 5, frozen)


def test_refusals():
    with pytest.raises(ValueError, match="visual_tokens=-1"):
        flops.llm_prefill_flops(LlamaConfig(**SMALL), 5, -1)
    with pytest.raises(ValueError, match="tokens=-1"):
        flops.kv_cache_bytes(LlamaConfig(**SMALL), -1)
    with pytest.raises(ValueError, match="weights='int8'"):
        training_cost.TrainingStep(text_tokens=1, visual_tokens=1, weights="int8")
    with pytest.raises(ValueError, match="micro_batch_size=0"):
        training_cost.TrainingStep(text_tokens=1, visual_tokens=1, micro_batch_size=0)
    config = small_llava()
    config.text_config.model_type = "gemma"
    with pytest.raises(ValueError, match="'gemma'"):
        flops.parameter_counts(config)
