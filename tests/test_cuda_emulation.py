"""The CUDA kernels on the emulator (tests/cuda_emulation): its own eyes, changed kernels, every room's tests.

It needs no GPU. What only hardware shows, that ptx.cuh means what the emulator does, is for tests/test_cuda_gpu.py.
"""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_cases import OPS

pytestmark = pytest.mark.one_isa
ROOT = Path(__file__).parent.parent
EMULATOR = ROOT / "tests/cuda_emulation"
INCLUDES = [f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]


def compiled(target, *arguments):
    command = ["g++", "-std=c++20", *map(str, arguments), "-o", str(target)]
    run = subprocess.run(command, text=True, capture_output=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return target


def said(program, *arguments, seed=1):
    """(what the program printed, how it ended)."""
    env = {**os.environ, "PYKERN_EMULATION_SEED": str(seed), "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([program, *arguments], text=True, capture_output=True, timeout=300, env=env)
    return (run.stdout + run.stderr).strip(), run.returncode


# ---- what the emulator sees

# What a faulty kernel of faults.cpp gives: wrong numbers, a Fault with these words, or a signal.
FAULTS = {
    "barrier": "wrong",
    "second_barrier": "wrong",
    "wait": "wrong",
    "barrier_after_wait": "wrong",
    "pending": "wrong",
    "divergent": r"divergent: thread \d+ is at faults.cpp:\d+ while others of its group wait at faults.cpp:\d+",
    "lane": r"deadlock in block \(0, 0, 0\): thread \d+ waits at reduce.cuh:\d+ for its warp.* 4 of 128 threads .*",
    "thread": "wrong",
    "too_little_shared": "the kernel uses 512 bytes of shared memory, the launch asked for 64",
    "alignment": "an asynchronous copy of 16 bytes is not aligned",
    "store_to_shared": "a global store to shared memory",
    "rows": "wrong",
    "threads": "a block of 100 threads: no whole warps",
}
SIGNALLED = {"beyond": -11}  # a page behind shared memory that must not be touched
SANITIZED = {"beyond_global": "heap-buffer-overflow"}


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """The program with the small kernels, and the same with the address sanitizer."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulator's own tests")
    folder = tmp_path_factory.mktemp("faults")
    sources = [*INCLUDES, EMULATOR / "faults.cpp", EMULATOR / "emulator.cpp"]
    with ThreadPoolExecutor(2) as pool:
        plain = pool.submit(compiled, folder / "faults", "-O1", *sources)
        sanitized = pool.submit(compiled, folder / "sanitized", "-O1", "-g", "-fsanitize=address", *sources)
        return plain.result(), sanitized.result()


def test_every_scene_is_known(faults):
    listed, _ = said(faults[0])
    assert listed.split() and set(listed.split()) == {*FAULTS, *SIGNALLED, *SANITIZED}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_right_kernels_are_right(faults, seed):
    for name in {*FAULTS, *SIGNALLED, *SANITIZED}:
        assert said(faults[0], name, "right", seed=seed) == ("right", 0), name
    for name in SANITIZED:
        assert said(faults[1], name, "right", seed=seed) == ("right", 0), name


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(faults, name, seed):
    text, status = said(faults[0], name, "wrong", seed=seed)
    assert status == 0 and re.fullmatch(FAULTS[name], text, re.DOTALL), text


def test_memory_outside_is_not_touched_unseen(faults):
    assert said(faults[0], "beyond", "wrong") == ("", SIGNALLED["beyond"])
    text, status = said(faults[1], "beyond_global", "wrong")
    assert status != 0 and SANITIZED["beyond_global"] in text


# ---- kernels with one line changed

WRONG = {  # file: (what stands there, what is put in its place)
    "norm.cu": [("fma(h[p][j], rstd, offset), w[j]", "fma(h[p][j], rstd, offset), 1")],
    "norm_backward.cu": [
        ("add(a.pieces.D + first, dbias[p])", "add(first, dbias[p])"),
        ("w[j]) - mean_g", "w[j])"),
    ],
    "pieces.cuh": [("threadIdx.x % kWarp) * kPack", "threadIdx.x % kWarp + 1) * kPack")],
    "reduce.cuh": [("step = lanes / 2", "step = lanes / 4")],
    "sort.cuh": [("(1u << lane) - 1", "(2u << lane) - 1"), ("shift += kDigitBits", "shift += 2 * kDigitBits")],
    "embedding.cu": [("a.sorted[begin - 1].key == token", "false")],
}


def changes():
    """Indices and terms that are off: {name: (file, text)}."""
    found = {}
    for file, replacements in WRONG.items():
        text = (ROOT / "csrc/cuda" / file).read_text()
        for old, new in replacements:
            assert text.count(old) == 1, f"{file} no longer has one {old!r}"
            found[f"{file}, {new!r}"] = (file, text.replace(old, new))
    return found


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile changed kernels")
    folder = tmp_path_factory.mktemp("objects")
    emulator = compiled(folder / "emulator.o", "-O1", "-c", *INCLUDES, EMULATOR / "emulator.cpp")
    check = compiled(folder / "check.o", "-O0", "-c", *INCLUDES, ROOT / "csrc/ops/check.cpp")
    return emulator, check


def outcome(folder, change, objects):
    """What mutant.cpp says of the kernels with one file changed."""
    (folder / "cuda").mkdir(parents=True)
    if change is not None:
        file, text = change
        (folder / "cuda" / file).write_text(text)
    program = compiled(folder / "mutant", "-O0", f"-I{folder}", *INCLUDES, EMULATOR / "mutant.cpp", *objects)
    return said(program)


@pytest.mark.slow
def test_changed_kernels_are_seen(objects, tmp_path):
    """A wrong index makes results wrong, or is a Fault; the kernels as they are pass."""
    cases = {"unchanged": None, **changes()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        folders = [tmp_path / str(i) for i in range(len(cases))]
        results = dict(zip(cases, pool.map(outcome, folders, cases.values(), [objects] * len(cases)), strict=True))
    text, status = results.pop("unchanged")
    assert status == 0 and float(text) < 1.0, text

    def passes(text, status):
        try:
            return status == 0 and float(text) < 1.0
        except ValueError:
            return False

    unseen = [name for name, result in results.items() if passes(*result)]
    assert unseen == [], {name: results[name] for name in unseen}


# ---- kernels without one of their barriers or waits, at run time

KINDS = {"__syncthreads();": "barrier", "__syncwarp();": "warp barrier", "cp_async_wait<": "wait"}
UNSEEN = {  # how many of a file and kind nobody would miss on the emulator
    # behind the last rows of a block nothing is under way
    **dict.fromkeys((f"{file} wait" for file in ("norm.cu", "norm_backward.cu", "softmax.cu", "gemm_halves.cuh")), 1),
    **dict.fromkeys((f"attention_{file}.cuh wait" for file in ("forward", "backward")), 1),
    **{"cross_entropy.cu wait": 2, "gemm_few_rows.cuh wait": 1, "decode_halves.cuh wait": 1},
    # beside a vote, a shuffle or ldmatrix, which bring the warp together themselves
    **{"sort.cuh warp barrier": 2, "gemm_few_rows.cuh warp barrier": 2, "decode_halves.cuh warp barrier": 2},
    **{"decode_ring.cuh warp barrier": 1, "attention_forward.cuh warp barrier": 1},
    "decode.cuh barrier": 2,  # between blocks, which run one after the other; one that finishes too early is corrected
    "decode_append.cu barrier": 1,  # for more than 65535 sequences
    "attention_mask.cu barrier": 1,  # what is not there yet reads as partly seen: slower, the same bits
}


def places():
    """Every barrier and wait that csrc/cuda has: "norm.cu:31 barrier"."""
    found = set()
    for path in (ROOT / "csrc/cuda").glob("*.cu*"):
        for i, line in enumerate(path.read_text().splitlines(), 1):
            found |= {f"{path.name}:{i} {kind}" for text, kind in KINDS.items() if text in line.split("//")[0]}
    return {place for place in found if not place.startswith("ptx.cuh")}


@pytest.mark.slow
def test_every_barrier_and_wait_is_missed():
    """tests/cuda_faults.py leaves each out in turn: other bits, a fault, or no end. No place is out of its reach."""
    others = {name.split(",")[0].split(" ")[0] for name in [*OPS, "session"]} - {"attention"}
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda group: emulated("tests/cuda_faults.py", group), ["attention", ",".join(others)]))
    shown = {}
    for run in runs:
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        for line in run.stdout.splitlines():
            place, what = line.split(": ", 1)
            shown[place] = what if what != "unseen" else shown.get(place, what)
    assert shown.keys() == places()
    unseen = sorted(place for place, what in shown.items() if what == "unseen")
    assert Counter(re.sub(r":\d+", "", place) for place in unseen) == UNSEEN, unseen


# ---- the tests of each room, on the CUDA kernels

ROOMS = {  # the kernels that make a room complete
    "norm": "layer_norm_backward",
    "softmax": "softmax_backward",
    "activation": "swiglu_backward",
    "rope": "rope",
    "embedding": "embedding_backward",
    "cross_entropy": "cross_entropy_backward",
    "adamw": "adamw",
    "linear": "linear_backward",
    "mlp": "mlp_backward",
    "linear_cross_entropy": "linear_cross_entropy",
    "attention": "attention_backward",
    "decode": "attention_with_kvcache",
    "flash_attn_kvcache": "attention_with_kvcache",
    "sampling": "sample",
}
# Of the kernels above put together
MODULES = [f"tests/test_{name}.py" for name in ("nn", "lm_step", "lm_kvcache", "known_bugs")]
LEFT_OUT = (
    *("thread_count", "chain"),  # what the CPU's kernels promise of their own
    # minutes of emulation; attention's gradients meet the formula's in its other tests
    *("three", "(attention and gradcheck)", "(attention and ratio and dtype2)", "(alone and dtype3)"),
    "attention_second",  # torch functions put together over the same kernels
    "frequencies",  # of 20000 draws: each draw is the rule's in another test
    "((ragged or attention_options) and (dtype1 or dtype2 or dtype3))",
)


def extension():
    """The emulated extension of the newest build, or a skip that says why there is none."""
    found = sorted(ROOT.glob("build/*/emulated/_C*"), key=lambda path: path.stat().st_mtime)
    if not found:
        pytest.skip(
            "no emulated extension: it is built with -DPYKERN_EMULATION=ON, as `make test` and `make inplace` do"
        )
    sources = [
        *(ROOT / "csrc/cuda").iterdir(),
        *EMULATOR.rglob("*.cpp"),
        *EMULATOR.rglob("*.h"),
        *EMULATOR.rglob("*.cuh"),
    ]
    newer = [path.name for path in sources if path.stat().st_mtime > found[-1].stat().st_mtime]
    assert not newer, f"the emulated extension is older than {', '.join(newer)}: build it again"
    return found[-1]


def emulated(*arguments, **env):
    env = {**os.environ, "PYKERN_EMULATED": str(extension()), "OMP_NUM_THREADS": "1", **env}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(EMULATOR), env.get("PYTHONPATH", "")])
    env.pop("PYKERN_ISA", None)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, text=True, capture_output=True, timeout=1800)


def test_the_extension_is_the_emulated_one():
    code = "import emulated; from pykern import _C; print(_C.isa(), _C.cuda_status(), *_C.cuda_kernels())"
    run = emulated("-c", code)
    assert run.returncode == 0, run.stderr
    isa, status, *kernels = run.stdout.split()
    assert (isa, status) == ("emulated", "emulated")
    assert set(ROOMS.values()) <= set(kernels)


def test_an_op_without_a_cuda_kernel_refuses():
    code = "_C.roofline_copy(torch.ones(64), torch.ones(64), tasks=1, repeats=1)"
    run = emulated("-c", f"import emulated, torch; from pykern import _C; {code}")
    assert run.returncode == 1
    assert "RuntimeError: roofline_copy: pykern has no CUDA kernel for it yet" in run.stderr


@pytest.mark.parametrize(
    ("config", "session", "words"),
    [
        ("positions='t5'", "", "lm_step: distance_bias has no CUDA kernel yet"),
        ("", "dtype='int4'", "pack: int4 weights have no CUDA kernel yet"),
    ],
)
def test_a_session_without_cuda_kernels_refuses(config, session, words):
    shape = f"n_layer=1, n_head=1, n_embd=8, vocab_size=5, block_size=4, {config}"
    code = f"model = Transformer(Config({shape})); model.session({session}).step(torch.zeros(1).long())"
    run = emulated("-c", f"import emulated, torch; from pykern.lm import Config, Transformer; {code}")
    assert run.returncode == 1
    assert f"ValueError: {words}" in run.stderr


def files_run(files):
    """These test files, in a process of their own."""
    return emulated(
        *("-m", "pytest", "-p", "emulated", *files, "-m", "not one_isa", "-v", "--no-header", "--tb=short"),
        *("-p", "no:cacheprovider", "-o", "addopts="),
        *("-k", " and ".join(f"not {words}" for words in LEFT_OUT)),
        PYKERN_TEST_EXAMPLES="5",
        PYKERN_EMULATION_SEED="1",
    )


def test_tf32_products_are_their_formula():
    """Of factors rounded to tf32, to float32's tolerance; the CPU has no such thing, so no room's test runs it."""
    chosen = "cpu and tf32 and (formula or every_product)"
    run = emulated("-m", "pytest", "-p", "emulated", "tests/test_cuda_gpu.py", "-m", "", "-k", chosen, "--tb=short")
    assert run.returncode == 0 and "4 passed" in run.stdout, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.slow
def test_rooms_pass_on_the_emulator():
    files = sorted({f"tests/{path.name}" for room in ROOMS for path in (ROOT / "tests").glob(f"test_{room}*.py")})
    files += MODULES
    products = [file for file in files if re.search("test_(linear|attention)", file)]  # most of the time
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(files_run, [products, [file for file in files if file not in products]]))
    passed = []
    for run in runs:
        assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
        assert "ran on isa emulated" in run.stdout
        passed += [line for line in run.stdout.splitlines() if " PASSED" in line]
    assert len(passed) > 200, runs[0].stdout[-2000:]
