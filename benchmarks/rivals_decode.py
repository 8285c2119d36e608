"""Rivals of a pykern.lm session: other programs that read and continue texts, each with the weights of one model.

Every one is greedy and keeps its keys and values as it does for its own users. None is imported before it is built.
"""

import functools
import importlib.metadata
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.plain_gpt import PlainGPT
from pykern.lm import Transformer, save_gguf, save_hf

LLAMA_CPP_ERROR = 4  # of ggml_log_level


class Rival:
    """B texts with a model's weights. What one call returns may be overwritten by the next."""

    needs: ClassVar[tuple[str, ...]] = ()  # distributions and modules of the same name, beyond torch
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    steps = True  # whether one token after a context can be timed

    def __init__(self, plain: PlainGPT, model: Transformer, B: int, dtype: str) -> None:
        """plain is model with the weights in dtype, where torch has that dtype; model is float32."""

    def forward(self, ids: Tensor, past: int) -> Tensor:
        """Logits [B, V] after ids [B, T] at positions past, past + 1, ...; what was kept from past on is forgotten."""
        raise NotImplementedError(f"{type(self).__name__} only reads and continues texts")

    def prefill(self, ids: Tensor) -> Tensor:
        """Logits [B, V] after the texts ids [B, T], in an empty cache."""
        return self.forward(ids, 0)

    def step(self, ids: Tensor, past: int) -> Tensor:
        """Logits [B, V] after one more token per text, ids [B]."""
        return self.forward(ids[:, None], past)

    def generate(self, ids: Tensor, n: int) -> Tensor:
        """Tokens [B, 1 + n]: the first ones, ids [B, 1], and n more."""
        out = [ids[:, 0]]
        for past in range(n):
            out.append(self.step(out[-1], past).argmax(-1))
        return torch.stack(out, 1)


class Torch(Rival):
    """PlainGPT, into a cache that has room for all."""

    dtypes = ("float32", "bfloat16")

    def __init__(self, plain: PlainGPT, model: Transformer, B: int, dtype: str) -> None:
        self.model = plain
        self.caches = plain.caches(B, plain.wte.weight.dtype)

    @torch.no_grad()
    def forward(self, ids: Tensor, past: int) -> Tensor:
        return F.linear(self.model.hidden(ids, self.caches, past)[:, -1], self.model.wte.weight)


class Transformers(Rival):
    """GPT2LMHeadModel of transformers, its generate() and the cache that it uses by default, which grows."""

    needs = ("transformers",)
    dtypes = ("float32", "bfloat16")

    def __init__(self, plain: PlainGPT, model: Transformer, B: int, dtype: str) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as their_logging

        their_logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            save_hf(model, f"{folder}/model")
            kind = getattr(torch, dtype)
            self.model: Any = AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=kind).eval()
        self.cache: Any = None

    @torch.no_grad()
    def forward(self, ids: Tensor, past: int) -> Tensor:
        from transformers import DynamicCache

        if past == 0:
            self.cache = DynamicCache(config=self.model.config)
        elif self.cache.get_seq_length() > past:
            self.cache.crop(past - self.cache.get_seq_length())
        return self.model(ids, cache=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def generate(self, ids: Tensor, n: int) -> Tensor:
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)


class OnnxRuntime(Rival):
    """onnxruntime, inputs and outputs bound once, keys and values appended in place: see onnx_gpt."""

    needs = ("onnxruntime", "onnx")

    def __init__(self, plain: PlainGPT, model: Transformer, B: int, dtype: str) -> None:
        import onnxruntime

        from benchmarks.onnx_gpt import gpt_onnx

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        graph = gpt_onnx(model).SerializeToString()
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        config = model.config
        shape = (B, config.n_head, config.block_size, config.head_size)
        self.caches = {f"{part}_{i}": torch.zeros(shape) for i in range(config.n_layer) for part in "kv"}
        self.lengths, self.total = torch.zeros(B, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        self.logits = torch.zeros(B, config.vocab_size)
        self.bound: dict[int, tuple[Tensor, Tensor, Any]] = {}  # by T

    def _bind(self, B: int, T: int) -> tuple[Tensor, Tensor, Any]:
        ids, positions = torch.zeros(B, T, dtype=torch.int64), torch.zeros(T, dtype=torch.int64)
        inputs = {"ids": ids, "positions": positions, "lengths": self.lengths, "total": self.total}
        inputs |= {f"past_{name}": cache for name, cache in self.caches.items()}
        outputs = {f"present_{name}": cache for name, cache in self.caches.items()} | {"logits": self.logits}
        binding = self.session.io_binding()
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, x in tensors.items():
                bind(name, "cpu", 0, x.numpy().dtype, list(x.shape), x.data_ptr())
        return ids, positions, binding

    def forward(self, ids: Tensor, past: int) -> Tensor:
        B, T = ids.shape
        if T not in self.bound:
            self.bound[T] = self._bind(B, T)
        own_ids, positions, binding = self.bound[T]
        own_ids.copy_(ids)
        torch.arange(past, past + T, out=positions)
        self.lengths.fill_(past + T - 1)
        self.total.fill_(past + T)
        self.session.run_with_iobinding(binding)
        return self.logits


@functools.cache
def _llama_cpp() -> Any:
    """The module, which from now on tells errors only."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: Any) -> None:
        if level == LLAMA_CPP_ERROR:
            print(text.decode(errors="replace"), end="", file=sys.stderr)

    llama_cpp.llama_log_set(log, None)
    llama_cpp.keep_log = log  # it is called for as long as the module is there
    return llama_cpp


class LlamaCpp(Rival):
    """llama.cpp on a file of save_gguf, without its flash attention, which has a cache of float16 only.

    The cache is float32 with float32 weights, else float16, its default; the other weights are of its own quantiser.
    """

    needs = ("llama_cpp_python", "gguf")
    dtypes = ("float32", "bfloat16", "int8", "int4")
    flash = False

    def __init__(self, plain: PlainGPT, model: Transformer, B: int, dtype: str) -> None:
        self.cpp = cpp = _llama_cpp()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "float32.gguf"
            save_gguf(model, path)
            self.model = self._load(path if dtype == "float32" else self._quantised(path, dtype))
        tokens = B * model.config.block_size
        options = cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_seq_max = tokens, tokens, B
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        kind = cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if self.flash else cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        options.flash_attn_type = kind
        if dtype == "float32" and not self.flash:
            options.type_k = options.type_v = cpp.GGML_TYPE_F32
        self.context = cpp.llama_init_from_model(self.model, options)
        self.memory = cpp.llama_get_memory(self.context)
        self.batch = cpp.llama_batch_init(tokens, 0, 1)
        self.vocab_size, self.laid_out = model.config.vocab_size, 0

    def _quantised(self, path: Path, dtype: str) -> Path:
        """A second file, of what llama.cpp calls BF16, Q8_0 or Q4_0."""
        options = self.cpp.llama_model_quantize_default_params()
        kinds = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
        options.ftype = getattr(self.cpp, f"LLAMA_FTYPE_MOSTLY_{kinds[dtype]}")
        out = path.with_name(f"{dtype}.gguf")
        if self.cpp.llama_model_quantize(bytes(path), bytes(out), options) != 0:
            raise RuntimeError(f"llama.cpp does not quantise the file to {dtype}")
        return out

    def _load(self, path: Path) -> Any:
        model = self.cpp.llama_model_load_from_file(bytes(path), self.cpp.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        return model

    def _lay_out(self, B: int, T: int) -> None:
        """Which text each token of a batch is of, and whose logits are wanted: the same in every call with this T."""
        self.batch.n_tokens, self.laid_out = B * T, T
        for i in range(B * T):
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, i // T
            self.batch.logits[i] = i % T == T - 1

    def forward(self, ids: Tensor, past: int) -> Tensor:
        B, T = ids.shape
        if self.laid_out != T:
            self._lay_out(B, T)
        token, pos = (np.ctypeslib.as_array(x, (B * T,)) for x in (self.batch.token, self.batch.pos))
        token[:] = ids.flatten().numpy()
        pos[:] = np.tile(np.arange(past, past + T), B)
        self.cpp.llama_memory_seq_rm(self.memory, -1, past, -1)
        status = self.cpp.llama_decode(self.context, self.batch)
        if status != 0:
            raise RuntimeError(f"llama.cpp: llama_decode returned {status}")
        return torch.from_numpy(np.ctypeslib.as_array(self.cpp.llama_get_logits(self.context), (B, self.vocab_size)))

    def __del__(self) -> None:
        if hasattr(self, "batch"):  # all three were made
            self.cpp.llama_batch_free(self.batch)
            self.cpp.llama_free(self.context)
            self.cpp.llama_model_free(self.model)


class LlamaCppFlash(LlamaCpp):
    """The same with its flash attention, which it takes by itself where it can."""

    flash = True


class CTranslate2(Rival):
    """ctranslate2. It tells tokens, no logits, and does not go on from a context: prefill is the first new token."""

    needs = ("ctranslate2",)
    dtypes = ("float32", "int8")
    steps = False

    def __init__(self, plain: PlainGPT, model: Transformer, B: int, dtype: str) -> None:
        import ctranslate2

        with tempfile.TemporaryDirectory() as folder:
            _ctranslate2_spec(model).save(folder)
            kind = {"float32": "float32", "int8": "int8_float32"}[dtype]
            self.generator = ctranslate2.Generator(folder, compute_type=kind, intra_threads=torch.get_num_threads())

    def _tokens(self, ids: Tensor, n: int) -> Tensor:
        """The n tokens [B, n] after ids [B, T]."""
        texts = [[str(token) for token in text] for text in ids.tolist()]
        found = self.generator.generate_batch(
            texts, max_length=n, min_length=n, end_token=[], include_prompt_in_result=False
        )
        return torch.tensor([text.sequences_ids[0] for text in found])

    def prefill(self, ids: Tensor) -> Tensor:
        return self._tokens(ids, 1)

    def generate(self, ids: Tensor, n: int) -> Tensor:
        return torch.cat([ids, self._tokens(ids, n)], 1)


def _ctranslate2_spec(model: Transformer) -> Any:
    """The model as ctranslate2's converter of GPT-2 lays it out. Token i is called "i"."""
    from ctranslate2.specs import Activation, TransformerDecoderModelSpec

    config, weights = model.config, {name: value.numpy() for name, value in model.state_dict().items()}
    spec = TransformerDecoderModelSpec.from_config(config.n_layer, config.n_head, activation=Activation.GELUTanh)
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = weights["transformer.wte.weight"]
    decoder.position_encodings.encodings = weights["transformer.wpe.weight"]
    norms, matrices = {"transformer.ln_f": decoder.layer_norm}, {}
    for i, layer in enumerate(decoder.layer):
        block, attention, mlp = f"transformer.h.{i}", layer.self_attention, layer.ffn
        norms |= {f"{block}.ln_1": attention.layer_norm, f"{block}.ln_2": mlp.layer_norm}
        matrices |= {f"{block}.attn.c_attn": attention.linear[0], f"{block}.attn.c_proj": attention.linear[1]}
        matrices |= {f"{block}.mlp.c_fc": mlp.linear_0, f"{block}.mlp.c_proj": mlp.linear_1}
    for name, part in norms.items():
        part.gamma, part.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]
    for name, part in matrices.items():
        part.weight, part.bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    spec.register_vocabulary([str(token) for token in range(config.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
    spec.config.layer_norm_epsilon = config.norm_epsilon
    spec.validate()
    spec.optimize()
    return spec


RIVALS: dict[str, type[Rival]] = {
    "torch": Torch,
    "transformers": Transformers,
    "onnxruntime": OnnxRuntime,
    "llama.cpp": LlamaCpp,
    "llama.cpp -fa": LlamaCppFlash,
    "ctranslate2": CTranslate2,
}


def versions() -> dict[str, str | None]:
    """The version of every distribution that a rival needs; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in dict.fromkeys(name for rival in RIVALS.values() for name in rival.needs):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def missing() -> dict[str, list[str]]:
    """The rivals that cannot take part, and the distributions that each lacks."""
    have = versions()
    lacks = {who: [name for name in rival.needs if have[name] is None] for who, rival in RIVALS.items()}
    return {who: names for who, names in lacks.items() if names}


def rivals(plain: PlainGPT, model: Transformer, B: int, dtype: str) -> dict[str, Rival]:
    """Those that are installed and compute in dtype."""
    absent = missing()
    able = {who: rival for who, rival in RIVALS.items() if who not in absent and dtype in rival.dtypes}
    return {who: rival(plain, model, B, dtype) for who, rival in able.items()}
