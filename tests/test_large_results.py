"""Memory of large results: kept for the next one, of any dtype, by any thread; never shared by two."""

import gc
import os
import threading

import pytest
import torch
from torch.utils.dlpack import from_dlpack

from pykern import _C
from pykern.ops._library import empty_packed

pytestmark = pytest.mark.one_isa
MIB = 1 << 20
LIKE = torch.empty(0)


def large(mib, dtype=torch.float32):
    return empty_packed(LIKE, (mib, MIB // dtype.itemsize), dtype)


@pytest.fixture(autouse=True)
def far_larger_blocks_kept():
    """No block that a test could take by chance; and at the end not more than the limit is kept."""
    gc.collect()
    limit = min(1 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
    blocks = [large(limit // MIB // 4) for _ in range(4)]  # what was kept makes room for these
    del blocks
    yield
    assert _C.kept_results() <= limit


def test_freed_memory_comes_again_and_only_once():
    x = large(12)
    at = x.data_ptr()
    x.fill_(1.0)
    y = x[3:]
    del x
    again = large(12)
    assert again.data_ptr() != at  # y still has it
    del y
    third = large(12, torch.bfloat16)
    assert third.data_ptr() == at and third.dtype == torch.bfloat16 and third.shape == (12, MIB // 2)
    assert again.data_ptr() != at and third.is_contiguous() and at % 64 == 0


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int32]
)
def test_every_number_may_be_written(dtype):
    x = large(5, dtype)
    x.fill_(3)
    assert x.eq(3).all() and x.nbytes == 5 * MIB


def test_much_smaller_results_do_not_take_a_large_block():
    x = large(64)
    at = x.data_ptr()
    del x
    small = large(5)
    assert small.data_ptr() != at
    assert large(64).data_ptr() == at  # it was there to be taken


def test_gradients_and_modules_may_keep_them():
    weight = torch.nn.Parameter(large(6).zero_())
    out = weight * 2.0
    out.sum().backward()
    assert weight.grad.eq(2).all()
    other = large(6).fill_(7.0)
    weight.grad = other
    del other
    assert weight.grad.eq(7).all() and weight.grad.clone().eq(7).all()


def test_threads_get_blocks_of_their_own():
    wrong = []

    def work(number):
        for i in range(30):
            x = large(5 + i % 3)
            x.fill_(number)
            if not x.eq(number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(float(n),)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_refusals():
    with pytest.raises(ValueError, match="large_result: a size is -1 but must not be negative"):
        _C.large_result([2, -1], "float32")
    with pytest.raises(ValueError, match="large_result: more numbers than memory has addresses"):
        _C.large_result([1 << 40, 1 << 40], "float32")
    with pytest.raises(TypeError, match="large_result: dtype complex64 is not supported"):
        _C.large_result([2], "complex64")
    with pytest.raises(MemoryError):
        _C.large_result([1 << 60], "uint8")
    unused = _C.large_result([3], "float64")
    assert from_dlpack(unused).shape == (3,)
    del unused
    _C.large_result([0], "float32")  # a capsule that nobody takes gives its memory back
