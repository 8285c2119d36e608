"""pykern.arrays: NumPy, JAX and any DLPack producer through every op; the kind that came in comes out; refusals."""

import gc
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from dlpack_producers import Elsewhere8, OfLibrary, OnCuda, Wrapped
from torch_cases import CASES, clones

import pykern
from pykern import _C, arrays
from pykern.testing import assert_bitwise

pytestmark = pytest.mark.one_isa
PUBLIC = {name: case for name, case in CASES.items() if case.op in pykern.__all__}


@pytest.fixture
def jax():
    return pytest.importorskip("jax", reason="jax is not installed: pip install 'pykern[jax]'")


def to_jax(tensor):
    import jax.numpy as jnp

    numbers = jnp.asarray(tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy())
    return numbers.astype(jnp.bfloat16) if tensor.dtype == torch.bfloat16 else numbers


def to_numpy(tensor):
    """With ml_dtypes' bfloat16 where it is that."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: NumPy has no bfloat16 without it")
    return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


MAKERS = {
    "torch": lambda x: x,
    "numpy": to_numpy,
    "jax": to_jax,
    "library": lambda x: OfLibrary(x.numpy()),
}
TYPES = {"torch": torch.Tensor, "numpy": np.ndarray, "library": OfLibrary}


def kind(array):
    return next((name for name, of in TYPES.items() if isinstance(array, of)), type(array).__module__.split(".")[0])


def bits(array):
    """The numbers as a tensor of their own."""
    if isinstance(array, torch.Tensor):
        return array.clone()
    array = array.array if isinstance(array, OfLibrary) else array
    if str(array.dtype) == "bfloat16":
        return torch.from_numpy(np.asarray(array).view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def flat(out):
    return [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]


def compare(name, tensors, makers):
    """The op on arrays made of tensors, beside itself on tensors; makers: by input."""
    case = CASES[name]
    given = {key: makers[key](x.clone()) for key, x in tensors.items()}
    before = {key: bits(x) for key, x in given.items()}
    theirs = clones(tensors)
    expected = flat(case.call(**theirs))
    found = flat(case.through(getattr(arrays, case.op), **given))
    for ours, wanted in zip(found, expected, strict=True):
        assert_bitwise(bits(ours), wanted, name=name)
    for key, x in given.items():
        if key in case.written:
            assert_bitwise(bits(x), theirs[key], name=key)
            assert not torch.equal(bits(x), before[key])
        else:
            assert torch.equal(bits(x), before[key]), f"{key} was written to"
    return found


def test_every_public_op_is_here():
    assert set(arrays.__all__) == {case.op for case in PUBLIC.values()}
    assert arrays.gelu.__doc__ == pykern.gelu.__doc__
    with pytest.raises(AttributeError, match=r"module 'pykern\.arrays' has no attribute 'dot'"):
        arrays.dot  # noqa: B018


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("library", ["torch", "numpy", "library"])
def test_the_kind_that_comes_in_comes_out(name, library):
    found = compare(name, CASES[name].tensors(), dict.fromkeys(CASES[name].tensors(), MAKERS[library]))
    assert {kind(x) for x in found} == {library}


@pytest.mark.parametrize("name", PUBLIC)
def test_jax(name, jax):
    """64-bit numbers are off, as by default: labels and positions are int32. What is written is NumPy's."""
    case, tensors = CASES[name], CASES[name].tensors()
    assert not jax.config.jax_enable_x64
    makers = {key: to_numpy if key in case.written else to_jax for key in tensors}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a truncation to 32 bits would be one
        found = compare(name, tensors, makers)
    assert all(isinstance(x, jax.Array) and x.dtype == np.float32 for x in found)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("library", ["jax", "numpy"])
def test_bfloat16(name, library, jax):
    case, drawn = CASES[name], CASES[name].tensors(dtype=torch.bfloat16)
    tensors = {key: x.float() if key.startswith("lse") else x for key, x in drawn.items()}
    makers = {key: to_numpy if key in case.written else MAKERS[library] for key in tensors}
    compare(name, tensors, makers)


def test_float64_of_jax(jax):
    with jax.enable_x64(True):
        x = jax.numpy.linspace(-1.0, 1.0, 7, dtype="float64")
        out = arrays.gelu(x)
        assert out.dtype == np.float64
        assert_bitwise(bits(out), pykern.gelu(bits(x)))


def test_the_first_array_decides(jax):
    x = np.ones((2, 3), np.float32)
    assert kind(arrays.swiglu(to_jax(torch.ones(2, 3)), x)) in ("jaxlib", "jax")
    assert kind(arrays.swiglu(x, to_jax(torch.ones(2, 3)))) == "numpy"
    assert kind(arrays.swiglu(torch.ones(2, 3), x)) == "torch"


def test_jax_results_outlive_what_made_them(jax):
    x = to_jax(torch.linspace(-1, 1, 5000))
    results = [arrays.gelu(x) for _ in range(20)]
    gc.collect()
    expected = pykern.gelu(bits(x))
    for out in results:
        assert_bitwise(bits(out), expected)


def test_jax_arrays_that_are_still_being_computed(jax):
    """jax returns before the numbers are there."""
    slow = jax.jit(lambda a: 1e-3 * (a @ a @ a)[0])
    x = slow(jax.numpy.ones((600, 600)))
    out = arrays.relu(x)
    assert_bitwise(bits(out), pykern.relu(bits(x)))
    assert bits(out).gt(300).all()


# ---- memory that must not change


def caches(**changes):
    tensors = CASES["attention_with_kvcache"].tensors()
    return {key: x.numpy() for key, x in tensors.items()} | changes


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def test_jax_caches_are_not_written(jax):
    """JAX arrays are immutable. DLPack as jax speaks it does not say so."""
    given = caches()
    for name in ("k_cache", "v_cache"):
        cache = jax.numpy.asarray(given[name])
        before = np.array(cache)
        with pytest.raises(ValueError, match=f"attention_with_kvcache: {name} is a JAX array, which is immutable, but"):
            arrays.attention_with_kvcache(**(given | {name: cache}))
        np.testing.assert_array_equal(np.asarray(cache), before)
    for name in ("k", "v"):
        del given[name]
    attend = arrays.attention_with_kvcache
    out = attend(**{key: jax.numpy.asarray(x) for key, x in given.items()})  # nothing is written without k and v
    np.testing.assert_array_equal(np.asarray(out), attend(**given))


UNWRITABLE = {
    "read-only": (read_only, "k_cache is read-only or may be, but k and v are written into it"),
    "read-only, by DLPack": (lambda a: OfLibrary(read_only(a)), "k_cache is read-only or may be"),
    "backwards": (lambda a: a[::-1], "k_cache has a negative stride; pass a copy"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_caches_that_cannot_be_written(case):
    make, words = UNWRITABLE[case]
    cache = make(caches()["k_cache"])
    with pytest.raises(ValueError, match="^attention_with_kvcache: " + words):
        arrays.attention_with_kvcache(**caches(k_cache=cache))


def test_the_kernels_refuse_to_write_to_jax(jax):
    out = jax.numpy.zeros(3)
    with pytest.raises(ValueError, match="relu: out is read-only"):
        _C.activation_forward(np.ones(3, np.float32), out, kind="relu")
    assert not np.asarray(out).any()


def test_read_only_inputs():
    x = read_only(np.linspace(-1, 1, 6, dtype=np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(arrays.gelu(x), pykern.gelu(torch.tensor(x)).numpy())


# ---- views, and what is refused


@pytest.mark.parametrize("wrap", [lambda a: a, OfLibrary])
@pytest.mark.parametrize(
    "view", [np.s_[::-1], np.s_[:, ::-1], np.s_[::2], np.s_[:, ::2], np.s_[1:, 2:], np.s_[:0], np.s_[0, 0]]
)
def test_views(view, wrap):
    x = np.random.default_rng(0).standard_normal((4, 6))[view]
    out = arrays.silu(wrap(np.asarray(x)))
    assert kind(out) == ("numpy" if wrap is not OfLibrary else "library")
    assert_bitwise(bits(out), pykern.silu(torch.tensor(np.array(x))))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
def test_labels_of_any_width(dtype):
    logits = np.random.default_rng(0).standard_normal((3, 5))
    found = arrays.cross_entropy(logits, np.array([0, 4, 2], dtype))
    assert_bitwise(bits(found), pykern.cross_entropy(torch.from_numpy(logits), torch.tensor([0, 4, 2])))


def test_wrong_dtypes_are_refused_by_the_op():
    with pytest.raises(TypeError, match="gelu: x has dtype int64, expected float32, float64, bfloat16 or float16"):
        arrays.gelu(np.arange(3))
    with pytest.raises(TypeError, match="embedding: ids has dtype float64"):
        arrays.embedding(np.ones((3, 2)), np.ones(2))
    with pytest.raises(TypeError, match="swiglu: up has dtype float32 but gate has float64"):
        arrays.swiglu(np.ones(3), np.ones(3, np.float32))


class Lonely(Wrapped):
    """Of a module that has no from_dlpack."""


REFUSED = {
    "a list": (lambda: arrays.gelu([1.0]), TypeError, "gelu: x must be a torch.Tensor, got list"),
    "masked": (lambda: arrays.gelu(np.ma.ones(3)), TypeError, "gelu: x is a masked array; pass its data"),
    "big-endian": (lambda: arrays.gelu(np.ones(3, ">f4")), TypeError, "gelu: x cannot be borrowed: BufferError: "),
    "text": (lambda: arrays.gelu(np.array(["a"])), TypeError, "gelu: x cannot be borrowed: BufferError: "),
    "no library": (
        lambda: arrays.gelu(Lonely(np.ones(3))),
        TypeError,
        r"gelu: x is a Lonely, whose library has no from_dlpack to return a result with; pass numpy.from_dlpack\(x\)",
    ),
    "another device": (
        lambda: arrays.gelu(Elsewhere8(np.ones(3))),
        ValueError,
        r"gelu: x is on an unsupported device \(DLPack type 8\), expected CPU or CUDA",
    ),
    "a gradient": (
        lambda: arrays.gelu(torch.ones(3, requires_grad=True)),
        RuntimeError,
        "gelu: x requires a gradient, which pykern.arrays has not; call pykern.gelu",
    ),
    "in a sequence": (
        lambda: arrays.merge_attention([np.ones((1, 1, 2, 3)), np.ma.ones((1, 1, 2, 3))], [np.ones((1, 1, 2))] * 2),
        TypeError,
        r"merge_attention: outs\[1\] is a masked array",
    ),
    "too few arguments": (lambda: arrays.swiglu(np.ones(3)), TypeError, "missing a required argument: 'up'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    call, error, words = REFUSED[case]
    with pytest.raises(error, match="^" + words):
        call()


def test_an_array_on_a_gpu_that_torch_does_not_have(monkeypatch):
    """CuPy's kind: it says so before anything is asked of it."""
    array = OnCuda(np.ones(3))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"gelu: x is on a GPU, but torch.cuda.is_available\(\) is False"):
        arrays.gelu(array)
    assert not hasattr(array, "asked")


def test_a_library_without_array_namespace_is_found_by_its_module(monkeypatch):
    """CuPy before version 14: cupy.ndarray of the module cupy, which has from_dlpack."""
    import sys
    from types import ModuleType

    module = ModuleType("cupylike")
    module.from_dlpack = OfLibrary.from_dlpack
    monkeypatch.setitem(sys.modules, "cupylike", module)
    older = type("ndarray", (Wrapped,), {"__module__": "cupylike._core.core"})
    assert_bitwise(bits(arrays.relu(older(np.array([-1.0, 2.0])))), torch.tensor([0.0, 2.0]).double())


@pytest.mark.parametrize("transform", ["jit", "grad", "vmap"])
def test_jax_transforms_are_refused(transform, jax):
    """Before any number: a gradient would be lost without a word."""
    words = r"gelu: x is traced by jax \(jit, grad, vmap\): pykern.arrays takes arrays with numbers in them"
    with pytest.raises(TypeError, match=words):
        getattr(jax, transform)(lambda x: arrays.gelu(x).sum())(jax.numpy.ones(3))


def test_documented_example(jax):
    """docs/arrays.md: its code runs, in order."""
    page = (Path(__file__).parent.parent / "docs" / "arrays.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 3
    names = {}
    for code in blocks:
        exec(compile(code, "docs/arrays.md", "exec"), names)
