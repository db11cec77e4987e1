"""What users write for budgets, frozen layers and memory."""

import pytest

from shortzip.reduction.parsing import (
    budget_by,
    format_budget,
    format_fastv,
    format_method,
    format_shortv,
    parse_budget,
    parse_bytes,
    parse_fastv,
    parse_freeze,
    parse_layers,
    parse_method,
    pruned_title,
    read_freeze,
)


def test_budget():
    assert parse_budget("54+10") == {"dominant": 54, "contextual": 10}
    assert parse_budget(" 54 + 0 ") == {"dominant": 54, "contextual": 0}


@pytest.mark.parametrize("bad", ["64", "54+", "54-10", "54+10+1", "a+b", ""])
def test_budget_refused(bad):
    with pytest.raises(ValueError, match=r"54\+10"):
        parse_budget(bad)


def test_a_budget_is_written_as_it_is_read():
    assert format_budget(parse_budget("54+10")) == "54+10"


def test_layers():
    assert parse_layers("31+29+30") == [31, 29, 30]
    assert parse_layers("0") == [0]
    assert parse_layers("none") == []


@pytest.mark.parametrize("bad", ["1,2", "a", "1+", "", "-1"])
def test_layers_refused(bad):
    with pytest.raises(ValueError, match=r"write indices like 31\+29\+30, or none"):
        parse_layers(bad)


def test_bytes():
    assert parse_bytes("24GiB") == parse_bytes("24") == 24 * 2**30
    assert parse_bytes("80 GB") == 80 * 10**9
    assert parse_bytes("512MiB") == 2**29
    assert parse_bytes("1.5MB") == 1_500_000


@pytest.mark.parametrize("bad", ["", "0GiB", "24 KiB", "much"])
def test_bytes_refused(bad):
    with pytest.raises(ValueError, match="24GiB"):
        parse_bytes(bad)


@pytest.mark.parametrize(
    ("text", "layers", "expected"),
    [
        ("19", 32, 19),
        ("0", 32, 0),
        ("60%", 32, 19),  # the papers' 19 of 32 and 24 of 40
        ("60 %", 40, 24),
        ("60%", 8, 5),
        ("100%", 8, 8),
        ("31,29, 30", 32, [31, 29, 30]),
        ("[0, 3]", 4, [0, 3]),
        ("[3]", 4, [3]),
    ],
)
def test_freeze(text, layers, expected):
    assert parse_freeze(text, layers) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9", "has 8 layers"),
        ("101%", "a share of the layers is at most 100%"),
        ("1,8", "from 0 to 7"),
        ("1,1", "distinct"),
        ("-1", "a number of layers"),
        ("most", "a number of layers"),
        ("0.6", "a share"),
    ],
)
def test_freeze_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_freeze(text, 8)


def test_fastv_is_a_layer_and_a_share() -> None:
    assert parse_fastv("2+0.5") == {"layer": 2, "keep": 0.5}
    assert parse_fastv("none") is None
    for bad in ("2", "0.5", "a+b", "2+", ""):
        with pytest.raises(ValueError, match=r"like 2\+0\.5, or none"):
            parse_fastv(bad)


def test_other_methods_of_pruning_have_a_name_layers_and_what_is_kept() -> None:
    pyramid = {"method": "pyramiddrop", "layers": [8, 16, 24], "keep": [0.5, 0.25, 0.125]}
    assert parse_fastv("pyramiddrop:8+16+24:0.5+0.25+0.125") == pyramid
    assert parse_fastv("pyramiddrop:8+16+24:.5+.25+.125:original") == {**pyramid, "positions": "original"}
    assert format_fastv(pyramid) == "pyramiddrop:8+16+24:0.5+0.25+0.125"
    assert parse_fastv("sparsevlm:2+6:66+30") == {"method": "sparsevlm", "layers": [2, 6], "keep": [66, 30]}
    assert parse_fastv("fastv:2:0.5") == {"layer": 2, "keep": 0.5}
    assert pruned_title("sparsevlm+:2:66") == "SparseVLM+ 2:66"
    for bad in ("pyramiddrop:8", "sparsevlm:2:0.5", "pyramiddrop:a:b", "pyramiddrop:8:0.5:original:more"):
        with pytest.raises(ValueError, match=r"write METHOD:LAYERS:KEPT, like (pyramiddrop|sparsevlm):"):
            parse_fastv(bad)
    with pytest.raises(ValueError, match="of other methods METHOD:LAYERS:KEPT"):
        parse_fastv("dart:2:0.5")


def test_freeze_of_any_model() -> None:
    assert [read_freeze(text) for text in ("19", "60%", "[3]", "31, 29")] == [19, 0.6, [3], [31, 29]]
    for text in ("250%", "100.5 %"):
        with pytest.raises(ValueError, match=r"a share of the layers is at most 100%\.$"):
            read_freeze(text)
    with pytest.raises(ValueError, match="distinct layers"):
        read_freeze("1,1")


def test_no_layer_is_null_as_configs_want_it() -> None:
    assert format_shortv([2, 5]) == "{layers: [2, 5]}"
    assert format_shortv([]) == format_shortv(None) == "null"


def test_methods():
    assert parse_method("pool") == {"method": "pool"}
    assert parse_method(" random : seed = 3 ") == {"method": "random", "seed": 3}
    assert parse_method("x:a=0.5+b=true+c=far") == {"method": "x", "a": 0.5, "b": True, "c": "far"}


@pytest.mark.parametrize("bad", ["random:", "random:seed", "random:seed=", "random:=3", "random:seed=1+seed=2",
                                 "random:dominant=3"])  # fmt: skip
def test_methods_refused(bad):
    with pytest.raises(ValueError, match="several joined by"):
        parse_method(bad)


def test_a_budget_by_another_method_has_as_many_tokens():
    budget = {"dominant": 5, "contextual": 3}
    assert budget_by(budget, "visionzip") == budget
    assert budget_by(budget, "duet") == {**budget, "method": "duet", "window": 4}
    assert budget_by(budget, "scope:alpha=2") == {"dominant": 8, "contextual": 0, "method": "scope", "alpha": 2.0}
    assert budget_by(budget, "pool") == {"dominant": 8, "contextual": 0, "method": "pool"}


def test_a_method_is_written_as_it_is_read():
    assert format_method({"dominant": 5, "contextual": 3}) == "visionzip"
    assert format_method({"dominant": 8, "contextual": 0, "method": "random", "seed": 0}) == "random"
    assert format_method({"dominant": 8, "contextual": 0, **parse_method("random:seed=3")}) == "random:seed=3"
