"""Checkpoints of pykern.lm: exact round trips, whole after a kill at any moment, hostile files refused."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_file_bytes

from pykern.lm import checkpoint
from pykern.lm.checkpoint import load_checkpoint, load_config, read_header, read_tensors, save_checkpoint
from pykern.lm.config import Config
from pykern.lm.tokenizer import Tokenizer

CONFIG = Config(n_layer=1, n_head=2, n_embd=8, block_size=4, vocab_size=256)
TENSORS = {"wte.weight": torch.arange(12.0).reshape(3, 4), "bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).tolist() if tensor.numel() else []


def save(folder, **changed):
    save_checkpoint(folder, **{"config": CONFIG, "tensors": TENSORS, **changed})


# ---- round trip ----


@pytest.mark.parametrize("dtype", [name for _, name in checkpoint.DTYPES.values()])
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    patterns = torch.arange(256, dtype=torch.uint8).repeat(8)
    tensor = (patterns % 2).bool() if dtype == "bool" else patterns.view(getattr(torch, dtype))  # NaNs and -0 included
    tensors = {"many": tensor, "scalar": tensor[3], "none": tensor[:0].reshape(0, 3), "strided": tensor[::3]}
    save(tmp_path, tensors=tensors, state_tensors=tensors)
    loaded = load_checkpoint(tmp_path)
    for result in (loaded.tensors, loaded.state_tensors):
        assert set(result) == set(tensors)
        assert all(bits(result[name]) == bits(tensors[name]) for name in tensors)


def test_everything_comes_back(tmp_path):
    tokenizer = Tokenizer.train("character", "abc")
    state = {"step": 12, "best": 0.1 + 0.2, "tiny": 5e-324, "note": "größe", "rng": [1, 2**63], "none": None}
    save(tmp_path / "new" / "run", tokenizer=tokenizer, state=state, state_tensors={"m": TENSORS["bias"]})
    loaded = load_checkpoint(tmp_path / "new" / "run")
    assert loaded.config == load_config(tmp_path / "new" / "run") == CONFIG
    assert loaded.tokenizer.to_json() == tokenizer.to_json()
    assert loaded.state == state and type(loaded.state["step"]) is int
    assert bits(loaded.state_tensors["m"]) == bits(TENSORS["bias"])
    without = load_checkpoint(tmp_path / "new" / "run", training=False)
    assert without.state is None and without.state_tensors is None and set(without.tensors) == set(TENSORS)


def test_other_tools_can_read_the_files(tmp_path):
    from safetensors.torch import load_file

    save(tmp_path, tokenizer=Tokenizer.train("byte"))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["wte.weight"], TENSORS["wte.weight"])
    assert json.loads((tmp_path / "config.json").read_text())["n_embd"] == 8
    assert len({os.stat(tmp_path / name).st_mode for name in os.listdir(tmp_path)}) == 1


def test_aliases_parameters_and_views_are_saved_by_value(tmp_path):
    weight = torch.nn.Parameter(torch.randn(4, 4))
    tensors = {"a": weight, "b": weight, "row": weight[1], "transposed": weight.t()}
    save(tmp_path, tensors=tensors)
    loaded = load_checkpoint(tmp_path).tensors
    assert all(torch.equal(loaded[name], tensors[name].detach()) and not loaded[name].requires_grad for name in tensors)


def test_writing_to_loaded_tensors_leaves_the_file_alone(tmp_path):
    save(tmp_path)
    loaded = load_checkpoint(tmp_path)
    loaded.tensors["wte.weight"].zero_()
    assert torch.equal(load_checkpoint(tmp_path).tensors["wte.weight"], TENSORS["wte.weight"])
    kept = load_checkpoint(tmp_path).tensors["wte.weight"]
    save(tmp_path, tensors={"other": torch.zeros(1)})
    assert torch.equal(kept, TENSORS["wte.weight"])  # a loaded checkpoint outlives the next save


def test_a_save_replaces_the_whole_set_and_nothing_else(tmp_path):
    (tmp_path / "loss.csv").write_text("step,loss\n")
    save(tmp_path, tokenizer=Tokenizer.train("byte"), state={"step": 1}, state_tensors=TENSORS)
    save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "loss.csv", "model.safetensors"]
    loaded = load_checkpoint(tmp_path)
    assert loaded.tokenizer is None and loaded.state is None and loaded.state_tensors is None


# ---- refused before anything is written ----

UNUSABLE = {
    "config": (dict(config=CONFIG.to_dict()), TypeError, "config must be a Config"),
    "not a tensor": (dict(tensors={"a": [1.0]}), TypeError, r"tensors\['a'\] must be a torch tensor, got list"),
    "complex": (dict(tensors={"a": torch.zeros(1, dtype=torch.complex64)}), TypeError, "complex64, which is not supp"),
    "name of a number": (dict(state_tensors={3: torch.zeros(1)}), ValueError, r"state_tensors\[3\] is not a name"),
    "reserved name": (dict(tensors={"__metadata__": torch.zeros(1)}), ValueError, "is not a name"),
    "NaN state": (dict(state={"loss": float("nan")}), ValueError, "state is not JSON"),
    "tuple state": (dict(state={"rng": (1, 2)}), ValueError, "state is not JSON"),
    "tensor state": (dict(state={"m": torch.zeros(1)}), ValueError, "state is not JSON"),
    "huge state": (dict(state={"text": "x" * (4 << 20)}), ValueError, "bytes of JSON, more than"),
}


@pytest.mark.parametrize("changed, error, words", UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_arguments_leave_the_folder_alone(tmp_path, changed, error, words):
    with pytest.raises(error, match=f"^save_checkpoint: .*{words}"):
        save(tmp_path / "run", **changed)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, state={"step": 1})
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, tensors={"a": torch.zeros(3)}, state={"step": 2})
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


# ---- hostile files ----


def write_tensors(path, header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


DATA = bytes(8)
HOSTILE = {
    "no bytes for the data": ({"a": entry()}, b"", None, "tensors end at byte 8 of the data, but the file holds 0"),
    "one byte short": ({"a": entry()}, DATA[1:], None, "the file holds 7"),
    "trailing bytes": ({"a": entry()}, DATA + b"x", None, "the file holds 9"),
    "header longer than the file": ({"a": entry()}, DATA, 1000, "truncated"),
    "header of 2^63 bytes": ({"a": entry()}, DATA, 2**63, "truncated"),
    "header is no JSON": (b"{]", DATA, None, "not valid JSON"),
    "header is a list": (b"[]", b"", None, "not a JSON object"),
    "header is deep": (b'{"a":' + b"[" * 100_000, b"", None, "nested too deeply"),
    "header with NaN": (b'{"a": NaN}', b"", None, "not JSON"),
    "name twice": (b'{"a": 1, "a": 2}', b"", None, "a key appears twice"),
    "metadata is a number": ({"__metadata__": {"format": 1}}, b"", None, "__metadata__"),
    "entry is a number": ({"a": 3}, b"", None, "tensor 'a' must have exactly"),
    "entry with more": ({"a": entry(strides=[1])}, DATA, None, "tensor 'a' must have exactly"),
    "unknown dtype": ({"a": entry("F13")}, DATA, None, "tensor 'a' has dtype 'F13'"),
    "dtype is a list": ({"a": entry(["F32"])}, DATA, None, "tensor 'a' has dtype"),
    "negative shape": ({"a": entry(shape=(-1, -2))}, DATA, None, "tensor 'a' has a shape with a negative"),
    "huge shape": ({"a": entry(shape=(2**62, 4))}, DATA, None, "tensor 'a' has a shape with a negative or huge"),
    "shape that overflows": ({"a": entry(shape=(2**33, 2**33))}, DATA, None, "tensor 'a' of shape"),
    "shape of floats": ({"a": entry(shape=(2.0,))}, DATA, None, "tensor 'a' has a shape that is not"),
    "shape of bools": ({"a": entry(shape=(True, True))}, DATA[:4], None, "tensor 'a' has a shape that is not"),
    "shape of rank 9": ({"a": entry(shape=(1,) * 9, offsets=(0, 4))}, DATA[:4], None, "short list"),
    "offsets do not fit the shape": ({"a": entry(offsets=(0, 4))}, DATA, None, "tensor 'a' of shape"),
    "offsets run backwards": ({"a": entry(offsets=(8, 0))}, DATA, None, "tensor 'a' of shape"),
    "offsets negative": ({"a": entry(offsets=(-8, 0))}, DATA, None, "negative"),
    "offsets huge": ({"a": entry(offsets=(0, 10**4000))}, DATA, None, "huge"),
    "one offset": ({"a": entry(offsets=(0,))}, DATA, None, "tensor 'a' of shape"),
    "offsets are text": ({"a": {**entry(), "data_offsets": "08"}}, DATA, None, "not a short list"),
    "two tensors overlap": ({"a": entry(), "b": entry()}, DATA, None, "tensor 'b' of shape"),
    "a gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, DATA * 3, None, "tensor 'b' of shape"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "training.safetensors"])
@pytest.mark.parametrize("header, data, length, words", HOSTILE.values(), ids=HOSTILE)
def test_hostile_tensor_file_is_refused_by_name(tmp_path, name, header, data, length, words):
    save(tmp_path, state_tensors=TENSORS)
    write_tensors(tmp_path / name, header, data, length)
    with pytest.raises(ValueError, match=rf"{name}: .*{words}") as caught:
        load_checkpoint(tmp_path)
    assert len(str(caught.value)) < 500


def test_every_truncation_of_a_tensor_file_is_refused(tmp_path):
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors: "):
            load_checkpoint(tmp_path)


@settings(max_examples=8 * settings.default.max_examples)
@given(data=st.data())
def test_damaged_header_is_refused_or_read(tmp_path, data):
    whole = save_file_bytes(TENSORS)
    path = tmp_path / "model.safetensors"
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start, min(len(whole), start + 30)))
    path.write_bytes(whole[:start] + data.draw(st.binary(max_size=4)) + whole[stop:])
    try:
        tensors = read_tensors(path)
    except ValueError as error:
        assert "model.safetensors: " in str(error)
        return
    assert {name: [list(t.shape), str(t.dtype)[6:]] for name, t in tensors.items()} == {
        name: list(found) for name, found in read_header(path).items()
    }


WRONG = {
    "missing": (dict(a=(2, 3), b=(1,), c=(1,)), {}, "tensor 'c' is missing"),
    "extra": (dict(a=(2, 3)), {}, "tensor 'b' does not belong to this model"),
    "shape": (dict(a=(3, 2), b=(1,)), {}, r"tensor 'a' has shape \[2, 3\], expected \[3, 2\]"),
    "dtype": (dict(a=(2, 3), b=(1,)), {"b": torch.float16}, "tensor 'b' has dtype float32, expected torch.float16"),
}


@pytest.mark.parametrize("shapes, dtypes, words", WRONG.values(), ids=WRONG)
def test_tensors_that_do_not_fit_the_model_are_refused(tmp_path, shapes, dtypes, words):
    save(tmp_path, tensors={"a": torch.zeros(2, 3), "b": torch.zeros(1)})

    def expected(config):
        assert config == CONFIG
        return {name: torch.empty(shape, dtype=dtypes.get(name), device="meta") for name, shape in shapes.items()}

    with pytest.raises(ValueError, match=rf"model\.safetensors: {words}"):
        load_checkpoint(tmp_path, expected=expected)
    fitting = load_checkpoint(tmp_path, expected=lambda config: {"a": torch.zeros(2, 3), "b": torch.zeros(1)})
    assert set(fitting.tensors) == {"a", "b"}


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.json", '{"n_layer": 1', "not valid JSON"),
        ("config.json", json.dumps({**CONFIG.to_dict(), "n_embd": 9}), "n_embd 9 is not a multiple of n_head 2"),
        ("config.json", json.dumps({**CONFIG.to_dict(), "os": 1}), "unknown field 'os'"),
        ("config.json", "{" + " " * 70_000 + "}", "at most 65536"),
        ("tokenizer.json", "{}", "only models of type BPE"),
        ("training.json", '{"step": NaN}', "not valid JSON"),
        ("training.json", " " * (5 << 20), "at most"),
    ],
)
def test_hostile_json_is_refused_by_name(tmp_path, name, content, words):
    save(tmp_path, tokenizer=Tokenizer.train("byte"), state={"step": 1})
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}: .*{words}"):
        load_checkpoint(tmp_path)


def test_tokenizer_larger_than_the_model_is_refused(tmp_path):
    save(tmp_path, tokenizer=Tokenizer.train("bpe", "ab ab", 257))
    with pytest.raises(ValueError, match=r"tokenizer\.json: 257 tokens, but config\.json has vocab_size 256"):
        load_checkpoint(tmp_path)


def test_missing_folder_and_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: no such checkpoint folder"):
        load_checkpoint(tmp_path / "none")
    save(tmp_path)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
            load_checkpoint(tmp_path)


def test_manifest_cannot_point_outside_the_folder(tmp_path):
    save(tmp_path)
    (tmp_path / ".commit").mkdir()
    (tmp_path / ".commit" / "manifest.json").write_text(json.dumps({"files": ["../secret"]}))
    with pytest.raises(ValueError, match=r"manifest\.json: files must be"):
        load_checkpoint(tmp_path)


def test_a_file_that_is_no_file_is_refused_without_waiting(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: not a regular file"):
        load_checkpoint(tmp_path)


FLOOD = """
import re, sys, time
import safetensors, tokenizers, torch
from pykern.lm.checkpoint import load_checkpoint
def peak():
    return int(re.search("VmHWM:\\\\s+(\\\\d+)", open("/proc/self/status").read())[1])
before, start = peak(), time.process_time()
try:
    load_checkpoint(sys.argv[1], expected=lambda config: {})
    print("loaded")
except ValueError as error:
    print(peak() - before, time.process_time() - start, error)
"""


def flood_header(path):
    header = b'{"a":[' + b"[]," * (checkpoint.MAX_HEADER_BYTES // 3 - 10) + b"0]}"
    write_tensors(path, header)


def flood_names(path):
    write_tensors(path, {str(i): entry("U8", (0,), (0, 0)) for i in range(60_000)})


def flood_size(path):
    write_tensors(path, {"a": entry("F32", (2**40,), (0, 2**42))})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 2**42)  # a sparse file: no disk space


@pytest.mark.parametrize("flood", [flood_header, flood_names, flood_size])
def test_largest_accepted_header_stays_within_time_and_memory(tmp_path, flood):
    save(tmp_path, tokenizer=Tokenizer.train("byte"), state={"text": "x" * (4_000_000)})
    flood(Path(tmp_path, "model.safetensors"))
    run = subprocess.run([sys.executable, "-c", FLOOD, str(tmp_path)], text=True, capture_output=True, check=True)
    kilobytes, seconds, message = run.stdout.split(" ", 2)
    print(f"{flood.__name__}: {int(kilobytes) >> 10} MiB, {float(seconds):.1f} s, {message[:200]}")
    assert int(kilobytes) < 300 << 10 and float(seconds) < 5
    assert "model.safetensors: " in message and len(message) < 500
