"""embedding: lookup, gradient in a fixed order, ids of any kind, same bits, torch, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pykern
import pykern.ops  # registers torch.ops.pykern
from pykern import _C
from pykern.testing import assert_bitwise, assert_close, ratios, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def draw(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def some_ids(V, *shape, dtype=torch.int64, seed=7):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradient(function, weight, ids, dout):
    weight = weight.clone().requires_grad_()
    out = function(weight, ids)
    return out.detach(), torch.autograd.grad(out, weight, dout.to(out.dtype))[0]


# (V, D, shape of ids): one of each; a scalar id; odd width; the width of a small GPT; every token often; most never
CASES = [(1, 1, (1,)), (5, 3, ()), (7, 33, (2, 3)), (50, 768, (3, 20)), (3, 17, (400,)), (3000, 5, (2, 2, 9))]


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_its_formula(dtype, kind):
    for V, D, shape in CASES:
        weight, ids = draw(V, D, dtype=dtype), some_ids(V, *shape, dtype=kind)
        dout = draw(*shape, D, dtype=dtype, seed=1)
        out, dweight = gradient(pykern.embedding, weight, ids, dout)
        assert_bitwise(out, weight[ids.long()], name=f"{V, D, shape}")
        _, wanted = gradient(reference.embedding, weight.double(), ids.long(), dout)
        assert_close(dweight, wanted, name=f"{V, D, shape} dweight", gradient=True)
        unused = torch.ones(V, dtype=torch.bool).index_fill(0, ids.long().flatten(), False)
        assert_bitwise(dweight[unused], torch.zeros_like(dweight[unused]), name="rows of unused tokens")


def test_gradcheck():
    weight, ids = draw(6, 4).requires_grad_(), torch.tensor([[0, 5, 5], [2, 0, 5]])
    assert torch.autograd.gradcheck(lambda w: pykern.embedding(w, ids), (weight,))


@pytest.mark.parametrize("dtype", ratios.DTYPES)
def test_ratio_rule(dtype):
    ratios.assert_ratio("embedding", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_token_are_added_in_order(dtype):
    """The bits of a plain running sum, in float32 or float64, rounded once."""
    ids, dout = some_ids(3, 500), draw(500, 19, dtype=dtype, seed=1)
    _, dweight = gradient(pykern.embedding, draw(3, 19, dtype=dtype), ids, dout)
    wide = dout if dtype == torch.float64 else dout.float()
    expected = torch.zeros_like(wide[:3])
    for token, row in zip(ids.tolist(), wide, strict=True):
        expected[token] += row
    assert_bitwise(dweight, expected.to(dtype))


def test_bits_of_a_row_are_copied():
    """NaN with its payload, -0 and subnormal numbers; a token that occurs once gets its gradient unchanged."""
    bits = torch.tensor([[0x7FC00123, -0x80000000, 1, 0x3F800000]] * 2, dtype=torch.int32)
    weight = bits.view(torch.float32)
    out, dweight = gradient(pykern.embedding, weight, torch.tensor([1]), weight[1:])
    assert_bitwise(out.view(torch.int32), bits[1:])
    assert_bitwise(dweight.view(torch.int32), bits * torch.tensor([[0], [1]], dtype=torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_thread_count(dtype, with_threads):
    weight, ids, dout = draw(900, 70, dtype=dtype), some_ids(900, 2000), draw(2000, 70, dtype=dtype, seed=1)
    first = with_threads(1, lambda: gradient(pykern.embedding, weight, ids, dout))
    for n in (2, 3):
        again = with_threads(n, lambda: gradient(pykern.embedding, weight, ids, dout))
        for name, a, b in zip(("out", "dweight"), first, again, strict=True):
            assert_bitwise(a, b, name=f"{n} threads, {name}")


@given(
    V=st.integers(1, 9),
    D=st.integers(0, 40),
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([torch.int64, torch.int32]),
    weight_view=st.sampled_from(["packed", "gaps", "transposed", "expanded"]),
    ids_view=st.sampled_from(["packed", "steps", "transposed", "expanded"]),
)
def test_any_shape_and_strides(V, D, shape, dtype, kind, weight_view, ids_view):
    weight = dict(
        packed=lambda: draw(V, D, dtype=dtype),
        gaps=lambda: draw(2 * V, D + 3, dtype=dtype)[::2, 1 : D + 1],
        transposed=lambda: draw(D, V, dtype=dtype).T,
        expanded=lambda: draw(1, D, dtype=dtype).expand(V, D),
    )[weight_view]()
    ids = dict(
        packed=lambda: some_ids(V, *shape, dtype=kind),
        steps=lambda: some_ids(V, *shape, 3, dtype=kind)[..., 1],
        transposed=lambda: some_ids(V, *reversed(shape), dtype=kind).permute(tuple(reversed(range(len(shape))))),
        expanded=lambda: some_ids(V, dtype=kind).expand(shape),
    )[ids_view]()
    dout = draw(*shape, D, dtype=dtype, seed=1)
    out, dweight = gradient(pykern.embedding, weight, ids, dout)
    assert_bitwise(out, weight[ids.long()], name="out")
    copies = weight.clone(memory_format=torch.contiguous_format), ids.clone(memory_format=torch.contiguous_format)
    assert_bitwise(dweight, gradient(pykern.embedding, *copies, dout)[1], name="dweight")
    assert_close(
        dweight, gradient(reference.embedding, weight.double(), ids.long(), dout)[1], name="dweight", gradient=True
    )


def test_expanded_and_strided_gradients():
    """sum() sends an expanded gradient; a slice of a wider one has gaps."""
    weight, ids = draw(4, 6).requires_grad_(), torch.tensor([1, 3, 1])
    pykern.embedding(weight, ids).sum().backward()
    assert weight.grad.tolist() == [[0.0] * 6, [2.0] * 6, [0.0] * 6, [1.0] * 6]
    rows = np.full((3, 14), 7.0)
    _C.embedding_forward(weight.detach(), ids, rows[:, 4:10])
    assert_bitwise(torch.from_numpy(rows[:, 4:10].copy()), weight.detach()[ids])
    assert (rows[:, :4] == 7.0).all() and (rows[:, 10:] == 7.0).all()


@pytest.mark.one_isa
def test_opcheck():
    weight, ids = draw(5, 3, dtype=torch.float32), torch.tensor([[0, 4], [4, 1]])
    torch.library.opcheck(torch.ops.pykern.embedding.default, (weight, ids))
    torch.library.opcheck(torch.ops.pykern.embedding.default, (weight.clone().requires_grad_(), ids))
    torch.library.opcheck(torch.ops.pykern.embedding_backward.default, (ids, draw(2, 2, 3), 5))


@pytest.mark.one_isa
@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def f(weight, ids):
        return pykern.embedding(weight, ids) * 2

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (3, 4):
        weight, ids, dout = draw(6, 4), some_ids(6, n), draw(n, 4, seed=1)
        for a, b in zip(gradient(f, weight, ids, dout), gradient(compiled, weight, ids, dout), strict=True):
            assert_bitwise(a, b)


@pytest.mark.one_isa
def test_second_derivative_is_refused():
    weight = draw(5, 3).requires_grad_()
    (dweight,) = torch.autograd.grad(
        pykern.embedding(weight, torch.arange(3)).square().sum(), weight, create_graph=True
    )
    with pytest.raises(RuntimeError, match="pykern::embedding has no second derivative"):
        dweight.sum().backward()


@pytest.mark.one_isa
def test_refusals():
    weight, ids = torch.ones(5, 3), torch.tensor([0, 1])
    cases = [
        (lambda: pykern.embedding([1.0], ids), TypeError, "embedding: weight must be a torch.Tensor, got list"),
        (lambda: pykern.embedding(weight, [0, 1]), TypeError, "embedding: ids must be a torch.Tensor, got list"),
        (
            lambda: pykern.embedding(weight, weight),
            TypeError,
            "embedding: ids has dtype float32, expected int64 or int32",
        ),
        (lambda: pykern.embedding(weight, ids.to(torch.uint8)), TypeError, "embedding: ids has dtype uint8, expected"),
        (
            lambda: pykern.embedding(ids.view(2, 1), ids),
            TypeError,
            "embedding: weight has dtype int64, expected float32",
        ),
        (
            lambda: pykern.embedding(torch.ones(5), ids),
            ValueError,
            r"embedding: weight must be \[V, D\], got shape \[5\]",
        ),
        (lambda: pykern.embedding(weight, ids + 4), IndexError, "embedding: ids contains 5, but weight has 5 rows"),
        (lambda: pykern.embedding(weight, ids - 1), IndexError, "embedding: ids contains -1, but weight has 5 rows"),
        (
            lambda: pykern.embedding(weight, ids.int() + 7),
            IndexError,
            "embedding: ids contains 7, but weight has 5 rows",
        ),
        (
            lambda: pykern.embedding(torch.ones(0, 3), ids),
            IndexError,
            "embedding: ids contains 0, but weight has 0 rows",
        ),
        (
            lambda: pykern.embedding(weight, ids + 2**40),
            IndexError,
            "embedding: ids contains 1099511627776, but weight",
        ),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


@pytest.mark.one_isa
def test_nothing_is_written_when_the_last_id_is_out_of_range():
    weight, ids = np.ones((5, 3), np.float32), np.array([[0, 1], [2, 5]])
    out, dweight = np.full((2, 2, 3), 7, np.float32), np.full((5, 3), 7, np.float32)
    with pytest.raises(IndexError, match="embedding: ids contains 5, but weight has 5 rows"):
        _C.embedding_forward(weight, ids, out)
    with pytest.raises(IndexError, match="embedding: ids contains 5, but dweight has 5 rows"):
        _C.embedding_backward(ids, np.ones((2, 2, 3), np.float32), dweight)
    with pytest.raises(ValueError, match=r"embedding: ids has shape \[2\], expected that of out without its last"):
        _C.embedding_forward(weight, ids[0], out)
    with pytest.raises(ValueError, match=r"embedding: out has shape \[2, 2, 3\], expected D = 2 in dimension 2"):
        _C.embedding_forward(weight[:, :2], ids, out)
    with pytest.raises(ValueError, match="embedding: dweight shares memory with dout"):
        _C.embedding_backward(np.zeros(5, np.int64), dweight, dweight)
    assert (out == 7).all() and (dweight == 7).all()
