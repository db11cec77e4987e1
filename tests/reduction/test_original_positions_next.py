"""`positions: original` in LLaVA-NeXT: the places of its plain packed sequence, without padding, with newlines."""

from typing import Any

import pytest
import torch
from reduced_models import IMAGE_TOKEN, NEXT_SIZES, PAD, build, images, original
from torch import Tensor

PATCHES, SIDE = 16, 4
WAYS = ("visionzip", "random", "pool")


def packed_by_plain(plain: Any, size: list[int], tiles: int) -> list[int]:
    """What stands where in plain LLaVA-NeXT: tile * PATCHES + patch, -1 for a newline."""
    numbers = torch.arange(tiles * PATCHES, dtype=torch.float32).view(tiles, PATCHES, 1)
    (packed,), _ = plain.model.pack_image_features([numbers], [size], "default", torch.tensor([-1.0]))
    found: list[int] = packed[:, 0].long().tolist()
    return found


def expected_places(model: Any, plain: Any, pixels: Tensor, size: list[int]) -> tuple[list[int], int]:
    """By the documented order and rules, one image, patch by patch."""
    visual = model.model.get_visual_tokens(pixels)
    packed = packed_by_plain(plain, size, len(pixels))
    columns = {(32, 32): 2, (16, 32): 2, (32, 16): 1}[tuple(grid_of(size))]
    where = {}
    for place, number in enumerate(packed):
        if number >= PATCHES:
            tile, patch = divmod(number - PATCHES, PATCHES)
            where[tile // columns * SIDE + patch // SIDE, tile % columns * SIDE + patch % SIDE] = place

    def place_of(tile: int, patch: int) -> int:
        if tile == 0:
            return patch
        row, column = (tile - 1) // columns * SIDE + patch // SIDE, (tile - 1) % columns * SIDE + patch % SIDE
        return where[min(where, key=lambda cell: abs(cell[0] - row) + abs(cell[1] - column))]

    zipped = model.config.visionzip
    if zipped.get("method") == "pool":
        cells = [row * SIDE + column for row in (1, 3) for column in (0, 2, 3)]
        return [place_of(tile, cell) for tile in range(len(pixels)) for cell in cells], len(packed)
    cls = [0] * (zipped["dominant"] - visual.kept.shape[1])
    kept, targets = visual.kept.tolist(), visual.targets.tolist()
    found = [place_of(0, patch) for patch in [*cls, *kept[0], *targets[0]]]
    rest = [(tile, patch) for tile in range(1, len(kept)) for patch in kept[tile]]
    rest.sort(key=lambda one: ((one[0] - 1) // columns * SIDE + one[1] // SIDE,
                               (one[0] - 1) % columns * SIDE + one[1] % SIDE))  # fmt: skip
    rest += [(tile, 0) for tile in range(1, len(kept)) for _ in cls]
    rest += [(tile, patch) for tile in range(1, len(kept)) for patch in targets[tile]]
    return found + [place_of(*one) for one in rest], len(packed)


def grid_of(size: list[int]) -> list[int]:
    from transformers.image_processing_utils import select_best_resolution

    best: list[int] = list(select_best_resolution(size, [[16, 32], [32, 16], [32, 32]]))
    return best


@pytest.mark.parametrize("size", NEXT_SIZES, ids=str)
@pytest.mark.parametrize("method", WAYS)
def test_places_are_those_of_the_packed_sequence(method: str, size: list[int]) -> None:
    model, plain = original(method, next_=True), build(next_=True, plain=True)
    inputs = images(model, [size])
    places, length = expected_places(model, plain, inputs["pixel_values"], size)
    found = model.model.get_image_features(**inputs).positions
    assert found.lengths == [length]
    assert found.tokens[0].tolist() == places


def prompt(model: Any, sizes: list[list[int]], text: list[int], seed: int) -> dict[str, Tensor]:
    """Text tokens by the numbers in `text`, an image between each."""
    inputs = images(model, sizes, seed)
    counts = [len(image) for image in model.model.get_image_features(**inputs).pooler_output]
    ids = list(range(5, 5 + text[0]))
    for count, more in zip(counts, text[1:], strict=True):
        ids += [IMAGE_TOKEN] * count + list(range(40, 40 + more))
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long), **inputs}


@torch.no_grad()
def by_hand(model: Any, row: dict[str, Tensor], count: int) -> tuple[Tensor, list[int]]:
    """Logits of a row, and greedy tokens, by the language model alone."""
    ids, sizes = row["input_ids"], row["image_sizes"].tolist()
    plain = build(next_=True, plain=True)
    features = model.model.get_image_features(row["pixel_values"], row["image_sizes"]).pooler_output
    embeds = model.get_input_embeddings()(ids)
    embeds = embeds.masked_scatter((ids == IMAGE_TOKEN).unsqueeze(-1), torch.cat(list(features)))
    tiles = row["pixel_values"].split(model.model._tiles(sizes))
    found = [expected_places(model, plain, pixels, size) for pixels, size in zip(tiles, sizes, strict=True)]
    positions: list[int] = []
    following = column = 0
    while column < ids.shape[1]:
        if ids[0, column] == IMAGE_TOKEN:
            places, length = found.pop(0)
            positions += [following + place for place in places]
            column, following = column + len(places), following + length
        else:
            positions.append(following)
            column, following = column + 1, following + 1
    said: list[int] = []
    for _ in range(count + 1):
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        states = model.model.language_model(
            inputs_embeds=embeds, position_ids=torch.tensor([positions]), attention_mask=mask, use_cache=False
        )
        logits = model.lm_head(states.last_hidden_state)
        if not said:
            first = logits
        said.append(int(logits[0, -1].index_fill(0, torch.tensor(2), -torch.inf).argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[said[-1]]]))], 1)
        positions.append(following + len(said) - 1)
    return first, said[:count]


@pytest.mark.parametrize("method", WAYS)
def test_logits_and_greedy_ids(method: str) -> None:
    model = original(method, next_=True)
    rows = [prompt(model, NEXT_SIZES[1:3], [2, 3, 2], 0), prompt(model, NEXT_SIZES[:1], [1, 2], 1)]
    length = max(row["input_ids"].shape[1] for row in rows)

    def padded(key: str, value: int) -> Tensor:
        missing = [length - row[key].shape[1] for row in rows]
        parts = zip(rows, missing, strict=True)
        return torch.cat([torch.nn.functional.pad(row[key], (count, 0), value=value) for row, count in parts])

    batch = {"input_ids": padded("input_ids", PAD), "attention_mask": padded("attention_mask", 0)}
    batch |= {key: torch.cat([row[key] for row in rows]) for key in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        together = model(**batch).logits
    said = model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=PAD)
    for number, row in enumerate(rows):
        logits, tokens = by_hand(model, row, 4)
        found = together[number][batch["attention_mask"][number].bool()]
        torch.testing.assert_close(found, logits[0], rtol=0, atol=5e-5)
        assert said[number, length:].tolist() == tokens


def test_all_patches_are_plain_llava_next_that_does_not_see_its_newlines() -> None:
    model = original("all", next_=True)
    plain = build(next_=True, plain=True)
    row = prompt(model, [[32, 32]], [3, 5], 0)
    numbers = packed_by_plain(plain, [32, 32], 5)
    ids = torch.tensor([[5, 6, 7, *[IMAGE_TOKEN] * len(numbers), *range(40, 45)]])
    mask = torch.ones_like(ids)
    mask[0, 3 : 3 + len(numbers)] = torch.tensor([int(number >= 0) for number in numbers])
    with torch.no_grad():
        expected = plain(
            input_ids=ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1])[None],
            pixel_values=row["pixel_values"], image_sizes=row["image_sizes"],
        ).logits[:, -5:]  # fmt: skip
        torch.testing.assert_close(model(**row).logits[:, -5:], expected, rtol=0, atol=1e-5)
