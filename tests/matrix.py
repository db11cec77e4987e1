"""The input matrix and the differences from the authors' code, as tables at the end of the tests' output."""

from collections.abc import Iterable, Sequence

import pytest

MATRIX = ("reduction/test_input_matrix.py", "reduction/test_gradients.py")
REDUCTIONS = ("none", "visionzip", "shortv", "both")
OTHERS = "-"  # tests that no reduction divides


def matrix_rows(reports: Iterable[pytest.TestReport]) -> dict[str, dict[str, list[bool]]]:
    """For each test of the matrix, the outcomes under each reduction."""
    rows: dict[str, dict[str, list[bool]]] = {}
    for report in reports:
        path, _, name = report.nodeid.partition("::")
        if path.endswith(MATRIX):
            test, _, parameters = name.partition("[")
            named = set(parameters.rstrip("]").split("-"))
            column = next((reduction for reduction in REDUCTIONS if reduction in named), OTHERS)
            row = rows.setdefault(test.removeprefix("test_").replace("_", " "), {})
            row.setdefault(column, []).append(report.passed)
    return rows


def differences(reports: Iterable[pytest.TestReport]) -> dict[str, list[tuple[str, float]]]:
    """For each test that recorded any, the largest of each recorded number under its name."""
    found: dict[str, list[tuple[str, float]]] = {}
    for report in reports:
        numbers = [(key, value) for key, value in report.user_properties if isinstance(value, float)]
        if numbers:
            test = report.nodeid.partition("::")[2].removeprefix("test_").replace("_", " ")
            found[test] = [(key, max(value for name, value in numbers if name == key)) for key in dict(numbers)]
    return found


def lines(reports: Sequence[pytest.TestReport]) -> Iterable[str]:
    rows = matrix_rows(reports)
    if rows:
        columns = [*REDUCTIONS, OTHERS]
        width = max(map(len, rows))
        yield "inputs x reductions, passed of run".ljust(width) + "".join(f"{column:>11}" for column in columns)
        for test, outcomes in rows.items():
            cells = [f"{sum(outcomes[c])}/{len(outcomes[c])}" if c in outcomes else "" for c in columns]
            yield test.ljust(width) + "".join(f"{cell:>11}" for cell in cells)
    measured = differences(reports)
    if measured:
        width = max(map(len, measured))
        yield ""
        yield "measured against the fixtures of the authors' code"
        for test, numbers in measured.items():
            yield test.ljust(width) + "  " + ", ".join(f"{key} {value:.2g}" for key, value in numbers)
