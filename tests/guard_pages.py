"""Kernels on arrays that border on a page which must not be touched.

`python tests/guard_pages.py attention` runs every case of one op, in every dtype, with every array pushed against the
page before or behind it: reading or writing one byte outside of an array ends the process with a segmentation fault.
Results must have the bits that they have elsewhere. `python tests/guard_pages.py broken` is the proof that it bites.
"""

import ctypes
import mmap
import sys

import torch
from tools import DTYPES, draw

from pykern import _C
from pykern.testing import assert_bitwise

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(x, side):
    """x in memory of its own whose first ("before") or last ("behind") byte borders on a forbidden page."""
    if x is None or x.numel() == 0:
        return x
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    size = span * x.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (0, pages + 1):
        if libc.mprotect(start + page * mmap.PAGESIZE, mmap.PAGESIZE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = mmap.PAGESIZE if side == "before" else (pages + 1) * mmap.PAGESIZE - size
    flat = torch.frombuffer(memory, dtype=x.dtype, count=span, offset=offset)
    return flat.as_strided(x.shape, x.stride()).copy_(x)


def padded(x):
    """Rows further apart than they are long, as in a view of a wider tensor."""
    return torch.empty(*x.shape[:-1], x.shape[-1] + 5, dtype=x.dtype)[..., : x.shape[-1]].copy_(x)


def stat(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(name, forward, inputs, outputs):
    """forward(**arrays) with arrays as they are, then against pages; the outputs must agree."""
    plain = {n: x.clone(memory_format=torch.preserve_format) if x is not None else None for n, x in outputs.items()}
    forward(**inputs, **plain)
    for side in ("before", "behind"):
        for layout in (lambda x: x, padded):
            place = lambda x, side=side, layout=layout: None if x is None else guarded(layout(x), side)  # noqa: E731
            placed = {n: place(x) if x is None or x.dim() > 1 else guarded(x, side) for n, x in inputs.items()}
            results = {n: place(x) if x is None or x.dim() > 1 else guarded(x, side) for n, x in outputs.items()}
            forward(**placed, **results)
            for n, x in plain.items():
                if x is not None:
                    assert_bitwise(x, results[n], name=f"{name}: {n} {side}")


def attention(dtype):
    cases = [(1, 1, 1, 1), (13, 65, 7, 5), (5, 63, 33, 80), (97, 129, 1, 3), (2, 15, 16, 17), (3, 200, 64, 31)]
    for T, S, D, E in cases:
        for causal in (False, True):
            q, k, v = draw(2, 4, T, D), draw(2, 2, S, D, seed=1), draw(2, 2, S, E, seed=2)
            mask, bias = draw(2, 4, T, S, seed=3) > -1, draw(2, 4, T, S, seed=4)
            inputs = dict(q=q, k=k, v=v, mask=mask, bias=bias)
            inputs = {n: x if x.dtype == torch.bool else x.to(dtype) for n, x in inputs.items()}
            outputs = dict(out=torch.zeros(2, 4, T, E, dtype=dtype), lse=torch.zeros(2, 4, T, dtype=stat(dtype)))

            def forward(causal=causal, **arrays):
                _C.attention_forward(*arrays.values(), causal=causal, scale=0.5)

            run("attention", forward, inputs, outputs)
            forward(**inputs, **outputs)
            saved = inputs | outputs | dict(dout=draw(2, 4, T, E, seed=5).to(dtype), dlse=draw(2, 4, T).to(stat(dtype)))
            gradients = {f"d{n}": torch.zeros_like(saved[n]) for n in ("q", "k", "v", "bias")}

            def backward(causal=causal, **arrays):
                _C.attention_backward(*arrays.values(), causal=causal, scale=0.5)

            run("attention_backward", backward, saved, gradients)


OPTIONS = dict(causal=True, scale=0.5, window_left=70, softcap=1.5, dropout_p=0.3, seed=torch.tensor([5]))


def attention_options(dtype):
    """Slopes and sinks, and two sequences end to end, the second of which starts within a vector."""
    for T, S, D, E in [(1, 1, 1, 1), (13, 65, 7, 5), (97, 129, 1, 3), (3, 200, 64, 31)]:
        for offsets in ({}, dict(cu_seqlens_q=[0, T // 3, T], cu_seqlens_k=[0, S // 3, S])):
            B = 1 if offsets else 2
            inputs = dict(q=draw(B, 4, T, D), k=draw(B, 2, S, D, seed=1), v=draw(B, 2, S, E, seed=2))
            inputs = {n: x.to(dtype) for n, x in inputs.items()}
            inputs |= dict(alibi_slopes=draw(2, 4).float(), sinks=draw(4, seed=3).to(dtype))
            inputs |= {n: torch.tensor(x, dtype=torch.int32) for n, x in offsets.items()}
            outputs = dict(out=torch.zeros(B, 4, T, E, dtype=dtype), lse=torch.zeros(B, 4, T, dtype=stat(dtype)))

            def forward(q, k, v, out, lse, **options):
                _C.attention_forward(q, k, v, None, None, out, lse, **OPTIONS, **options)

            run("attention", forward, inputs, outputs)
            forward(**inputs, **outputs)
            saved = inputs | outputs | dict(dout=draw(B, 4, T, E, seed=5).to(dtype), dlse=draw(B, 4, T).to(stat(dtype)))
            gradients = {f"d{n}": torch.zeros_like(saved[n]) for n in ("q", "k", "v", "sinks")}

            def backward(q, k, v, out, lse, dout, dlse, dq, dk, dv, dsinks, **options):
                arrays = (q, k, v, None, None, out, lse, dout, dlse, dq, dk, dv, None, dsinks)
                _C.attention_backward(*arrays, **OPTIONS, **options)

            run("attention_backward", backward, saved, gradients)


def forbid(x, count):
    """A copy of x whose first `count` bytes, whole pages, must not be touched."""
    size = -(-x.numel() * x.element_size() // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size)
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel()).view(x.shape).copy_(x)
    if libc.mprotect(ctypes.addressof(ctypes.c_char.from_buffer(memory)), count, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    return copy


def unseen(dtype):
    """Tiles of keys that no window reaches, and those that a mask hides from all rows of a block, are never read: by
    few rows (1 query of 2 heads) or by many."""
    D, hidden = 16, mmap.PAGESIZE // 32  # keys, of whole tiles, that fill whole pages in every dtype
    S = hidden + 100
    mask = torch.arange(S) >= hidden
    for T in (1, 20, 97):
        q, k, v = (draw(1, n, rows, D, seed=n).to(dtype) for n, rows in ((2, T), (1, S), (1, S)))
        dout, dlse = draw(1, 2, T, D, seed=3).to(dtype), draw(1, 2, T).to(stat(dtype))
        cases = dict(window=(None, dict(window_left=100 - T, window_right=0)))  # the first row begins at key `hidden`
        cases["mask"] = mask.expand(1, 2, T, S), {}
        for name, (mask4, options) in cases.items():
            results = []
            for place in (torch.clone, lambda x: forbid(x, hidden * D * x.element_size())):
                keys = (place(k), place(v), mask4, None)
                out, lse = torch.zeros_like(dout), torch.zeros_like(dlse)
                _C.attention_forward(q, *keys, out, lse, causal=False, scale=0.5, **options)
                gradients = [torch.zeros_like(x) for x in (q, k, v)]
                arguments = (q, *keys, out, lse, dout, dlse, *gradients, None)
                _C.attention_backward(*arguments, causal=False, scale=0.5, **options)
                results.append([out, lse, *gradients])
            for x, y in zip(*results, strict=True):
                assert_bitwise(x, y, name=name)


def dtypes_beside(dtype):
    """Of weights, biases and residual beside an x of dtype."""
    return (dtype, torch.float32) if dtype in (torch.bfloat16, torch.float16) else (dtype,)


def linear(dtype):
    for M, N, K in [(1, 1, 1), (13, 33, 17), (5, 7, 129), (25, 65, 31), (3, 100, 1030), (200, 5, 3)]:
        for wide in dtypes_beside(dtype):
            inputs = dict(x=draw(M, K), weight=draw(N, K, seed=1), bias=draw(N, seed=2), residual=draw(M, N, seed=3))
            inputs = {n: x.to(dtype if n == "x" else wide) for n, x in inputs.items()}
            outputs = dict(out=torch.zeros(M, N, dtype=wide), pre=torch.zeros(M, N, dtype=dtype))
            run("linear", lambda **a: _C.linear_forward(*a.values(), activation="gelu"), inputs, outputs)
            pre, dout = inputs["residual"].to(dtype), inputs["residual"].neg()
            saved = dict(x=inputs["x"], weight=inputs["weight"], pre=pre, dout=dout)
            gradients = {f"d{n}": torch.zeros_like(inputs[n]) for n in ("x", "weight", "bias")}
            run("linear_backward", lambda **a: _C.linear_backward(*a.values(), activation="gelu"), saved, gradients)


def mlp(dtype):
    names = ("x", "up_weight", "up_bias", "gate_weight", "gate_bias", "down_weight", "down_bias", "residual")
    for M, K, H, N in [
        (1, 1, 1, 1),
        (13, 17, 33, 5),
        (5, 129, 7, 31),
        (25, 31, 65, 3),
        (3, 9, 1030, 7),
        (200, 3, 5, 2),
    ]:
        shapes = dict(zip(names, ((M, K), (H, K), (H,), (H, K), (H,), (N, H), (N,), (M, N)), strict=True))
        for wide in dtypes_beside(dtype):
            inputs = {n: draw(*s, seed=i).to(wide if n != "x" else dtype) for i, (n, s) in enumerate(shapes.items())}
            kept = {n: torch.zeros(M, H, dtype=dtype) for n in ("up", "gate")}
            outputs = dict(out=torch.zeros(M, N, dtype=wide)) | kept
            run("mlp", lambda **a: _C.mlp_forward(*a.values(), activation="gelu"), inputs, outputs)
            saved = {n: inputs[n] for n in ("x", "up_weight", "gate_weight", "down_weight")}
            saved |= {n: draw(M, H, seed=i).to(dtype) for i, n in enumerate(kept)} | dict(dout=inputs["residual"])
            gradients = {f"d{n}": torch.zeros_like(inputs[n]) for n in names[:-1]}
            run("mlp_backward", lambda **a: _C.mlp_backward(*a.values(), activation="gelu"), saved, gradients)


def decode(dtype):
    """The caches are as long as the last sequence needs: the slot behind it would be on the page."""
    for T, N, C, D, E, R in [
        (1, 1, 1, 1, 1, 0),
        (1, 1, 65, 33, 7, 16),
        (5, 5, 70, 64, 17, 64),
        (3, 2, 130, 80, 96, 10),
    ]:
        inputs = dict(q=draw(2, 4, T, D), k_cache=draw(2, 2, C, D, seed=1), v_cache=draw(2, 2, C, E, seed=2))
        inputs |= dict(k=draw(2, 2, N, D, seed=3), v=draw(2, 2, N, E, seed=4))
        inputs = {n: x.to(dtype) for n, x in inputs.items()}
        inputs["cache_seqlens"] = torch.tensor([max(T - N, C // 2 - N, 0), C - N], dtype=torch.int32)
        inputs |= {f"rotary_{n}": draw(C, R // 2, seed=5).to(dtype) if R else None for n in ("cos", "sin")}
        outputs = dict(out=torch.zeros(2, 4, T, E, dtype=dtype), lse=torch.zeros(2, 4, T, dtype=stat(dtype)))

        def forward(**arrays):
            _C.attention_with_kvcache(*arrays.values(), causal=True, scale=0.5, rotary_interleaved=False)

        run("attention_with_kvcache", forward, inputs, outputs)


def linear_cross_entropy(dtype):
    options = dict(ignore_index=-100, label_smoothing=0.1, z_loss=0.01)
    for M, V, K in [(1, 1, 1), (13, 33, 17), (5, 1030, 31), (3, 2049, 7)]:
        for wide in dtypes_beside(dtype):
            inputs = dict(x=draw(M, K).to(dtype), weight=draw(V, K, seed=1).to(wide), bias=draw(V, seed=2).to(wide))
            inputs["target"] = torch.arange(M) * 7919 % V
            given = inputs | dict(dloss=draw(M).to(stat(dtype)))
            outputs = dict(loss=torch.zeros(M, dtype=stat(dtype)))
            gradients = {f"d{n}": torch.zeros_like(inputs[n]) for n in ("x", "weight", "bias")}

            def head(x, weight, bias, target, loss=None, dloss=None, dx=None, dweight=None, dbias=None):
                _C.linear_cross_entropy(x, weight, bias, target, loss, dloss, dx, dweight, dbias, **options)

            run("linear_cross_entropy", head, inputs, outputs)
            run("linear_cross_entropy with gradients", head, given, outputs | gradients)


def broken(dtype):
    """relu told that its input is one number longer than it is."""
    x = guarded(torch.ones(16, dtype=dtype), "behind")
    longer = torch.as_strided(x, (16,), (1,), x.storage_offset())
    address = ctypes.cast(longer.data_ptr(), ctypes.POINTER(ctypes.c_char))
    print(address[16 * x.element_size() - 1] is not None, flush=True)
    address[16 * x.element_size()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for dtype in DTYPES:
        globals()[sys.argv[1]](dtype)
    print(f"{sys.argv[1]} ran on {_C.isa()}")
