"""The first cases of the fuzzer of `make sanitize`, on the module as it is installed."""

from __future__ import annotations

import pytest

from tests.native.fuzz import KINDS, MODES, FuzzError, Mode, run_case


@pytest.mark.parametrize("number", range(10 * len(KINDS)))
def test_like_reference(number: int) -> None:
    run_case(number, MODES)


def test_what_is_off_is_told_by_number() -> None:
    with pytest.raises(FuzzError, match=r"case 0: matvec, strict, .* off by .*, allowed 0"):
        run_case(0, {"strict": Mode({}, 0.0, 1.0)})
