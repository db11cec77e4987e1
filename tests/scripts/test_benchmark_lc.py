"""The benchmark's limit is what it says, and its two sides agree."""

import pytest

from shortzip.reduction.flops import llm_layer_flops_grouped
from shortzip.scripts.benchmarks.lc import LcBenchmarkConfig, benchmark, build_models, limits

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "text_before": 5,
    "visual_tokens": 7,
    "text_after": 3,
    "prompts": 2,
    "rounds": 1,
}


def test_limits_by_hand():
    settings = LcBenchmarkConfig(**SMALL, text_tokens=False)
    text = build_models(settings)[0].config.text_config

    def cost(queries: int, keys: int, attended: int) -> int:
        return sum(llm_layer_flops_grouped(text, queries, keys, attended))

    found = limits(settings, text)
    head = 2 * 32 * 50
    # 15 tokens, 5 of them before the image; frozen visual tokens leave 8 queries.
    naive = 4 * cost(15, 15, 15) + 4 * (3 * cost(15, 15, 15) + cost(8, 15, 15)) + 5 * head
    assert found["layers"] == naive / (10 * cost(15, 15, 15) + 5 * head)
    assert 1.5 < found["layers"] < 2
    assert found["layers and text before the image"] == naive / (10 * cost(10, 10, 15) + 5 * head)
    shared = 6 * cost(10, 10, 15) + 4 * cost(1, 10, 15) + 4 * cost(5, 5, 5) / 2 + 5 * head
    assert found["limit"] == naive / shared


@pytest.mark.parametrize("text_tokens", [False, True])
def test_both_sides_agree(text_tokens):
    result = benchmark(LcBenchmarkConfig(**SMALL, text_tokens=text_tokens))
    assert result["relative_difference"] < 1e-3
    assert result["speed_up"] > 0


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(
        "shortzip.scripts.benchmarks.lc.naive_layer_contributions", lambda models, prompts, *_: (1.0 + 0 * one, None)
    )
    import torch

    one = torch.ones(2, 2, 4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="differs from the naive loop"):
        benchmark(LcBenchmarkConfig(**SMALL))
