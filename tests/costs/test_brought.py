from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.costs.brought import read_costs, write_costs
from fxmpq.costs.table import CostTable
from fxmpq.costs.terms import Edge, Moment
from fxmpq.errors import FileFormatError

TABLE = CostTable(
    {"weights": {"a": {"w4a8": 50, "w8a8": 100}, "b": {"w8a8": 10, "fp32": 40}}},
    float_total={"weights": 440},
)
ROWS = "a,w4a8,1.5\na,W8A8,2\nb,w8a8,3\nb,fp32,9\n"


def read(tmp_path: Path, text: str) -> CostTable:
    file = tmp_path / "costs.csv"
    file.write_text(text)
    return read_costs(file, TABLE)


def test_metrics_are_added_behind_the_tables_own(tmp_path: Path) -> None:
    found = read(tmp_path, "group,precision,us\n" + ROWS + "*,,5\n")
    assert found.metrics == ("weights", "us")
    assert found.costs["weights"] == TABLE.costs["weights"]
    assert found.total("us", {"a": "w4a8", "b": "fp32"}) == 5 + 1.5 + 9
    # Group a has no row in float, so there is no share of the float model.
    assert found.float_total == {"weights": 440}


def test_with_all_groups_in_float_shares_can_be_asked_for(tmp_path: Path) -> None:
    found = read(tmp_path, "group,precision,us\n\n" + ROWS + "a,fp32,8\n*,,5\n")
    assert found.float_total["us"] == 5 + 8 + 9
    assert found.precisions("a") == ("w4a8", "w8a8")


def test_without_a_row_for_the_rest_it_costs_nothing(tmp_path: Path) -> None:
    assert read(tmp_path, "group,precision,us\n" + ROWS).fixed["us"] == 0


@given(st.lists(st.floats(0, 1e9), min_size=5, max_size=5))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, costs: list) -> None:
    file = tmp_path_factory.mktemp("costs") / "costs.csv"
    rows = {"a": {"w4a8": costs[0], "w8a8": costs[1]}, "b": {"w8a8": costs[2], "fp32": costs[3]}}
    write_costs(file, CostTable({"us": rows}, fixed={"us": costs[4]}))
    found = read_costs(file, TABLE)
    assert found.costs["us"] == rows
    assert found.fixed["us"] == costs[4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with nothing; costs have the columns"),
        ("group,us\n", "begins with group,us; costs have"),
        ("group,precision\n", "begins with group,precision; costs have"),
        ("group,precision,us,us\n", "a metric twice"),
        ("group,precision,weights\n" + ROWS, "costs 'weights', which the table has already"),
        ("group,precision,us\na,w4a8\n", "line 2: 2 fields, but there are 3 columns"),
        ("group,precision,us\na,int8,1\n", "line 2: cannot read the precision 'int8'"),
        ("group,precision,us\n" + ROWS + "a,w4a8,1\n", "line 6: a w4a8 again, as in line 2"),
        ("group,precision,us\n" + ROWS + "a,w2a8,1\n", "line 6: no group and precision a w2a8"),
        ("group,precision,us\n" + ROWS + "aa,w4a8,1\n", "closest groups: 'a'"),
        ("group,precision,us\na,w4a8,1\n", "no row for a at w8a8"),
        ("group,precision,us\n" + ROWS.replace("1.5", "fast"), "line 2: 'fast' is no cost"),
        ("group,precision,us\n" + ROWS.replace("1.5", "-1"), "line 2: '-1' is no cost"),
        ("group,precision,us\n" + ROWS.replace("1.5", "inf"), "line 2: 'inf' is no cost"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "costs.csv" in str(caught.value)


BETWEEN = "a>b,w4a8>w8a8,0\na>b,w4a8>fp32,7\na>b,w8a8>w8a8,0\na>b,w8a8>fp32,6.5\n"


def test_rows_of_two_groups_are_edges(tmp_path: Path) -> None:
    found = read(tmp_path, "group,precision,us\n" + ROWS + BETWEEN)
    row = {"w8a8": 0, "fp32": 7}
    assert found.edges == {"us": (Edge("a", "b", {"w4a8": row, "w8a8": row | {"fp32": 6.5}}),)}
    assert found.total("us", {"a": "w8a8", "b": "fp32"}) == 2 + 9 + 6.5


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (BETWEEN.replace("a>b,w8a8>w8a8,0\n", ""), "no row for a>b at w8a8>w8a8"),
        ("a>b,w4a8>w4a8,1\n", "line 6: no precisions w4a8>w4a8 between these groups: a has w4a8, "),
        ("a>b,w4a8,1\n", "line 6: no precisions w4a8 between these groups"),
        ("a>c,w4a8>w8a8,1\n", "line 6: no group and precision a>c w4a8>w8a8; closest groups"),
        ("a>a,w4a8>w4a8,1\n", "line 6: no group and precision a>a"),
        ("a>b,w4a8>int8,1\n", "line 6: cannot read the precision 'int8'"),
        (BETWEEN.replace("6.5", "-1"), "line 9: '-1' is no cost"),
    ],
)
def test_edges_that_do_not_fit_are_named(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(FileFormatError) as caught:
        read(tmp_path, "group,precision,us\n" + ROWS + rows)
    assert message in str(caught.value)


@given(st.lists(st.integers(0, 9) | st.floats(0, 1e9), min_size=8, max_size=8))
def test_edges_that_are_written_are_read(
    tmp_path_factory: pytest.TempPathFactory, costs: list[float]
) -> None:
    file = tmp_path_factory.mktemp("costs") / "costs.csv"
    rows = {"a": {"w4a8": 1, "w8a8": 2}, "b": {"w8a8": 3, "fp32": 4}}
    first, second = (
        Edge(
            "a",
            "b",
            {n: {"w8a8": v[0], "fp32": v[1]} for n, v in zip(rows["a"], found, strict=True)},
        )
        for found in ((costs[:2], costs[2:4]), (costs[4:6], costs[6:]))
    )
    peak = [Moment("n", 1, {"a": rows["a"]})]
    table = CostTable(
        {"us": rows, "mj": rows}, edges={"us": [first, second]}, moments={"peak": peak}
    )
    write_costs(file, table)
    assert file.read_text().startswith("group,precision,us,mj\n")
    found = read_costs(file, TABLE)
    assert "mj" not in found.edges
    for names in itertools.product(*rows.values()):
        choices = dict(zip(rows, names, strict=True))
        assert found.total("us", choices) == pytest.approx(table.total("us", choices), rel=1e-12)
        assert found.total("mj", choices) == table.total("mj", choices)


def test_a_group_with_the_sign_of_an_edge_in_its_name_is_a_group(tmp_path: Path) -> None:
    rows = {"a>b": {"w8a8": 1, "fp32": 2}, "c": {"w8a8": 1, "fp32": 2}}
    change = {"w8a8": {"w8a8": 0, "fp32": 5}, "fp32": {"w8a8": 5, "fp32": 0}}
    table = CostTable({"us": rows}, edges={"us": [Edge("a>b", "c", change)]})
    file = tmp_path / "costs.csv"
    write_costs(file, table)
    assert read_costs(file, CostTable({"bops": rows})).edges == table.edges


def test_a_peak_of_the_table_cannot_be_brought(tmp_path: Path) -> None:
    peak = {"peak": [Moment("n", 1, {"a": {"w4a8": 1, "w8a8": 2}})]}
    file = tmp_path / "costs.csv"
    file.write_text("group,precision,peak\n" + ROWS)
    with pytest.raises(FileFormatError, match="costs 'peak', which the table has already"):
        read_costs(file, CostTable(TABLE.costs, moments=peak))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"cannot read costs from .*gone\.csv"):
        read_costs(tmp_path / "gone.csv", TABLE)
