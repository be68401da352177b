from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxmpq.wording import counted, decibels, in_unit, percent, points, seconds, shortened


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9949, "9.95 kB"),
        (9950, "9.9 kB"),
        (99_600, "100 kB"),
        (273_784, "274 kB"),
        (1_082_432, "1.08 MB"),
    ],
)
def test_counts_have_a_prefix_and_about_three_digits(value: int, text: str) -> None:
    assert counted(value, "B") == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "ms", "0.00 ms"),
        (0.01234, "ms", "0.0123 ms"),
        (0.999, "ms", "1.00 ms"),
        (9.949, "ms", "9.95 ms"),
        (999.4, "ms", "999 ms"),
        (999.6, "ms", "1.00 s"),
        (5e6, "ms", "5000 s"),
        (1234.0, "pJ", "1.23 nJ"),
        (4.56e7, "pJ", "45.6 µJ"),
        (7e14, "pJ", "700 J"),
        (162_168.0, "B", "162 kB"),
        (12.0, "B", "12 B"),
        (12.34, "", "12.3"),
        (999.7, "", "1000"),
        (12_340.0, "", "12.3 k"),
    ],
)
def test_costs_stand_in_the_largest_unit_they_reach(value: float, unit: str, text: str) -> None:
    assert in_unit(value, unit) == text


@given(st.integers(1000, 10**15))
def test_a_count_reads_back_within_its_digits(value: int) -> None:
    number, unit = counted(value).split()
    read = float(number) * {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[unit]
    assert read == pytest.approx(value, rel=0.006)


def test_decibels_percentages_points_and_seconds() -> None:
    assert (decibels(-3.04), decibels(None)) == ("-3.0 dB", "exact")
    assert (percent(1.0), percent(0.93975, 2)) == ("100.0 %", "93.97 %")
    assert (points(0.0), points(-0.005)) == ("+0.00", "-0.50")
    assert seconds({"a": 2.0}) == "a 2.0 s: 2.0 s in all"


@given(
    st.lists(st.sampled_from(["encoder", "layer", "7", "12", "dense"]), min_size=1),
    st.integers(1, 40),
)
def test_shortening_keeps_the_numbers_and_the_last_part(parts: list[str], length: int) -> None:
    short = shortened(".".join(parts), length).split(".")
    assert len(short) == len(parts)
    assert short[-1] == parts[-1]
    for part, kept in zip(parts[:-1], short[:-1], strict=True):
        assert kept == part or (kept == part[0] and not part.isdigit())
    if len(".".join(parts)) <= length:
        assert short == parts
