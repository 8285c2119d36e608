"""The rivals of a session: each that is installed computes what pykern does, and those that are not are named."""

import importlib.metadata

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import bench_decode, models, report, rivals_decode

pytestmark = pytest.mark.one_isa

QUICK = [(models.TINY, 2, 12)]
# Of logits up to 0.6. llama.cpp looks GELU up in a table of float16; a quantiser of its own rounds other numbers.
BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2, "int8": 2e-2, "int4": 0.2}
LLAMA_CPP_BOUND = 1e-3


def dtype_of(case):
    return next((dtype for dtype in ("int8", "int4") if f"{dtype} weights" in case.name), report.short(case.dtype))


def test_a_session_has_a_case_of_every_kind_and_dtype():
    cases = [*bench_decode.model_cases(QUICK, QUICK, QUICK)]
    kinds = {"tiny B2 prefill 12": (2, 256), "tiny B2 generate 12": (2, 13), "tiny B2 step after 12": (2, 256)}
    assert [(case.name.split(",")[0], dtype_of(case)) for case in cases] == [
        (kind, dtype) for kind in kinds for dtype in ("float32", "bfloat16", "int8", "int4")
    ]
    for case in cases[::4]:
        assert case.build()[report.OURS]().shape == kinds[case.name]


@pytest.mark.parametrize("who", rivals_decode.RIVALS)
def test_a_rival_computes_what_a_session_does(who, monkeypatch):
    """Logits; tokens in float32 only, where no two logits are close. A second call gives what the first one gave."""
    lacking = rivals_decode.missing().get(who)
    if lacking:
        pytest.skip(f"needs {' and '.join(lacking)}")
    rival = rivals_decode.RIVALS[who]
    monkeypatch.setattr(rivals_decode, "RIVALS", {who: rival})
    seen = []
    for case in bench_decode.model_cases(QUICK, QUICK, QUICK):
        dtype, functions = dtype_of(case), case.build()
        ours = functions.pop(report.OURS)()
        for function in functions.values():
            found, again = function().clone(), function()
            assert torch.equal(found, again), case.name
            if not found.is_floating_point():
                expected = ours if "generate" in case.name else ours.argmax(-1, keepdim=True)
                assert found.shape == expected.shape and (dtype != "float32" or torch.equal(found, expected)), case.name
            else:
                bound = LLAMA_CPP_BOUND if who.startswith("llama.cpp") and dtype == "float32" else BOUNDS[dtype]
                torch.testing.assert_close(found.float(), ours.float(), rtol=0, atol=bound)
            seen.append(dtype)
    kinds = 3 if rival.steps else 2
    assert sorted(seen) == sorted([*rival.dtypes] * kinds)


def test_rivals_that_are_not_installed_are_named_and_absent(monkeypatch, capsys):
    def version(name):
        if name != "gguf":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    (note,) = bench_decode.notes()
    assert note == (
        "not installed, so not in the table: transformers, onnxruntime, llama.cpp, llama.cpp -fa, ctranslate2 "
        "(pip install transformers onnxruntime onnx llama_cpp_python ctranslate2)"
    )
    assert [*bench_decode.build_step(models.TINY, 1, 4, "float32")] == [report.OURS, "torch"]
    monkeypatch.setattr(bench_decode, "cases", lambda quick: [])
    threads = str(torch.get_num_threads())
    assert benchmarks.main(["--quick", "--only", "decode", "--threads", threads]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].endswith("gguf 0.0") and note in printed.splitlines()


def test_with_every_rival_there_is_nothing_to_note(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2")
    assert bench_decode.notes() == [] and set(rivals_decode.versions().values()) == {"1.2"}


def test_case_and_dtype_choose():
    cases = [*bench_decode.model_cases(QUICK, QUICK, QUICK)]

    def left(*arguments):
        return [case.name for case in cases if benchmarks.wanted(case, benchmarks.parse([*arguments]))]

    assert left() == [case.name for case in cases]
    assert left("--case", "step", "--dtype", "bfloat16") == ["tiny B2 step after 12"]
    assert left("--case", "int4", "--case", "int8") == [name for name in left() if "weights" in name]
