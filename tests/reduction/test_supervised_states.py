"""Hidden states at supervised positions: what a plain pass gives there, with the same gradient, and less work."""

from typing import Any

import pytest
import torch
from reduced_models import DECODERS, IMAGE_TOKEN, REDUCTIONS, VISIONZIP, build, make_batch, make_row
from torch import Tensor, nn

from shortzip.reduction.shortv import freeze_visual_tokens
from shortzip.train.step.activations import needed_activation_bytes
from shortzip.train.step.places import needed_tokens, place_tokens, shared_beginning
from shortzip.train.step.supervised_states import can_walk, compute_fixed_text, supervised_states

LAYOUTS = {
    "one image": ["tttItttttt", "tttIttt", "tttItttt"],
    "image at the start": ["Ittttt", "Ittttttttt"],
    "image elsewhere": ["tttItttt", "ttttttItttt", "tItttttttt"],
    "several images": ["tttIttItt", "tttIIttttttt", "tttItt"],
    "text only": ["tttttt", "ttttttttt"],
}


def make_labels(batch: dict[str, Tensor], after: int = 3) -> Tensor:
    """Supervises some of each row's last text tokens, not always the very last one."""
    labels = torch.full_like(batch["input_ids"], -100)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        places = mask.nonzero().flatten()[-after - row % 2 :]
        chosen = places[: len(places) - row % 2]
        chosen = chosen[batch["input_ids"][row, chosen] != IMAGE_TOKEN]
        labels[row, chosen] = batch["input_ids"][row, chosen]
    return labels


def with_same_beginning(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    batch["input_ids"][:, :count] = batch["input_ids"][0, :count].clone()
    return batch


def plain(model: Any, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    return model.model(**batch, use_cache=False).last_hidden_state[:, :-1][labels[:, 1:] != -100]


def needed(model: Any, batch: dict[str, Tensor], labels: Tensor, shared: bool, checkpointing: bool = False) -> Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    count = shared_beginning(ids, needed_tokens(mask, labels), labels, IMAGE_TOKEN) if shared else 0
    decoder = model.model.language_model
    fixed = compute_fixed_text(decoder, ids[0, :count]) if count else None
    visual = None
    if "pixel_values" in batch:
        visual = torch.cat(list(model.model.get_image_features(batch["pixel_values"]).pooler_output))
        visual = visual[(needed_tokens(mask, labels))[ids == IMAGE_TOKEN]]
    places = place_tokens(ids, mask, labels, IMAGE_TOKEN, count)
    return supervised_states(decoder, visual, places, fixed, checkpointing)


def states_and_gradient(model: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)
    if states.requires_grad:
        (states * weights).sum().backward()
    found = [p.grad.flatten() for p in model.model.multi_modal_projector.parameters() if p.grad is not None]
    return states.detach(), torch.cat(found) if found else torch.zeros(())


def projector_only(**options: Any) -> Any:
    model = build(**options)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def batch_of(model: Any, layout: str, side: str = "right") -> dict[str, Tensor]:
    rows = [make_row(model, parts, seed) for seed, parts in enumerate(LAYOUTS[layout])]
    return with_same_beginning(make_batch(rows, side), 3) if layout == "one image" else make_batch(rows, side)


def assert_equal_to_plain(model: Any, batch: dict[str, Tensor], labels: Tensor, **options: Any) -> None:
    expected, expected_gradient = states_and_gradient(model, plain(model, batch, labels))
    found, gradient = states_and_gradient(model, needed(model, batch, labels, **options))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    scale = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5 * scale)
    assert scale > 0.1 or "pixel_values" not in batch


@pytest.mark.parametrize("shared", [False, True], ids=["own beginning", "shared beginning"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_states_and_gradients_equal_a_plain_pass(reduction: str, layout: str, shared: bool) -> None:
    model = projector_only(reduction=reduction)
    batch = batch_of(model, layout)
    assert_equal_to_plain(model, batch, make_labels(batch), shared=shared)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_and_attention(decoder: str, attention: str) -> None:
    model = projector_only(decoder=decoder, attention=attention)
    assert can_walk(model.model.language_model)
    batch = batch_of(model, "one image")
    assert_equal_to_plain(model, batch, make_labels(batch), shared=True)


@pytest.mark.parametrize("reduction", ["visionzip", "both"])
def test_padding_on_the_left(reduction: str) -> None:
    model = projector_only(reduction=reduction)
    batch = batch_of(model, "several images", "left")
    assert_equal_to_plain(model, batch, make_labels(batch), shared=False)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_checkpointing_changes_nothing(reduction: str) -> None:
    model = projector_only(reduction=reduction)
    batch = batch_of(model, "one image")
    assert_equal_to_plain(model, batch, make_labels(batch), shared=True, checkpointing=True)


@pytest.mark.parametrize("layers", [[0], [3], [0, 1, 2, 3], [1, 2]])
def test_any_frozen_layers(layers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REDUCTIONS, "chosen", {"visionzip": VISIONZIP, "shortv": {"layers": layers}})
    model = projector_only(reduction="chosen")
    batch = batch_of(model, "one image")
    assert_equal_to_plain(model, batch, make_labels(batch), shared=True)


@pytest.mark.parametrize("reduction", ["visionzip", "both"])
def test_a_visual_token_may_predict_and_an_answer_may_come_first(reduction: str) -> None:
    model = projector_only(reduction=reduction)
    batch = batch_of(model, "several images")
    labels = torch.full_like(batch["input_ids"], -100)
    real_text = batch["attention_mask"].bool() & (batch["input_ids"] != IMAGE_TOKEN)
    labels[real_text] = batch["input_ids"][real_text]  # plain supervision: every text token
    labels[2] = -100
    labels[2, 1:3] = batch["input_ids"][2, 1:3]  # before the image, which is then not needed
    rows = torch.tensor([0, 1])
    assert_equal_to_plain(model, {**batch}, labels, shared=True)
    places = place_tokens(batch["input_ids"][rows], batch["attention_mask"][rows], labels[rows], IMAGE_TOKEN)
    assert bool((places.packed_ends < places.visual_count).any())


def test_empty_slots_that_no_window_reaches_leave_gradients_finite() -> None:
    model = projector_only(decoder="mistral-window", reduction="both")
    batch = make_batch([make_row(model, "IItttttttttttt", 1), make_row(model, "Ittttttt", 2)], "right")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 12:14] = batch["input_ids"][0, 12:14]  # the rest of this long row is not computed
    labels[1, 12:13] = batch["input_ids"][1, 12:13]
    assert_equal_to_plain(model, batch, labels, shared=False)


def test_only_what_is_needed_is_computed() -> None:
    model = projector_only(reduction="both")
    batch = batch_of(model, "one image")
    labels = make_labels(batch)
    decoder = model.model.language_model
    tokens: dict[str, list[int]] = {"q_proj": [], "k_proj": [], "gate_proj": []}
    for layer in decoder.layers:
        for name, module in (*layer.self_attn.named_children(), *layer.mlp.named_children()):
            if name in tokens:
                module.register_forward_hook(lambda _m, args, _o, name=name: tokens[name].append(args[0].shape[0]))
    fixed = compute_fixed_text(decoder, batch["input_ids"][0, :3])
    assert [sizes.copy() for sizes in tokens.values()] == [[3] * 4] * 3
    for sizes in tokens.values():
        sizes.clear()
    places = place_tokens(batch["input_ids"], batch["attention_mask"], labels, IMAGE_TOKEN, 3)
    visual = torch.cat(list(model.model.get_image_features(batch["pixel_values"]).pooler_output))
    supervised_states(decoder, visual, places, fixed)
    # After the image stand 6, 3 and 4 tokens; the last one of a row is only predicted, and row 1 ends one earlier.
    text, supervised = 5 + 1 + 3, int((labels != -100).sum())
    assert tokens["k_proj"] == [18 + text] * 4
    assert tokens["q_proj"] == tokens["gate_proj"] == [text, 18 + text, text, supervised]  # layers 0, 2, 3 are frozen


def test_a_beginning_is_shared_up_to_what_rows_have_alike() -> None:
    ids = torch.tensor([[5, 6, 7, IMAGE_TOKEN, 8, 9], [5, 6, 8, IMAGE_TOKEN, 8, 9]])
    labels = torch.full_like(ids, -100)
    labels[:, 5] = 9
    mask = torch.ones_like(ids)
    assert shared_beginning(ids, needed_tokens(mask, labels), labels, IMAGE_TOKEN) == 2
    assert shared_beginning(ids[:1], needed_tokens(mask, labels)[:1], labels[:1], IMAGE_TOKEN) == 3
    labels[0, 2] = 7  # predicted from place 1, which therefore has to be computed
    assert shared_beginning(ids, needed_tokens(mask, labels), labels, IMAGE_TOKEN) == 1


def test_a_prediction_from_padding_is_refused() -> None:
    ids = torch.tensor([[0, 5, 6]])
    with pytest.raises(ValueError, match="1 of them predicted from padding"):
        place_tokens(ids, torch.tensor([[0, 1, 1]]), torch.tensor([[-100, 5, 6]]), IMAGE_TOKEN)


def test_decoders_that_cannot_be_walked() -> None:
    model = projector_only()
    model.model.language_model.layers[1].mlp.gate_proj.weight.requires_grad_(True)
    assert not can_walk(model.model.language_model)
    model = projector_only()
    model.model.language_model.layers[2] = nn.Identity()
    assert not can_walk(model.model.language_model)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_keeps_what_the_memory_estimate_counts(frozen: bool) -> None:
    def kept(layers: int) -> int:
        model = projector_only(decoder="llama-mha", reduction="visionzip")
        del model.model.language_model.layers[layers:]
        if frozen:
            freeze_visual_tokens(model.model.language_model, list(range(layers)))
        model.requires_grad_(False)
        batch = make_batch([make_row(model, "tItttttttt", 1)], "right")
        labels = torch.full_like(batch["input_ids"], -100)
        labels[0, -4:] = 5
        places = place_tokens(batch["input_ids"], batch["attention_mask"], labels, IMAGE_TOKEN)
        visual = torch.randn(6, 32, requires_grad=True)
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        sizes: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own and tensor.is_floating_point():
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            states = supervised_states(model.model.language_model, visual, places)
            assert states.requires_grad
            return sum(storage.nbytes() for storage in sizes.values())

    text = projector_only(decoder="llama-mha").config.text_config
    expected = needed_activation_bytes(text, 8 if frozen else 14, 14, 4)
    if frozen:
        expected -= 6 * 32 * 4  # the visual tokens' hidden states, kept by the layer before
    assert kept(4) - kept(3) == expected


def test_less_is_kept_for_the_backward_pass() -> None:
    model = projector_only(reduction="both")
    batch = batch_of(model, "one image")
    labels = make_labels(batch)

    def kept(run: Any) -> int:
        sizes: dict[int, int] = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = run()
            total = sum(sizes.values())
        del output
        return total

    assert kept(lambda: needed(model, batch, labels, True)) < 0.6 * kept(lambda: plain(model, batch, labels))
