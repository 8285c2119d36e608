"""save_hf without transformers: the models that it refuses, what it overwrites, the dtype that it writes."""

import pytest
import torch
from lm_models import SHAPES, make

from pykern.lm import Transformer, load_hf, save_hf
from pykern.lm.huggingface import MODEL

pytestmark = pytest.mark.one_isa

SHAPES_REFUSED = {
    "alibi": ({"positions": "alibi"}, "positions is 'alibi', but GPT-2 has 'learned' and Llama 'rope'"),
    "gpt2 with rmsnorm": ({"norm": "rmsnorm"}, "written as GPT-2, whose norm is 'layernorm', not 'rmsnorm'"),
    "gpt2 with a gate": ({"activation": "swiglu"}, "whose activation is 'gelu' or .*, not 'swiglu'"),
    "gpt2 with grouped heads": ({"n_kv_head": 2}, "GPT-2 has as many key heads as heads, 4, not 2"),
    "llama with layernorm": ({"positions": "rope", "activation": "swiglu"}, "Llama, whose norm is 'rmsnorm'"),
    "llama with relu": ({"positions": "rope", "norm": "rmsnorm", "activation": "relu"}, "whose activation is 'swiglu'"),
    "qk_norm": ({**SHAPES["llama"], "qk_norm": True}, "Llama does not normalise queries and keys"),
}


@pytest.mark.parametrize("case", SHAPES_REFUSED)
def test_models_that_are_neither_gpt2_nor_llama_are_not_saved(case, tmp_path):
    changes, message = SHAPES_REFUSED[case]
    with pytest.raises(ValueError, match=f"^save_hf: .*{message}"):
        save_hf(make(**changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_save_hf_overwrites_nothing(tmp_path):
    (tmp_path / "out").mkdir()
    save_hf(make(), tmp_path / "out")  # an empty folder is taken
    before = (tmp_path / "out" / MODEL).read_bytes()
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        save_hf(make(seed=1), tmp_path / "out")
    assert (tmp_path / "out" / MODEL).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_in_bfloat16_is_written_in_float32(tmp_path):
    model = make(dtype=torch.bfloat16)
    save_hf(model, tmp_path / "out")
    back, _ = load_hf(tmp_path / "out")
    assert isinstance(back, Transformer)
    assert torch.equal(back.transformer.wte.weight, model.transformer.wte.weight.float())
