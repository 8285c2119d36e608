"""A Transformer language model on pykern's kernels: tokenizers, batches, training, checkpoints, generation.

Names are imported when first used, so that tokenizing a file, say, does not import torch.
"""

from importlib import import_module
from typing import Any

_MODULE_OF = {
    "Batches": "batches",
    "Config": "config",
    "Corpus": "corpus",
    "Data": "data",
    "Documents": "documents",
    "Evaluation": "evaluation",
    "KVCache": "kvcache",
    "NGram": "ngram",
    "PackedBatches": "documents",
    "PaddedBatches": "documents",
    "Progress": "batching",
    "RNNConfig": "rnn",
    "RNNLM": "rnn",
    "Sampler": "sampling",
    "Sampling": "sampling",
    "Session": "session",
    "Template": "prompting",
    "Tokenizer": "tokenizer",
    "TrainOptions": "options",
    "Trainer": "trainer",
    "Transformer": "model",
    "beam_search": "beam",
    "classify": "prompting",
    "evaluate": "evaluation",
    "generate": "session",
    "load_hf": "huggingface",
    "log_probabilities": "scoring",
    "save_gguf": "export",
    "save_hf": "huggingface",
    "save_npz": "export",
    "score": "scoring",
    "speculate": "speculative",
    "train": "trainer",
    "validation_batches": "batches",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'pykern.lm' has no attribute {name!r}")
    return getattr(import_module(f"pykern.lm.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
