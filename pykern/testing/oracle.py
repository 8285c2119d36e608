"""A formula in plain torch as an oracle in float64, and the same formula as "eager torch" in its arguments' dtype."""

import functools

from torch import Tensor


def _double(x):
    if isinstance(x, list | tuple):
        return type(x)(_double(item) for item in x)
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def in_float64(formula):
    """The formula with every floating tensor among its arguments, also in lists, turned to float64."""

    @functools.wraps(formula)
    def oracle(*args, **kwargs):
        return formula(*(_double(a) for a in args), **{name: _double(a) for name, a in kwargs.items()})

    return oracle


def in_own_dtype(oracle):
    """The formula behind a reference, evaluated in the dtype of its arguments."""
    return oracle.__wrapped__
