"""References, comparison and the ratio rule: for tests, benchmarks and `pykern check` only."""

from pykern.testing.compare import assert_bitwise, assert_close

__all__ = ["assert_bitwise", "assert_close"]
