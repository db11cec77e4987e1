"""LC against the authors' numbers, against the naive loop, and what is computed only once."""

import json
from pathlib import Path

import pytest
import torch
from reduced_models import DECODERS, IMAGE_TOKEN, build, make_row, original
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from shortzip.reduction.calibration_prompts import CalibrationSample, EmbeddedPrompt, embed_prompt, plan_batches
from shortzip.reduction.layer_choice import pick_layers, rank_layers
from shortzip.reduction.layer_contribution import LayerContributionMeter, measure_layer_contributions
from shortzip.reduction.layer_cosine import cosine_changes

GOLDEN = Path(__file__).parents[1] / "golden" / "shortv"


def sample_of(row: dict[str, torch.Tensor]) -> CalibrationSample:
    return CalibrationSample(row["input_ids"][0], row["pixel_values"])


def naive_lc(model, sample: CalibrationSample, freeze_text: bool = False) -> torch.Tensor:
    """[2, L] by the definition: one run of the whole plain model per layer, after which one kind of token gets back
    what it had before that layer."""
    visual = (sample.input_ids == IMAGE_TOKEN)[None, :, None]
    frozen = ~visual if freeze_text else visual

    def log_probabilities() -> torch.Tensor:
        output = model(input_ids=sample.input_ids[None], pixel_values=sample.pixel_values)
        return output.logits[0, -1].double().log_softmax(-1)

    def restore(module, args, output):
        return torch.where(frozen, args[0], output)

    with torch.no_grad():
        full = log_probabilities()
        pairs = []
        for layer in model.model.language_model.layers:
            hook = layer.register_forward_hook(restore)
            variant = log_probabilities()
            hook.remove()
            pairs.append(
                torch.stack([(full.exp() * (full - variant)).sum(), (variant.exp() * (variant - full)).sum()])
            )
    return torch.stack(pairs, dim=1)


def assert_equal_lc(ours: torch.Tensor, expected: torch.Tensor) -> None:
    # Both are float32 through the layers: below 1e-5 nats the naive loop holds as much rounding as signal.
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------------------- parity


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def golden(request):
    facts = json.loads((GOLDEN / "shortv_mha.json").read_text())["variants"]["mha"]
    tensors = load_file(GOLDEN / "shortv_mha_io.safetensors")
    model = LlamaForCausalLM(LlamaConfig(**facts["config"], attn_implementation=request.param))
    model.load_state_dict(load_file(GOLDEN / "shortv_mha_weights.safetensors"))
    prompts = []
    for case in facts["lc"]:
        embeds = tensors[case["inputs_embeds"]].reshape(-1, facts["config"]["hidden_size"])
        visual = torch.zeros(len(embeds), dtype=torch.bool)
        visual[case["image_start"] : case["image_start"] + case["n_visual"]] = True
        assert len(embeds) == case["image_start"] + case["n_visual"] + case["text_after"]
        prompts.append(EmbeddedPrompt(embeds, visual))
    return facts, model, prompts


def test_authors_numbers(golden, record_property):
    facts, model, prompts = golden
    found = LayerContributionMeter(model.model, model.lm_head).measure(prompts)
    theirs = torch.tensor([case["lc_fp64"] for case in facts["lc"]], dtype=torch.float64)
    ours = found.visual[:, 1]  # their code's direction
    worst = float(((ours - theirs).abs() / theirs)[:, :-1].max())
    record_property("worst relative difference", worst)
    assert worst < 1e-3
    assert (found.visual[:, :, -1] == 0).all()
    mean = found.mean("frozen_to_full")
    assert rank_layers(mean) == facts["replaced_layers_order"]
    # Their float32 mean is itself 1.2e-3 off their float64 one in layer 6, so it is no yardstick for 1e-3.
    torch.testing.assert_close(mean[:-1], theirs.mean(dim=0).tolist()[:-1], rtol=1e-3, atol=0)
    # The paper's direction is another number.
    assert float(((found.visual[:, 0] - theirs).abs() / theirs)[:, 0].min()) > 1e-3


# ------------------------------------------------------------------------------------------------- the naive loop

LAYOUTS = ["tttIttt", "tttIt", "Itt", "ttItIt", "ttI"]


@pytest.mark.parametrize(
    ("decoder", "attention"),
    [*((decoder, "sdpa") for decoder in DECODERS), ("llama", "eager"), ("qwen2-window", "eager")],
)
def test_naive_loop(decoder, attention):
    model = build(decoder, reduction="none", attention=attention)
    plain = build(decoder, attention=attention, plain=True)
    # One seed: the first two begin with the same text, and go through the model in the other order.
    samples = [sample_of(make_row(model, layout, seed=0)) for layout in LAYOUTS]
    found = measure_layer_contributions(model, samples, text_tokens=True, samples_per_batch=3)
    for index, sample in enumerate(samples):
        assert_equal_lc(found.visual[index], naive_lc(plain, sample))
        assert_equal_lc(found.text[index], naive_lc(plain, sample, freeze_text=True))
    assert found.visual[:, :, 0].min() > 1e-4  # there was something to measure


@pytest.mark.parametrize("method", ["visionzip", "pool"])
def test_with_original_positions(method):
    model = original(method)
    samples = [sample_of(make_row(model, layout, seed=0)) for layout in ["tttIttt", "tttIt", "ttItIt"]]
    found = measure_layer_contributions(model, samples, text_tokens=True, samples_per_batch=3, tokens_per_pass=30)
    for index, sample in enumerate(samples):
        assert_equal_lc(found.visual[index], naive_lc(model, sample))
        assert_equal_lc(found.text[index], naive_lc(model, sample, freeze_text=True))


def test_cosines_with_original_positions():
    model = original()
    row, seen = make_row(model, "tttItItt"), []
    visual = row["input_ids"][0] == IMAGE_TOKEN
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(lambda _, given, output: seen.append((given[0][0, visual], output[0, visual])))
    with torch.no_grad():
        model(**row)
    expected = [1 - torch.nn.functional.cosine_similarity(*pair, dim=-1).mean().item() for pair in seen]
    (found,) = cosine_changes(model, [sample_of(row)])
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("tokens_per_pass", [1, 60, 100_000])
@pytest.mark.parametrize("samples_per_batch", [1, 4])
def test_batch_sizes_do_not_matter(samples_per_batch, tokens_per_pass):
    model = build("llama", reduction="visionzip")
    samples = [sample_of(make_row(model, "ttt" + "I" + "t" * number, seed=7)) for number in range(1, 7)]
    expected = measure_layer_contributions(model, samples, text_tokens=True, samples_per_batch=2)
    found = measure_layer_contributions(
        model, samples, text_tokens=True, samples_per_batch=samples_per_batch, tokens_per_pass=tokens_per_pass
    )
    assert_equal_lc(found.visual, expected.visual)
    assert_equal_lc(found.text, expected.text)


def test_under_visionzip_it_is_what_the_budget_leaves():
    full, reduced = build("llama", reduction="none"), build("llama", reduction="visionzip")
    samples = [sample_of(make_row(model, "ttIttt")) for model in (full, reduced)]
    assert len(samples[1].input_ids) < len(samples[0].input_ids)
    visual = [
        measure_layer_contributions(model, [sample]).visual
        for model, sample in zip((full, reduced), samples, strict=True)
    ]
    assert not torch.allclose(visual[0], visual[1], rtol=0.05)


def test_frozen_layers_of_the_model_count_as_plain_ones():
    plain, frozen = build("llama", reduction="visionzip"), build("llama", reduction="both")
    sample = sample_of(make_row(plain, "ttIttt"))
    expected = measure_layer_contributions(plain, [sample], text_tokens=True)
    found = measure_layer_contributions(frozen, [sample], text_tokens=True)
    assert torch.equal(found.visual, expected.visual)
    assert torch.equal(found.text, expected.text)


def test_llava_next():
    model, plain = build(reduction="none", next_=True), build(plain=True, next_=True)
    sizes = torch.tensor([[16, 30]])
    pixels = torch.randn(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = len(plain.model.get_image_features(pixel_values=pixels, image_sizes=sizes).pooler_output[0])
    ids = torch.tensor([5, 6, *[IMAGE_TOKEN] * tokens, 7, 8])
    found = measure_layer_contributions(model, [CalibrationSample(ids, pixels, sizes)]).visual[0]

    class WithSizes:
        model = plain.model

        def __call__(self, **inputs):
            return plain(image_sizes=sizes, **inputs)

    assert_equal_lc(found, naive_lc(WithSizes(), CalibrationSample(ids, pixels, sizes)))


# ------------------------------------------------------------------------------------------------- shared work


class LayerTokens:
    """Counts the tokens that every layer of a decoder computes."""

    def __init__(self, decoder):
        self.counts = [0] * len(decoder.layers)
        for index, layer in enumerate(decoder.layers):
            # The key projection runs for every token that a layer computes, whole or in part.
            layer.self_attn.k_proj.register_forward_hook(self._count(index))

    def _count(self, index):
        def hook(module, args, output):
            self.counts[index] += output.shape[0] * output.shape[1]

        return hook


def test_layers_below_and_text_before_the_image_are_computed_once():
    model = build("llama", reduction="none")
    counter = LayerTokens(model.model.language_model)
    samples = [sample_of(make_row(model, "ttttt" + "I" + "ttt", seed=3)) for _ in range(4)]
    measure_layer_contributions(model, samples, samples_per_batch=2)
    after = 16 + 3
    assert counter.counts == [5 + 4 * after * (1 + layer) for layer in range(4)]


def test_text_variants_share_the_text_before_the_image_too():
    model = build("llama", reduction="none")
    counter = LayerTokens(model.model.language_model)
    samples = [sample_of(make_row(model, "ttttt" + "I" + "ttt", seed=3)) for _ in range(4)]
    measure_layer_contributions(model, samples, text_tokens=True, samples_per_batch=2)
    after = 16 + 3
    assert counter.counts == [5 * (1 + layer) + 4 * after * (1 + 2 * layer) for layer in range(4)]


def test_last_layer_computes_the_last_token_only():
    model = build("llama", reduction="none")
    queries = []
    last = model.model.language_model.layers[-1].self_attn.q_proj
    last.register_forward_hook(lambda module, args, output: queries.append(output.shape[:2]))
    sample = sample_of(make_row(model, "Ittt"))
    measure_layer_contributions(model, [sample])
    assert queries == [(4, 1)]


def test_runs_out_of_memory_and_goes_on_with_fewer_rows():
    model = build("llama", reduction="none")
    samples = [sample_of(make_row(model, "ttItt", seed=3)) for _ in range(3)]
    expected = measure_layer_contributions(model, samples, text_tokens=True)
    rows = []

    def refuse(module, args):
        rows.append(args[0].shape[0])
        if args[0].shape[0] > 2:
            raise torch.OutOfMemoryError("no more")

    model.model.language_model.layers[1].register_forward_pre_hook(refuse)
    found = measure_layer_contributions(model, samples, text_tokens=True, tokens_per_pass=1000)
    assert max(rows) > 2
    assert_equal_lc(found.visual, expected.visual)
    assert_equal_lc(found.text, expected.text)

    model.model.language_model.layers[1].register_forward_pre_hook(
        lambda module, args: (_ for _ in ()).throw(torch.OutOfMemoryError("never"))
    )
    with pytest.raises(torch.OutOfMemoryError, match="never"):
        measure_layer_contributions(model, samples)


def test_training_mode_and_checkpointing_come_back():
    model = build("llama", reduction="none")
    sample = sample_of(make_row(model, "ttItt"))
    expected = measure_layer_contributions(model, [sample])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = model.model.language_model.layers
    for layer in layers:
        layer.training = True
    found = measure_layer_contributions(model, [sample])
    assert torch.equal(found.visual, expected.visual)
    assert all(layer.training for layer in layers)
    assert not any(layer.mlp.training for layer in layers)


def test_head_and_softmax_are_float32_in_a_bfloat16_model():
    model = build("llama", reduction="none", dtype=torch.bfloat16)
    meter = LayerContributionMeter(model.model.language_model, model.lm_head)
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    normed = hidden.double() / (hidden.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = (normed @ model.lm_head.weight.double().T).log_softmax(-1)
    torch.testing.assert_close(meter._log_probabilities(hidden), expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- plans and choices


def test_plan_batches():
    def prompt(before, after):
        return torch.tensor([*before, IMAGE_TOKEN, IMAGE_TOKEN, *range(1, after + 1)])

    prompts = [prompt([1, 2], 5), prompt([1, 3], 1), prompt([1, 2], 2), prompt([1, 2], 9), prompt([1, 3], 1)]
    assert plan_batches(prompts, IMAGE_TOKEN, 2) == [[2, 0], [3], [1, 4]]
    assert plan_batches(prompts, IMAGE_TOKEN, 100) == [[2, 0, 3], [1, 4]]
    with pytest.raises(ValueError, match="sample 1 has no placeholder"):
        plan_batches([prompts[0], torch.tensor([1, 2])], IMAGE_TOKEN, 2)
    with pytest.raises(ValueError, match="at least one prompt"):
        plan_batches([], IMAGE_TOKEN, 2)
    with pytest.raises(ValueError, match="samples_per_batch=0"):
        plan_batches(prompts, IMAGE_TOKEN, 0)


def test_ranking_and_choice():
    assert rank_layers([0.5, 0.0, 0.2, 0.0]) == [3, 1, 2, 0]
    ranking = [3, 1, 2, 0, 4]
    assert pick_layers(ranking, 2) == pick_layers(ranking, "2") == pick_layers(ranking, 0.4) == [3, 1]
    assert pick_layers(ranking, "60%") == pick_layers(ranking, 0.6) == [3, 1, 2]
    assert pick_layers(ranking, "0,4") == [0, 4]
    assert pick_layers(ranking, 0) == []
    for bad in (6, -1, "6", 1.5, -0.1):
        with pytest.raises(ValueError, match="freeze"):
            pick_layers(ranking, bad)


# ------------------------------------------------------------------------------------------------- bad input


def test_refusals():
    model = build("llama", reduction="visionzip")
    decoder, head = model.model.language_model, model.lm_head
    row = make_row(model, "ttItt")
    with pytest.raises(ValueError, match=r"7 placeholders, but its images give 6 visual tokens"):
        embed_prompt(
            model,
            CalibrationSample(torch.cat([row["input_ids"][0], torch.tensor([IMAGE_TOKEN])]), row["pixel_values"]),
        )
    prompt = embed_prompt(model, sample_of(row))
    with pytest.raises(ValueError, match="prompt 1 has no visual tokens"):
        LayerContributionMeter(decoder, head).measure(
            [prompt, EmbeddedPrompt(prompt.embeds, torch.zeros_like(prompt.visual))]
        )
    with pytest.raises(ValueError, match="tokens_per_pass=0"):
        LayerContributionMeter(decoder, head, tokens_per_pass=0)
    decoder.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention'"):
        LayerContributionMeter(decoder, head)
    decoder.layers[2] = torch.nn.Identity()
    with pytest.raises(ValueError, match="type Identity"):
        LayerContributionMeter(decoder, head)
