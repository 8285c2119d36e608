"""What the tests of attention share: inputs, and the comparison of every result and gradient with the formula."""

import pytest
import torch
from philox import kept
from tools import EMULATED, draw, with_gradients

import pykern
from pykern.testing import assert_close, reference


def inputs(T, S, D=16, E=None, B=1, H=1, G=None, dtype=torch.float64, seed=0):
    """q, k, v, and dout."""
    G, E = G or H, D if E is None else E
    shapes = dict(q=(B, H, T, D), k=(B, G, S, D), v=(B, G, S, E))
    tensors = {name: draw(*shape, dtype=dtype, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    return tensors, draw(B, H, T, E, dtype=dtype, seed=seed + 3)


def ragged_inputs(queries, keys, D=16, E=None, H=1, G=None, dtype=torch.float64, seed=0):
    """q, k, v of sequences end to end, dout, and cu_seqlens_q, cu_seqlens_k, from the sequences' lengths."""
    G, E = G or H, D if E is None else E
    shapes = dict(q=(sum(queries), H, D), k=(sum(keys), G, D), v=(sum(keys), G, E))
    tensors = {name: draw(*shape, dtype=dtype, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    offsets = [torch.tensor([0, *n]).cumsum(0).int() for n in (queries, keys)]
    return (
        tensors,
        draw(sum(queries), H, E, dtype=dtype, seed=seed + 3),
        dict(cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1]),
    )


def too_wide(tensors, **options):
    """Whether the heads are wider than those of CUDA's kernels, which then refuse them."""
    D, E = tensors["q"].shape[-1], tensors["v"].shape[-1]
    if not EMULATED or max(D, E) <= 256:
        return False
    with pytest.raises(ValueError, match=f"attention: head sizes {D} and {E} must be at most 256 on CUDA"):
        pykern.attention(**tensors, **options)
    return True


def named(attention, **options):
    """attention(..., return_lse=True) with its results by name."""
    return lambda **tensors: dict(zip(("out", "lse"), attention(**tensors, return_lse=True, **options), strict=True))


def attend(tensors, dout, dlse=None, **options):
    """out, lse and the gradients of all floating tensors, by name, from pykern."""
    douts = dict(out=dout) if dlse is None else dict(out=dout, lse=dlse)
    return with_gradients(named(pykern.attention, **options), tensors, douts)


def _formula_options(tensors, options):
    """The reference takes what dropout keeps in place of the seed."""
    if "seed" not in options:
        return options
    sizes = (tensors["q"].shape[0], tensors["q"].shape[1], tensors["q"].shape[2], tensors["k"].shape[2])
    if "cu_seqlens_q" in options:
        queries, keys = (options[f"cu_seqlens_{name}"].diff() for name in "qk")
        sizes = (len(queries), tensors["q"].shape[1], int(queries.max()), int(keys.max()))
    keep = kept(options["seed"], *sizes, options["dropout_p"])
    return {name: x for name, x in options.items() if name != "seed"} | dict(keep=keep)


def both(tensors, dout, dlse=None, **options):
    """Everything pykern computes, and the same in float64."""
    douts = dict(out=dout) if dlse is None else dict(out=dout, lse=dlse)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in tensors.items()}
    formula = named(reference.attention, **_formula_options(tensors, options))
    return attend(tensors, dout, dlse, **options), with_gradients(formula, exact, douts)


def _bias_scale(tensors, dout, dlse, options):
    """The largest term in a gradient of bias, which adds up dS: where bias is the same for all keys of a row, they
    cancel, to an exact 0. And dS = P (dP - delta) itself cancels where a row sees one key."""
    B, H, T = tensors["q"].shape[:3]
    expanded = tensors | dict(bias=tensors["bias"].expand(B, H, T, tensors["k"].shape[2]))
    exact = both(expanded, dout, dlse, **options)[1]
    terms, delta = exact["dbias"].abs().sum_to_size(tensors["bias"].shape), (exact["out"] * dout).sum(-1).abs()
    return max([x.max().item() for x in (terms, delta) if x.numel()], default=0.0)


def _sinks_scale(sinks, exact, dout, dlse):
    """The largest sum of what a gradient of sinks adds up, without signs: exp(sink - lse) (dlse - sum(dout out))."""
    delta = (exact["out"] * dout).abs().sum(-1)
    if delta.dim() == 2:
        delta = delta.T  # ragged: [total, H]
    share = (sinks.double()[:, None] - exact["lse"]).exp()
    terms = share * (delta if dlse is None else delta + dlse.abs())
    return terms.sum(-1).sum_to_size(len(sinks)).max().item()


def compare(tensors, dout, dlse=None, name="", **options):
    """Every element of every result and gradient against float64."""
    ours, exact = both(tensors, dout, dlse, **options)
    lse_dtype = torch.float64 if dout.dtype == torch.float64 else torch.float32
    for tensor, x in ours.items():
        assert x.dtype == (lse_dtype if tensor == "lse" else dout.dtype)
        scale = None
        if tensor in ("dq", "dk"):
            # dS = P (dP - delta) cancels, and delta holds the rounding of out: errors are as large as the terms of dS
            scale = max([exact[t].abs().max().item() for t in ("dq", "dk", "dv") if exact[t].numel()], default=0.0)
        if tensor == "dbias":
            scale = _bias_scale(tensors, dout, dlse, options)
        if tensor == "dsinks":
            scale = _sinks_scale(tensors["sinks"], exact, dout, dlse)
        assert_close(x, exact[tensor], name=f"{name} {tensor}", gradient=tensor[0] == "d", scale=scale)


def op_arguments(op, **given):
    """The arguments of torch.ops.pykern.attention or attention_backward by name, all options off but those given."""
    off = dict(left=-1, right=-1, scale=0.5, softcap=0.0, dropout_p=0.0)
    names = [argument.name for argument in op._schema.arguments]
    assert set(given) <= set(names), f"{op} has no argument {set(given) - set(names)}"
    return tuple(given.get(name, off.get(name)) for name in names)


# ---- differentiated twice

HIDDEN_ROW = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]]).bool()


def small_inputs(T=3, S=4, D=2, E=3, B=1, H=2, G=1, dtype=torch.float64, bias=None, sinks=False, ragged=False):
    """The differentiable inputs by name; bias is its shape."""
    shapes = dict(q=(B, H, T, D), k=(B, G, S, D), v=(B, G, S, E))
    if ragged:
        shapes = dict(q=(T, H, D), k=(S, G, D), v=(S, G, E))
    shapes |= {} if bias is None else dict(bias=bias)
    shapes |= dict(sinks=(H,)) if sinks else {}
    return {name: draw(*shape, dtype=dtype, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def gradients(attention, tensors, dout, dlse=None, create_graph=True, **options):
    """The first gradients by name, differentiable in turn."""
    out, lse = attention(**tensors, return_lse=True, **options)
    outs, douts = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse.to(lse.dtype)])
    found = torch.autograd.grad(outs, [*tensors.values()], douts, create_graph=create_graph)
    return {f"d{name}": x for name, x in zip(tensors, found, strict=True)}


def second(attention, tensors, dout, dlse=None, poison=None, **options):
    """The gradients of sum(g * weights) over the first gradients g, by q, k, v, bias, sinks, dout and dlse.

    poison(weights) changes the weights, which have the names and shapes of tensors.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    given = {name: x.detach().requires_grad_() for name, x in (("dout", dout), ("dlse", dlse)) if x is not None}
    first = gradients(attention, leaves, **given, **options)
    weights = {name: draw(*x.shape, dtype=x.dtype, seed=20 + i) for i, (name, x) in enumerate(leaves.items())}
    if poison is not None:
        poison(weights)
    wanted = leaves | given
    found = torch.autograd.grad([*first.values()], [*wanted.values()], [*weights.values()], materialize_grads=True)
    return {f"dd{name}": x for name, x in zip(wanted, found, strict=True)}
