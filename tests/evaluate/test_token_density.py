from __future__ import annotations

import pytest

from vistok.evaluate.token_density import tokdense


@pytest.mark.parametrize(
    ("accuracy", "tokens", "expected"), [(57.46, 32, 1.7956), (57.72, 13.08, 4.4128), (58.38, 11664, 0.005005)]
)
def test_the_published_densities(accuracy, tokens, expected):
    assert tokdense(accuracy, tokens) == pytest.approx(expected, rel=1e-4)


def test_what_has_no_density_is_refused():
    with pytest.raises(ValueError, match="percentage"):
        tokdense(0.5746e3, 32)
    with pytest.raises(ValueError, match="at least one token"):
        tokdense(50, 0)
