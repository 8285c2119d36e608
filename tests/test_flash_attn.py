"""flash_attn_*: FlashAttention-2's signatures and layouts against its formula in float64. Caches:
test_flash_attn_kvcache.py."""

import inspect
import math
from itertools import pairwise

import pytest
import torch
from tools import DTYPES, draw, with_gradients

import pykern
from pykern.testing import assert_bitwise, assert_close


def formula(q, k, v, *, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None):
    """(out [B, T, H, E], lse [B, H, T]) of FlashAttention-2's docstring, in float64, all scores in memory."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    T, S = q.shape[2], k.shape[2]
    distance = torch.arange(T)[:, None] + S - T - torch.arange(S)
    scores = q @ k.mT * (q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.double().expand(q.shape[0], q.shape[1])
        scores = scores - slopes[:, :, None, None] * distance.abs()
    left, right = window_size
    seen = torch.ones(T, S, dtype=torch.bool)
    if left >= 0:
        seen &= distance <= left
    if causal or right >= 0:
        seen &= -distance <= (0 if causal else right)
    scores = scores.masked_fill(~seen, -math.inf)
    dead = ~seen.any(-1) if S else torch.ones(T, dtype=torch.bool)
    weights = torch.softmax(scores.masked_fill(dead[:, None], 0.0), -1).masked_fill(~seen, 0.0)
    lse = torch.logsumexp(scores.masked_fill(dead[:, None], 0.0), -1).masked_fill(dead, -math.inf)
    return (weights @ v).transpose(1, 2), lse


def ragged(q, k, v, cu_q, cu_k, *, alibi_slopes=None, **options):
    """The formula for each sequence of [total, H, D]: out [total, H, E], lse [H, total]."""
    outs, lses = [], []
    for b, (q0, q1, k0, k1) in enumerate(zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False)):
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        out, lse = formula(q[None, q0:q1], k[None, k0:k1], v[None, k0:k1], alibi_slopes=slopes, **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, -1)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def inputs(T=9, S=13, B=2, H=4, G=2, D=6, E=5, dtype=torch.float64):
    shapes = dict(q=(B, T, H, D), k=(B, S, G, D), v=(B, S, G, E))
    return {name: draw(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def compare(ours, exact, tensors, name, gradients_of_lse=True):
    """Results and all gradients, also through the second result; both functions give (out, lse, ...)."""
    pair = {}
    for who, function in (("ours", ours), ("exact", exact)):
        with torch.no_grad():
            out, lse = function(**tensors)[:2]
        dtype = next(iter(tensors.values())).dtype
        douts = dict(out=draw(*out.shape, dtype=dtype, seed=8))
        if gradients_of_lse:
            douts["lse"] = draw(*lse.shape, seed=9).masked_fill(lse.isinf(), 0.0)
        run = lambda function=function, **t: dict(zip(("out", "lse"), function(**t)[:2], strict=True))  # noqa: E731
        pair[who] = with_gradients(run, tensors, douts)
    exact = pair["exact"]
    scale = max([x.abs().max().item() for n, x in exact.items() if n[0] == "d" and x.numel()], default=1.0)
    for tensor, x in pair["ours"].items():
        gradient = tensor[0] == "d"
        assert_close(x, exact[tensor], name=f"{name} {tensor}", gradient=gradient, scale=scale if gradient else None)
    return pair["ours"]


SLOPES = torch.tensor([0.5, 0.25, 0.0, 1.0])
OPTIONS = {
    "nothing": {},
    "scale": dict(softmax_scale=-0.7),
    "causal": dict(causal=True),
    "window": dict(window_size=(3, 2)),
    "left window": dict(window_size=(3, -1)),
    "right window": dict(window_size=(-1, 1)),
    "causal window": dict(causal=True, window_size=(4, 0)),
    "causal closes the right side": dict(causal=True, window_size=(-1, 5)),
    "no window": dict(window_size=[-1, -1]),
    "one key": dict(window_size=(0, 0)),
    "softcap": dict(softcap=0.8),
    "slopes [H]": dict(alibi_slopes=SLOPES),
    "slopes [B, H]": dict(alibi_slopes=torch.stack([SLOPES, SLOPES.flip(0)]), causal=True),
    "all": dict(alibi_slopes=SLOPES, softcap=2.0, causal=True, window_size=(5, -1), softmax_scale=0.3),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("T, S", [(9, 13), (13, 9), (1, 13), (0, 3), (3, 0)])
def test_flash_attn_func(name, T, S):
    """Causal and window hang on the lower right corner: T < S and T > S tell the corners apart."""
    options = OPTIONS[name]
    compare(
        lambda **t: pykern.flash_attn_func(**t, **options, return_attn_probs=True),
        lambda **t: formula(**t, **options),
        inputs(T, S),
        name,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_layout(dtype):
    """Of the dtypes FlashAttention refuses, too; results contiguous as [B, T, H, E]."""
    tensors = inputs(30, 70, dtype=dtype)
    ours = compare(
        lambda **t: pykern.flash_attn_func(**t, causal=True, return_attn_probs=True),
        lambda **t: formula(**t, causal=True),
        tensors,
        f"{dtype}",
    )
    assert ours["out"].dtype == dtype and ours["out"].is_contiguous()
    assert ours["lse"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_return_attn_probs():
    tensors = inputs()
    out, lse, mask = pykern.flash_attn_func(**tensors, return_attn_probs=True)
    assert mask is None and out.shape == (2, 9, 4, 5) and lse.shape == (2, 4, 9)
    assert_bitwise(pykern.flash_attn_func(**tensors), out)
    assert_bitwise(pykern.flash_attn_func(**tensors, deterministic=True), out)


@pytest.mark.parametrize("name", OPTIONS)
def test_packed(name):
    """qkv [B, S, 3, H, D] and kv [B, S, 2, G, D] are read where they lie; one gradient for the whole."""
    options = dict(OPTIONS[name], return_attn_probs=True)
    qkv, q, kv = draw(2, 11, 3, 4, 6), draw(2, 7, 4, 6), draw(2, 11, 2, 2, 6)
    split = lambda qkv: pykern.flash_attn_func(*qkv.unbind(2), **options)  # noqa: E731
    whole = compare(lambda qkv: pykern.flash_attn_qkvpacked_func(qkv, **options), split, dict(qkv=qkv), name)
    assert whole["dqkv"].shape == qkv.shape
    split_kv = lambda q, kv: pykern.flash_attn_func(q, *kv.unbind(2), **options)  # noqa: E731
    compare(lambda q, kv: pykern.flash_attn_kvpacked_func(q, kv, **options), split_kv, dict(q=q, kv=kv), f"{name}, kv")


@pytest.mark.parametrize("name", OPTIONS)
def test_varlen(name):
    """Sequences of different lengths, some without queries or keys; slopes for each when there are [B, H]."""
    options = dict(OPTIONS[name])
    cu_q, cu_k = (0, 5, 5, 14, 15), (0, 3, 7, 20, 20)
    if "slopes [B, H]" in name:
        options["alibi_slopes"] = draw(4, 4).abs().float()
    tensors = dict(q=draw(15, 4, 6), k=draw(20, 2, 6, seed=1), v=draw(20, 2, 5, seed=2))
    ends = (int32(*cu_q), int32(*cu_k), 9, 13)
    ours = lambda q, k, v: pykern.flash_attn_varlen_func(  # noqa: E731
        q, k, v, *ends, **options, return_attn_probs=True
    )
    results = compare(ours, lambda **t: ragged(**t, cu_q=cu_q, cu_k=cu_k, **options), tensors, name)
    assert results["out"].shape == (15, 4, 5) and results["lse"].shape == (4, 15)
    # keys of the same sequences in pages of 4 slots, in no order, of a pool that holds NaN elsewhere
    pages = {n: torch.full((9, 4, *tensors[n].shape[1:]), math.nan, dtype=torch.float64) for n in ("k", "v")}
    table = int32(*[7, 0, 0, 0], *[2, 0, 0, 0], *[8, 5, 1, 3], *[0, 0, 0, 0]).view(4, 4)
    for b, (first, last) in enumerate(pairwise(cu_k)):
        for at in range(last - first):
            for n, pool in pages.items():
                pool[table[b, at // 4], at % 4] = tensors[n][first + at]
    paged = lambda q, k, v: pykern.flash_attn_varlen_func(  # noqa: E731
        q, k, v, *ends, **options, return_attn_probs=True, block_table=table
    )
    leaves = dict(q=tensors["q"], **pages)
    out, lse, _ = paged(**leaves)
    assert_bitwise(out, results["out"])
    assert_bitwise(lse, results["lse"])
    gradients = with_gradients(lambda **t: dict(out=paged(**t)[0]), leaves, dict(out=torch.ones(15, 4, 5)))
    plain = with_gradients(lambda **t: dict(out=ours(**t)[0]), tensors, dict(out=torch.ones(15, 4, 5)))
    assert_bitwise(gradients["dk"][table[2, 0]], plain["dk"][7:11])
    assert (gradients["dk"][4] == 0).all() and (gradients["dv"][7, 3] == 0).all()  # not listed; behind the end


def test_varlen_packed():
    cu = int32(0, 3, 3, 11)
    qkv, q, kv = draw(11, 3, 4, 6), draw(11, 4, 6), draw(11, 2, 2, 6)
    options = dict(causal=True, alibi_slopes=SLOPES, softcap=3.0, return_attn_probs=True)
    compare(
        lambda qkv: pykern.flash_attn_varlen_qkvpacked_func(qkv, cu, 8, **options),
        lambda qkv: pykern.flash_attn_varlen_func(*qkv.unbind(1), cu, cu, 8, 8, **options),
        dict(qkv=qkv),
        "qkv",
    )
    compare(
        lambda q, kv: pykern.flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 8, 8, **options),
        lambda q, kv: pykern.flash_attn_varlen_func(q, *kv.unbind(1), cu, cu, 8, 8, **options),
        dict(q=q, kv=kv),
        "kv",
    )


def test_dropout():
    """Repeatable by torch.manual_seed; weights are kept or gone, also one sequence after the other."""
    q, k, v = (
        draw(2, 30, 3, 8),
        draw(2, 40, 3, 8),
        torch.eye(40, dtype=torch.float64)[None, :, None].expand(2, 40, 3, 40),
    )
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    ends = (int32(0, 30, 60), int32(0, 40, 80), 30, 40)
    for f in (
        lambda p: pykern.flash_attn_func(q, k, v, p),
        lambda p: pykern.flash_attn_varlen_func(*flat, *ends, p),
    ):
        weights = f(0.0)
        torch.manual_seed(0)
        dropped, other = f(0.3), f(0.3)
        torch.manual_seed(0)
        assert_bitwise(f(0.3), dropped)
        kept = dropped != 0
        assert not torch.equal(dropped, other)
        assert_close(dropped, weights * kept / 0.7, name="kept weights")
        assert abs(kept.double().mean().item() - 0.7) < 4 * math.sqrt(0.21 / kept.numel())


# ---- signatures of flash_attn 2.8, by memory of its source: the arguments in order, with their defaults

COMMON = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, "
    "deterministic=False, return_attn_probs=False"
)
ENDS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"q, k, v, {COMMON}",
    "flash_attn_kvpacked_func": f"q, kv, {COMMON}",
    "flash_attn_qkvpacked_func": f"qkv, {COMMON}",
    "flash_attn_varlen_func": f"q, k, v, {ENDS}, {COMMON}, block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q, kv, {ENDS}, {COMMON}",
    "flash_attn_varlen_qkvpacked_func": f"qkv, cu_seqlens, max_seqlen, {COMMON}",
    "flash_attn_with_kvcache": "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False",
}


@pytest.mark.one_isa
@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    expected = inspect.signature(eval(f"lambda {SIGNATURES[name]}: None"))
    ours = inspect.signature(getattr(pykern, name))
    assert [(p.name, p.default, p.kind) for p in ours.parameters.values()] == [
        (p.name, p.default, p.kind) for p in expected.parameters.values()
    ]


@pytest.mark.one_isa
@pytest.mark.slow
def test_compile_fullgraph():
    tensors, options = inputs(), dict(causal=True, window_size=(4, -1), alibi_slopes=SLOPES)
    compiled = torch.compile(pykern.flash_attn_func, fullgraph=True, backend="aot_eager")
    dout = dict(out=torch.ones(2, 9, 4, 5))
    ours, eager = (
        with_gradients(lambda f=f, **t: dict(out=f(**t, **options)), tensors, dout)
        for f in (compiled, pykern.flash_attn_func)
    )
    for name, x in ours.items():
        assert_bitwise(x, eager[name], name=name)


# ---- refusals


@pytest.mark.one_isa
def test_refusals():
    ones, f = torch.ones, pykern.flash_attn_func
    q, k, v = ones(2, 5, 4, 3), ones(2, 7, 2, 3), ones(2, 7, 2, 6)
    types = [
        (lambda: f([1.0], k, v), "q must be a torch.Tensor, got list"),
        (lambda: f(q, k.to_sparse(), v), "k must be a dense tensor, got a sparse_coo one"),
        (lambda: f(q, k.double(), v), "k has dtype float64 but q has float32"),
        (lambda: f(q.int(), k.int(), v.int()), "q has dtype int32, expected float32, float64, bfloat16 or float16"),
        (lambda: f(q, k, v, window_size=(None, 1)), r"window_size is \(None, 1\), expected integers, -1 for no limit"),
        (lambda: f(q, k, v, alibi_slopes=[0.5] * 4), "alibi_slopes must be a torch.Tensor, got list"),
        (lambda: f(q, k, v, alibi_slopes=ones(4).double()), "alibi_slopes has dtype float64, expected float32"),
    ]
    values = [
        (lambda: f(q[0], k, v), r"q must be \[B, S, H, D\], got shape \[5, 4, 3\]"),
        (lambda: f(q, k, v[0]), r"v must be \[B, S, H, D\], got shape \[7, 2, 6\]"),
        (lambda: f(q, v, v), "k has head size 6 but q has 3"),
        (lambda: f(q, k, v[:, :6]), r"v has shape \[2, 6, 2, 6\] but k has \[2, 7, 2, 3\]"),
        (lambda: f(q, k, v[:, :, :1]), r"v has shape \[2, 7, 1, 6\] but k has \[2, 7, 2, 3\]"),
        (lambda: f(q[:, :, :3], k, v), "q has 3 heads, which is not a multiple of the 2 heads of k"),
        (lambda: f(q, k[:, :, :0], v[:, :, :0]), "q has 4 heads, which is not a multiple of the 0 heads of k"),
        (lambda: f(q, k[:1], v[:1]), "k has a batch of 1 but q of 2"),
        (lambda: f(q, k, v, 1.5), "dropout_p is 1.5, expected 0..1"),
        (lambda: f(q, k, v, softmax_scale=math.inf), "softmax_scale is inf, expected a finite number"),
        (lambda: f(q, k, v, window_size=3), r"window_size is 3, expected \(left, right\), -1 for no limit"),
        (lambda: f(q, k, v, softcap=-1.0), "softcap is -1, expected a positive number, or 0 for none"),
        (lambda: f(q, k, v, alibi_slopes=ones(3)), r"alibi_slopes has shape \[3\], expected \[4\] or \[2, 4\]"),
        (lambda: f(q, k, v, alibi_slopes=ones(4).requires_grad_()), "alibi_slopes takes no gradient; pass -slopes"),
    ]
    for error, cases in ((TypeError, types), (ValueError, values)):
        for call, words in cases:
            with pytest.raises(error, match=f"^flash_attn_func: {words}"):
                call()
    packed = [
        (lambda: pykern.flash_attn_qkvpacked_func(q), r"_qkvpacked_func: qkv must be \[B, S, 3, H, D\], got shape \[2"),
        (lambda: pykern.flash_attn_qkvpacked_func(q[:, :, None]), r"_qkvpacked_func: qkv must be \[B, S, 3, H, D\], g"),
        (lambda: pykern.flash_attn_kvpacked_func(q, k), r"_kvpacked_func: kv must be \[B, S, 2, G, D\], got shape \[2"),
    ]
    for call, words in packed:
        with pytest.raises(ValueError, match=f"^flash_attn{words}"):
            call()


@pytest.mark.one_isa
def test_refusals_of_varlen():
    ones = torch.ones
    q, k, v = ones(5, 4, 3), ones(7, 2, 3), ones(7, 2, 6)
    pool, ends, keys = ones(3, 4, 2, 3), int32(0, 2, 5), int32(0, 3, 7)
    table = int32(0, 1, 2, 0).view(2, 2)

    def f(q=q, k=k, v=v, cu_q=ends, cu_k=keys, **options):
        return pykern.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 4, **options)

    types = [
        (lambda: f(cu_q=[0, 2, 5]), "cu_seqlens_q must be a torch.Tensor, got list"),
        (lambda: f(cu_q=ends.long()), "cu_seqlens_q has dtype int64, expected int32"),
        (
            lambda: f(k=pool, v=pool, block_table=table.long()),
            r"cu_seqlens_k and block_table have dtypes torch\.int32",
        ),
    ]
    values = [
        (lambda: f(q=q[None]), r"q must be \[total, H, D\], got shape \[1, 5, 4, 3\]"),
        (lambda: f(cu_q=int32(0, 2, 4)), "cu_seqlens_q ends with 4, expected the 5 rows of q"),
        (lambda: f(cu_q=int32(0, 6, 5)), r"cu_seqlens_q\[2\] is 5, less than the 6 before it"),
        (lambda: f(cu_k=int32(0, 7)), r"cu_seqlens_k has shape \[2\], expected that of cu_seqlens_q = 3"),
        (lambda: f(alibi_slopes=ones(3, 4)), r"alibi_slopes has shape \[3, 4\], expected \[4\] or \[2, 4\]"),
        (lambda: f(block_table=table), r"k must be \[pages, page, G, D\] with block_table, got shape \[7, 2, 3\]"),
        (lambda: f(k=pool, v=pool[:2], block_table=table), r"v has pages of shape \[2, 4\] but k of \[3, 4\]"),
        (lambda: f(k=pool, v=pool, block_table=table[:1]), r"block_table must be \[N, n\] and cu_seqlens_k \[N \+ 1\]"),
        (
            lambda: f(k=pool, v=pool, cu_k=int32(0, 9, 10), block_table=table),
            r"cu_seqlens_k has lengths \[9, 1\], but block_table has room for 0\.\.8 keys a sequence",
        ),
    ]
    indices = [
        (lambda: f(k=pool, v=pool, block_table=table + 1), r"block_table lists pages 1\.\.3, but k has 3"),
        (lambda: f(k=pool, v=pool, block_table=table - 1), r"block_table lists pages -1\.\.1, but k has 3"),
    ]
    for error, cases in ((TypeError, types), (ValueError, values), (IndexError, indices)):
        for call, words in cases:
            with pytest.raises(error, match=f"^flash_attn_varlen_func: {words}"):
                call()
