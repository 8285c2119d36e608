"""The boundary: which arrays cross it and how, what is refused with which words, and that a refusal writes nothing.

The kernels are activation_forward and swiglu_forward (elementwise) and linear_forward (arguments of different sizes).
"""

import itertools
import mmap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dlpack_producers import Copying, Forged, Old, OnCuda, Returning, Wrapped
from hypothesis import given
from hypothesis import strategies as st

import pykern
from pykern import _C

pytestmark = pytest.mark.one_isa


def relu(x, out):
    _C.activation_forward(x, out, kind="relu")


# ---- what crosses, and by which path

TORCH_DTYPES = ("float32", "float64", "bfloat16", "float16", "int64", "int32", "bool")


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_torch_crosses_by_the_exchange_api(dtype):
    x = torch.ones(2, 3).to(getattr(torch, dtype))
    assert _C.borrow_path(x) == "exchange"
    assert _C.borrow_path(torch.nn.Parameter(x, requires_grad=False)) == "exchange"


@pytest.mark.parametrize("dtype", [name for name in TORCH_DTYPES if name != "bfloat16"])
def test_numpy_crosses_directly(dtype):
    assert _C.borrow_path(np.ones((2, 3), dtype)) == "numpy"
    assert _C.borrow_path(np.ones((), dtype)) == "numpy"


@pytest.mark.parametrize("producer", [Wrapped, Old])
def test_other_arrays_cross_through_dlpack(producer):
    x, out = np.array([[-1.0, 2.0], [3.0, -4.0]]), np.zeros((2, 2))
    assert _C.borrow_path(producer(x)) == "dlpack"
    relu(producer(x), producer(out))
    np.testing.assert_array_equal(out, np.maximum(x, 0))


def test_an_array_on_a_gpu_is_asked_for_on_a_stream(monkeypatch):
    """The default one; of a torch without the exchange API, the one that torch computes on."""
    array = OnCuda(np.ones(3))
    assert _C.borrow_path(array) == "dlpack"
    assert array.asked == {"stream": 1, "max_version": (1, 3)}
    older = type("Tensor", (OnCuda,), {"__module__": "torch.older", "device": "cuda:0"})(np.ones(3))
    for stream, asked in ((77, 77), (0, 1)):  # 1: DLPack's number of the default stream
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, s=stream: SimpleNamespace(cuda_stream=s))
        assert _C.borrow_path(older) == "dlpack"
        assert older.asked["stream"] == asked


def test_forged_capsule_is_read_as_it_says():
    out = np.zeros(4, np.float32)
    relu(Forged(byte_offset=12), out)
    np.testing.assert_array_equal(out, np.arange(4))


def test_paths_mix():
    makers = dict(numpy=lambda a: a, torch=torch.from_numpy, dlpack=Wrapped)
    for x, out in itertools.product(makers, makers):
        result = np.zeros(3)
        relu(makers[x](np.array([-1.0, 2.0, 3.0])), makers[out](result))
        assert result.tolist() == [0, 2, 3], (x, out)


def test_requires_grad_does_not_matter_below_autograd():
    x, out = torch.tensor([-1.0, 2.0], requires_grad=True), torch.zeros(2)
    relu(x, out)
    assert out.tolist() == [0, 2] and x.grad is None


VIEWS = {
    "rows apart": lambda a: a[::2],
    "rows backwards": lambda a: a[::-1],
    "offset": lambda a: a[1:, 3:],
    "part of the columns": lambda a: a[:, 2:9],
    "one row": lambda a: a[2],
    "one element": lambda a: a[2:3, 3:4].reshape(()),
    "expanded": lambda a: np.broadcast_to(a[1], a.shape),
    "leading ones": lambda a: a[None, :, None],
    "transposed leading dimensions": lambda a: a.reshape(2, 4, 11).swapaxes(0, 1),
    "no rows": lambda a: a[:0],
    "no columns": lambda a: a[:, :0],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_strided_inputs(view, dtype):
    x = VIEWS[view](np.random.default_rng(0).standard_normal((8, 11)).astype(dtype))
    for wrap in (lambda a: a, Wrapped):
        out = np.full(x.shape, 7, dtype)
        relu(wrap(x), out)
        np.testing.assert_array_equal(out, np.maximum(x, 0))


def test_strides_beyond_31_bits():
    row = (1 << 31) + 40  # elements between two rows of float32: 8 GiB apart, of which two pages are touched
    try:
        memory = mmap.mmap(
            -1, 4 * (row + 64), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        )
    except OSError as error:
        pytest.skip(f"no 8 GiB of address space: {error}")
    x = np.lib.stride_tricks.as_strided(np.frombuffer(memory, np.float32), (2, 5), (4 * row, 4))
    x[0], x[1] = [1, -2, 3, -4, 5], [-6, 7, -8, 9, -10]
    out = np.zeros((2, 5), np.float32)
    relu(x, out)
    np.testing.assert_array_equal(out, np.maximum(x, 0))
    relu(out, x)  # and as an output
    np.testing.assert_array_equal(x, out)


# ---- what is refused


def read_only(array):
    array.flags.writeable = False
    return array


def unaligned(dtype=np.float32):
    return np.frombuffer(bytearray(4 * np.dtype(dtype).itemsize + 1), dtype, 4, 1)


def fake():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(4)


FLOATS = "expected float32, float64, bfloat16 or float16"
ANY = "expected float32, float64, bfloat16, float16, int64, int32, uint8 or bool"
BAD_INPUTS = {
    "list": (lambda: [1.0, 2.0], TypeError, "relu: x must be an array, got list"),
    "None": (lambda: None, TypeError, "relu: x must be an array, got NoneType"),
    "number": (lambda: 1.0, TypeError, "relu: x must be an array, got float"),
    "numpy scalar": (lambda: np.float32(1), TypeError, "relu: x must be an array, got float32"),
    "complex torch": (lambda: torch.ones(4, dtype=torch.complex64), TypeError, f"relu: x has dtype complex64, {ANY}"),
    "complex numpy": (lambda: np.ones(4, np.complex128), TypeError, f"relu: x has dtype complex128, {ANY}"),
    "uint8": (
        lambda: torch.ones(4, dtype=torch.uint8),
        TypeError,
        "relu: x has dtype uint8, expected float32, float64, bfloat16 or float16",
    ),
    "int16": (lambda: np.ones(4, np.int16), TypeError, f"relu: x has dtype int16, {ANY}"),
    "float8": (lambda: torch.ones(4).to(torch.float8_e5m2), TypeError, f"relu: x has dtype float8, {ANY}"),
    "float128": (lambda: np.ones(4, np.longdouble), TypeError, f"relu: x has dtype {np.dtype('g')}, {ANY}"),
    "text": (lambda: np.array(["a"]), TypeError, f"relu: x has dtype <U1, {ANY}"),
    "objects": (lambda: np.array([None]), TypeError, f"relu: x has dtype object, {ANY}"),
    "vector lanes": (lambda: Forged(lanes=4), TypeError, f"relu: x has dtype float32 vectors, {ANY}"),
    "int64": (lambda: np.ones(4, np.int64), TypeError, f"relu: x has dtype int64, {FLOATS}"),
    "bool": (lambda: torch.ones(4, dtype=torch.bool), TypeError, f"relu: x has dtype bool, {FLOATS}"),
    "big-endian": (lambda: np.ones(4, ">f4"), TypeError, "relu: x is big-endian, expected the byte order of this"),
    "mixed dtypes": (lambda: np.ones(4), TypeError, "relu: out has dtype float32 but x has float64"),
    "meta": (lambda: torch.ones(4, device="meta"), TypeError, "relu: x cannot be borrowed: RuntimeError: Cannot pack"),
    "fake": (fake, TypeError, r"relu: x has no memory \(a fake, meta or wrapper tensor\)"),
    "no memory": (lambda: Forged(data=False), TypeError, "relu: x has no memory"),
    "sparse": (lambda: torch.ones(4).to_sparse(), TypeError, "relu: x cannot be borrowed: RuntimeError: Cannot access"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
        TypeError,
        "relu: x cannot be borrowed: RuntimeError",
    ),
    "misaligned numpy": (unaligned, ValueError, "relu: x is not aligned to its item size of 4 bytes"),
    "misaligned torch": (
        lambda: torch.frombuffer(bytearray(17), dtype=torch.float32, count=4, offset=1),
        ValueError,
        "relu: x is not aligned to its item size of 4 bytes",
    ),
    "stride of half an item": (
        lambda: np.lib.stride_tricks.as_strided(np.ones(9, np.float32), (4,), (6,)),
        ValueError,
        "relu: x has a stride of 6 bytes, not a multiple of its item size of 4",
    ),
    "9 dimensions, numpy": (
        lambda: np.ones((1,) * 9, np.float32),
        ValueError,
        "relu: x has 9 dimensions, at most 8 are supported",
    ),
    "9 dimensions, torch": (
        lambda: torch.ones((1,) * 9),
        ValueError,
        "relu: x has 9 dimensions, at most 8 are supported",
    ),
    "backwards": (
        lambda: np.ones(4, np.float32)[::-1],
        ValueError,
        "relu: x must have stride 1 in its last .*, got -1",
    ),
    "every other": (lambda: torch.ones(8)[::2], ValueError, "relu: x must have stride 1 in its last dimension, got 2"),
    "other shape": (lambda: np.ones((2, 2), np.float32), ValueError, r"relu: out has shape \[4\] but x has \[2, 2\]"),
    "fewer dimensions": (lambda: np.float32(1) + np.ones((), "f4"), TypeError, "relu: x must be an array, got float32"),
    "another device": (lambda: Forged(device=(2, 0)), ValueError, "relu: out and x are on different devices"),
    "unknown device": (
        lambda: Forged(device=(8, 0)),
        ValueError,
        r"relu: x is on an unsupported device \(DLPack type 8\), expected CPU or CUDA",
    ),
    "DLPack 9": (lambda: Forged(version=(9, 0)), TypeError, "relu: x comes with DLPack version 9, expected 1"),
    "not a capsule": (lambda: Returning(3), TypeError, r"relu: x.__dlpack__\(\) returned no DLPack capsule"),
    "failing producer": (
        lambda: Returning(BufferError("busy\nelsewhere")),
        TypeError,
        "relu: x cannot be borrowed: BufferError: busy$",
    ),
    "failing old producer": (
        lambda: Returning(TypeError("no")),
        TypeError,
        "relu: x cannot be borrowed: TypeError: no$",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused_before_anything_is_written(case):
    make, error, words = BAD_INPUTS[case]
    out = np.full(4, 7, np.float32)
    with pytest.raises(error, match="^" + words):
        relu(make(), out)
    assert (out == 7).all()


def alike(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


BAD_OUTPUTS = {
    "read-only numpy": (lambda: read_only(alike(4, 4)), "relu: out is read-only"),
    "read-only dlpack": (lambda: Wrapped(read_only(alike(4, 4))), "relu: out is read-only"),
    "a copy": (lambda: Copying(alike(4, 4)), "relu: out is read-only"),
    "expanded": (lambda: torch.ones(4).expand(4, 4), "relu: elements of out share memory"),
    "backwards": (lambda: alike(4, 4)[::-1], "relu: elements of out share memory"),
    "overlapping rows": (
        lambda: np.lib.stride_tricks.as_strided(alike(16), (4, 4), (12, 4)),
        "relu: elements of out share memory",
    ),
}


@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_bad_output_is_refused(case):
    make, words = BAD_OUTPUTS[case]
    with pytest.raises(ValueError, match="^" + words):
        relu(-np.ones((4, 4), np.float32), make())


def test_cuda_memory_that_no_kernel_can_take():
    """What an op says of CUDA memory in a build without CUDA kernels, and in one without a driver or a device."""
    words = "this build of pykern has no CUDA kernels; see .*show_config"
    if _C.cuda_kernels():
        words = "the CUDA kernels of pykern are built for .*, but "
        if ", but " not in _C.cuda_status():
            pytest.skip(f"the CUDA kernels are {_C.cuda_status()}")
    with pytest.raises(RuntimeError, match=f"activation_forward: {words}"):
        relu(Forged(device=(2, 0)), Forged(device=(2, 0)))


def test_torch_functions_refuse_what_is_not_dense():
    nested = torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)
    for x, kind in (
        (torch.ones(3).to_sparse(), "sparse_coo"),
        (nested, "nested"),
        (torch.ones(2, 2).to_sparse_csr(), "sparse_csr"),
    ):
        with pytest.raises(TypeError, match=f"relu: x must be a dense tensor, got a {kind} one"):
            pykern.relu(x)


def test_negated_views_are_resolved_by_the_torch_path():
    x = torch.complex(torch.zeros(3), torch.tensor([1.0, -2.0, 3.0])).conj().imag
    assert x.is_neg() and pykern.relu(x).tolist() == [0, 2, 0]


# ---- memory shared between arguments


def matrix(buffer, rows, columns, stride, start):
    """A view of buffer with rows `stride` elements apart."""
    return np.lib.stride_tricks.as_strided(buffer[start:], (rows, columns), (4 * stride, 4))


def elements(a):
    """The addresses of a matrix' elements."""
    i, j = np.indices(a.shape)
    return set((a.ctypes.data + i * a.strides[0] + j * a.strides[1]).ravel().tolist())


def refused(x, out):
    """Whether linear does not take x [M,K] and out [M,N] together."""
    weight = np.ones((out.shape[1], x.shape[1]), np.float32)
    try:
        _C.linear_forward(x, weight, None, None, out, None, activation="none")
    except ValueError as error:
        assert str(error) == "linear: out shares memory with x"
        return True
    return False


@given(st.data())
def test_overlap_of_views_of_one_buffer_is_found_exactly(data):
    """Rows of one stride: refused when they share an element, and only then."""
    rows, k, n = (data.draw(st.integers(1, 5), label=name) for name in ("rows", "K", "N"))
    stride = data.draw(st.integers(max(k, n), 12))
    buffer, starts = np.zeros(200, np.float32), st.integers(0, 60)
    x, out = matrix(buffer, rows, k, stride, data.draw(starts)), matrix(buffer, rows, n, stride, data.draw(starts))
    assert refused(x, out) == bool(elements(x) & elements(out))


@given(st.data())
def test_overlap_of_any_views_is_never_missed(data):
    """Strides of their own: a shared element is always refused, disjoint ranges never."""
    rows, k, n = (data.draw(st.integers(1, 4), label=name) for name in ("rows", "K", "N"))
    buffer, starts = np.zeros(200, np.float32), st.integers(0, 60)
    x = matrix(buffer, rows, k, data.draw(st.integers(0, 14)), data.draw(starts))
    out = matrix(buffer, rows, n, data.draw(st.integers(n, 14)), data.draw(starts))
    ours, theirs = elements(x), elements(out)
    apart = max(ours) < min(theirs) or max(theirs) < min(ours)
    assert refused(x, out) if ours & theirs else apart <= (not refused(x, out))


def test_a_long_row_of_small_stride_reaches_far():
    """dout is a row of 50, dweight a column of 50 of steps of 3: equal strides, yet neither view bounds the other."""
    buffer, one, column = np.zeros(250, np.float32), np.ones((1, 1), np.float32), np.ones((50, 1), np.float32)
    dout, dweight = matrix(buffer, 1, 50, 3, 0), matrix(buffer, 50, 1, 3, 40)
    assert elements(dout) & elements(dweight)
    with pytest.raises(ValueError, match="linear: dweight shares memory with dout"):
        _C.linear_backward(one, column, None, dout, None, dweight, None, activation="none")


def test_packed_queries_keys_and_values_are_apart():
    packed = torch.randn(2, 5, 3, 4)  # [B, T, (q k v), D]
    gate, up, out = packed.unbind(2)
    expected = torch.nn.functional.silu(gate) * up
    _C.swiglu_forward(gate, up, out)
    torch.testing.assert_close(out, expected)


def test_shared_memory_is_named():
    x = np.ones((4, 6), np.float32)
    for out in (x, x[::-1][::-1], np.lib.stride_tricks.as_strided(x, (4, 6), (24, 4))):
        with pytest.raises(ValueError, match=r"^relu: out shares memory with x"):
            relu(x, out)
    with pytest.raises(ValueError, match=r"^swiglu: out shares memory with up"):
        _C.swiglu_forward(np.ones(4), x2 := np.ones(4), x2)
    with pytest.raises(ValueError, match=r"^swiglu: dup shares memory with dgate"):
        _C.swiglu_backward(np.ones(4), np.ones(4), np.ones(4), x2, x2)
    flat = np.ones(10, np.float32)
    with pytest.raises(ValueError, match=r"^relu: out shares memory with x"):
        relu(flat[:6], flat[4:])
    relu(flat[:5], flat[5:])


def test_shared_memory_of_different_dtypes():
    buffer = np.zeros(64, np.uint8)
    stats, x = buffer[:16].view(np.float32), buffer[8:24].view(np.float16)
    with pytest.raises(ValueError, match="layer_norm: mean shares memory with x"):
        _C.layer_norm_forward(
            x.reshape(4, 2),
            None,
            None,
            None,
            np.zeros((4, 2), np.float16),
            None,
            stats,
            np.zeros(4, np.float32),
            eps=1e-5,
        )
