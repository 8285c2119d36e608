"""The compiled kernels. Arrays are torch tensors, numpy arrays or anything with ``__dlpack__``.

Outputs are written in place.

Every function checks type, dtype, device, shape, stride and overlap before it writes anything: TypeError (not an array,
wrong or mixed dtype), ValueError (shape, stride, device, overlap, option), IndexError (index out of range).
Dimensions: B batch, H query heads, G key/value heads, T queries, S keys, D head size, E value head size,
M rows, K inputs, N outputs, V vocabulary. "..." stands for any leading dimensions. Unless a dtype is given, it is that
of the first argument: float32, float64, bfloat16 or float16. A *stat* is float32 (float64 when the first argument is
float64).
"""

from collections.abc import Sequence
from typing import Any

Array = Any
Activation = str  # "none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid"

# ---- runtime
def isa() -> str: ...
def isas() -> list[tuple[str, bool]]:
    """(name, runs on this processor) of every ISA built in, best first."""

def panel_width() -> int:
    """Rows of a weight that lie side by side in a panel of LmModel, on the ISA in use."""

def pairs_bf16() -> bool:
    """Whether that ISA multiplies pairs of bfloat16: they then lie side by side in a panel."""

def num_threads() -> int: ...
def set_num_threads(n: int) -> None:
    """0 = follow the OpenMP runtime (torch.set_num_threads)."""

def cuda_status() -> str:
    """ "not built", or what the CUDA kernels are built for and whether they can run here."""

def cuda_kernels() -> list[str]:
    """The functions here that take CUDA tensors; empty in a build without CUDA."""

def borrow_path(array: Array) -> str:
    """How this array crosses the boundary: "exchange", "numpy" or "dlpack"."""

def large_result(size: Sequence[int], dtype: str) -> object:
    """A DLPack capsule of CPU memory on huge pages, not initialised; what is given back is kept for the next one.
    ValueError: a negative size, or too many numbers. TypeError: another dtype. MemoryError: there is none."""

def kept_results() -> int:
    """Bytes kept for large results that nobody has at present."""

# ---- attention: out = softmax(mask(scale q k^T + bias)) v
def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    bias: Array | None,
    out: Array,
    lse: Array | None,
    *,
    causal: bool,
    scale: float,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0.0,
    seed: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
) -> None:
    """q [B,H,T,D]  k [B,G,S,D]  v [B,G,S,E]  mask bool, bias: already expanded to [B,H,T,S] (stride 0 allowed)
    out [B,H,T,E]  lse [B,H,T] stat or float64: in float64 the gradient of large scores is as accurate as others.
    window_left, window_right: keys seen on either side of the diagonal S - T + t, -1 = all; causal: right = 0.
    alibi_slopes float32, expanded to [B,H]; sinks [H]; seed int64, one element; softcap 0 = none.
    cu_seqlens_q, cu_seqlens_k int32 [sequences+1]: q [1,H,total,D] holds the sequences one after the other."""

def attention_backward(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    bias: Array | None,
    out: Array,
    lse: Array,
    dout: Array,
    dlse: Array | None,
    dq: Array,
    dk: Array,
    dv: Array,
    dbias: Array | None,
    dsinks: Array | None = None,
    *,
    causal: bool,
    scale: float,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0.0,
    seed: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
) -> None:
    """dlse [B,H,T] stat or float64. dbias has rank 4 and the *unexpanded* bias sizes (each B, H, T, S or 1).
    dsinks [H]."""

def attention_weights(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    bias: Array | None,
    lse: Array,
    rows: Array | None,
    weights: Array,
    *,
    causal: bool,
    scale: float,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_p: float = 0.0,
    seed: Array | None = None,
    cu_seqlens_q: Array | None = None,
    cu_seqlens_k: Array | None = None,
) -> None:
    """weights [B,H,n,S] = exp(score - lse) of the queries in rows (int64 [n]; None: all T), 0 where masked, without
    dropout."""

def attention_dropout(seed: Array, keep: Array, *, dropout_p: float) -> None:
    """keep bool [B,H,T,S], contiguous: False where dropout with this seed takes a weight away."""

def attention_with_kvcache(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    k: Array | None,
    v: Array | None,
    cache_seqlens: Array,
    rotary_cos: Array | None,
    rotary_sin: Array | None,
    out: Array,
    lse: Array | None,
    *,
    causal: bool,
    scale: float,
    rotary_interleaved: bool,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    block_table: Array | None = None,
    cache_leftpad: Array | None = None,
) -> None:
    """q [B,H,T,D]  k_cache [B,G,C,D]  v_cache [B,G,C,E], with block_table [B,n] int32 [pages,G,page,D|E]
    k, v: T new keys, written at cache_seqlens [B] int32 (length before the append)
    rotary_cos, rotary_sin [positions, R/2], R <= D: rotates k at positions cache_seqlens + t, q at the last T.
    cache_leftpad [B] int32: slots in front of a sequence's first key, which is at position 0; they are never read."""

# ---- linear: out = activation(x weight^T + bias) + residual. tf32, here and in mlp and linear_cross_entropy: products
#      of float32 on CUDA round their factors to 10 bits behind the point; elsewhere it changes nothing
def linear_forward(
    x: Array,
    weight: Array,
    bias: Array | None,
    residual: Array | None,
    out: Array,
    pre: Array | None,
    *,
    activation: Activation,
    tf32: bool = False,
) -> None:
    """x [...,K]  weight [N,K]  bias [N]  residual, out, pre [...,N]; pre receives x weight^T + bias."""

def linear_backward(
    x: Array,
    weight: Array,
    pre: Array | None,
    dout: Array,
    dx: Array | None,
    dweight: Array | None,
    dbias: Array | None,
    *,
    activation: Activation,
    tf32: bool = False,
) -> None:
    """Gradients not wanted are None. pre is needed unless activation is "none"."""

# ---- mlp: out = h down_weight^T + down_bias + residual,  up = x up_weight^T + up_bias,
#      h = activation(up), or with a gate, gate = x gate_weight^T + gate_bias,  h = activation(gate) up
def mlp_forward(
    x: Array,
    up_weight: Array,
    up_bias: Array | None,
    gate_weight: Array | None,
    gate_bias: Array | None,
    down_weight: Array,
    down_bias: Array | None,
    residual: Array | None,
    out: Array,
    up: Array | None,
    gate: Array | None,
    *,
    activation: Activation,
    tf32: bool = False,
) -> None:
    """x [...,K]  up_weight, gate_weight [H,K]  down_weight [N,H]  residual, out [...,N]; up, gate [...,H] are written
    for the backward pass unless None. Beside a bfloat16 or float16 x, weights, biases and residual may be float32;
    out has residual's dtype, else x's."""

def mlp_backward(
    x: Array,
    up_weight: Array,
    gate_weight: Array | None,
    down_weight: Array,
    up: Array,
    gate: Array | None,
    dout: Array,
    dx: Array | None,
    dup_weight: Array | None,
    dup_bias: Array | None,
    dgate_weight: Array | None,
    dgate_bias: Array | None,
    ddown_weight: Array | None,
    ddown_bias: Array | None,
    *,
    activation: Activation,
    tf32: bool = False,
) -> None:
    """Gradients not wanted are None. dout has out's dtype, dx x's, a weight's gradient that of the weight."""

# ---- norm
def layer_norm_forward(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    out: Array,
    sum: Array | None,
    mean: Array,
    rstd: Array,
    *,
    eps: float,
) -> None:
    """h = x + residual (stored in sum);  out = (h - mean) rstd weight + bias.
    x, residual, out, sum [...,D]  mean, rstd [...] stat."""

def layer_norm_backward(
    h: Array,
    weight: Array | None,
    mean: Array,
    rstd: Array,
    dout: Array,
    dsum: Array | None,
    dh: Array,
    dweight: Array | None,
    dbias: Array | None,
) -> None:
    """dh is the gradient of x and of residual; dsum is the gradient that reached sum."""

def rms_norm_forward(
    x: Array, weight: Array | None, residual: Array | None, out: Array, sum: Array | None, rstd: Array, *, eps: float
) -> None: ...
def rms_norm_backward(
    h: Array, weight: Array | None, rstd: Array, dout: Array, dsum: Array | None, dh: Array, dweight: Array | None
) -> None: ...

# ---- softmax over the last dimension; mask bool, same shape as x after expansion, True = take part;
#      a fully masked row is 0; mask may have stride 0 in its last dimension: one value for a whole row
def softmax_forward(x: Array, mask: Array | None, out: Array) -> None: ...
def softmax_backward(out: Array, dout: Array, dx: Array) -> None: ...

# ---- activation: out = f(x), elementwise
def activation_forward(x: Array, out: Array, *, kind: Activation) -> None: ...
def activation_backward(x: Array, dout: Array, dx: Array, *, kind: Activation) -> None: ...
def swiglu_forward(gate: Array, up: Array, out: Array) -> None:
    """out = silu(gate) * up"""

def swiglu_backward(gate: Array, up: Array, dout: Array, dgate: Array, dup: Array) -> None: ...

# ---- rope: rotates pairs (i, i + R/2), or (2i, 2i+1) when interleaved, by the angle of its position;
#      R = 2 * cos.shape[1] <= D
def rope(
    x: Array, cos: Array, sin: Array, positions: Array | None, out: Array, *, interleaved: bool, inverse: bool
) -> None:
    """x, out [B,H,T,D]  cos, sin [P,R/2], x's dtype or stat  positions int64 [T] or [B,T], None = 0..T-1
    inverse rotates back (the gradient)."""

# ---- embedding
def embedding_forward(weight: Array, ids: Array, out: Array) -> None:
    """weight [V,D]  ids int64 or int32 [...]  out [...,D]"""

def embedding_backward(ids: Array, dout: Array, dweight: Array) -> None:
    """Overwrites dweight; rows of a token are added in the order of their positions."""

# ---- cross_entropy, one loss per row: lse - (1-e) x[y] - e mean(x) + z_loss lse^2, 0 where target == ignore_index
def cross_entropy_forward(
    logits: Array, target: Array, loss: Array, lse: Array, *, ignore_index: int, label_smoothing: float, z_loss: float
) -> None:
    """logits [...,V]  target int64 [...]  loss [...] stat  lse [...] stat or float64, 0 where ignored"""

def cross_entropy_backward(
    logits: Array,
    target: Array,
    lse: Array,
    dloss: Array,
    dlogits: Array,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    """dloss [...] stat: the gradient of each row's loss. dlogits may be logits itself.
    With lse in float64, logits far from 0 have a gradient as accurate as others."""

def linear_cross_entropy(
    x: Array,
    weight: Array,
    bias: Array | None,
    target: Array,
    loss: Array | None,
    dloss: Array | None,
    dx: Array | None,
    dweight: Array | None,
    dbias: Array | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    tf32: bool = False,
) -> None:
    """x [M,K]  weight [V,K]  bias [V]  loss, dloss [M] stat; gradients that are given need dloss."""

# ---- sample: the next token of each row: greedy, or a draw from softmax(logits / temperature) after what cuts its tail
def sample(
    logits: Array,
    seeds: Array,
    draws: Array,
    history: Array | None,
    counts: Array | None,
    ids: Array,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
) -> None:
    """logits [B,V]  seeds, draws int64 [B]: row b's draw is a function of its seed and of how many it has drawn
    history int64 [B,n], of which the first counts [B] tokens of a row are penalised; both None: nothing is
    ids int64 [B], out; -1 where a logit is NaN or the largest one is infinite
    temperature 0: greedy, the lowest id among equals. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 do nothing."""

# ---- language model: all layers of pykern.lm's Transformer in one call
class LmModel:
    def __init__(self, model: dict[str, Any], layers: list[dict[str, Any]]) -> None:
        """Borrows what pykern.lm.weights.compiled_model puts together: vectors and tables, packed matrices, and the
        caches k_cache, v_cache [pages,G,page,D] of each layer, which step() and generate() write."""

    def step(self, tokens: Array, first_rows: Array, lengths: Array, block_table: Array, logits: Array | None) -> None:
        """tokens int64 [R]: those of text s are rows first_rows[s] .. first_rows[s+1] - 1, first_rows int32 [texts+1]
        lengths int32 [texts], before these tokens  block_table int32 [texts,n]: the pages of each text
        logits [R,V], or of the last row of each text [texts,V], in the dtype of the embedding: float32 or bfloat16"""

    def generate(
        self,
        tokens: Array,
        first_rows: Array,
        lengths: Array,
        block_table: Array,
        ids: Array,
        *,
        seeds: Array,
        draws: Array,
        history: Array | None = None,
        counts: Array | None = None,
        stop_tokens: Array | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> int:
        """step() and sample() for every column of ids int64 [texts,n]; returns how many columns it wrote: fewer than n
        when a text draws one of stop_tokens int64, or -1. Every text has one token. draws, counts and history, which
        has room for n more, go up with it."""

# ---- adamw: decoupled weight decay, bias-corrected; one pass over memory
def adamw(
    states: list[tuple[Array, Array, Array, Array, Array | None]],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    scale: Array | None = None,
) -> None:
    """In place, for each (param, grad, exp_avg, exp_avg_sq, master) of states. grad has param's dtype; exp_avg,
    exp_avg_sq and master are stats (float32 for bfloat16 param). grad is multiplied by grad_scale first, and by scale
    [1] float64; where their product is not finite, nothing changes."""

def square_sum(x: list[Array], out: Array) -> None:
    """out[i] = sum of x[i]^2, out [len(x)] float64, in the same bits for any thread count."""

# ---- roofline: loops that do nothing but multiply, read or copy; the caller holds the watch. One task per element
# of sink.
def roofline_fma(sink: Array, *, repeats: int) -> float:
    """sink [tasks], any floating dtype: chains of multiply-adds as the kernels of its dtype use; returns the
    operations done."""

def roofline_read(source: Array, sink: Array, *, repeats: int) -> None:
    """source float32 [n], read repeats times, each task its part; sink float32 [tasks] receives the sums."""

def roofline_copy(source: Array, target: Array, *, tasks: int, repeats: int) -> None:
    """source, target float32 [n]"""
