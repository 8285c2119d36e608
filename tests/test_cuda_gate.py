"""The machine code of the CUDA kernels: no spills, 16-byte moves, registers, counts as recorded."""

import json
import re

import pytest
import sass

from pykern import _C

pytestmark = pytest.mark.one_isa


@pytest.fixture(scope="module")
def built():
    if not _C.cuda_kernels():
        pytest.skip(f"CUDA is {_C.cuda_status()}")
    if sass.tools() is None:
        pytest.skip("no cuobjdump, nvdisasm or c++filt: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return sass.kernels(_C.__file__)


@pytest.fixture(scope="module")
def golden():
    return json.loads(sass.GOLDEN.read_text())


def test_nothing_spills(built):
    assert len(built) > 50
    spilled = {k: n for k, n in built.items() if n["stack"] or n["local"] or n["LDL"] or n["STL"]}
    assert spilled == {}


# Kernels that move no packs: they sort, add columns or partial sums, choose tokens, copy single numbers or bits, or
# transpose.
SCALAR = re.compile(
    r"column_sums|sort_|take_keys|add_partial|pack_mask|attention_dsinks|attention_dropout|choose_tokens|transpose_rows"
)
SMALL_PACKS = re.compile(r"attention_(plain|dbias|weights).*<(bf16|f16)")  # four halves, widened to 16 bytes
WRITES_NUMBERS = re.compile(r"square_sums|cross_entropy_f|attention_(facts|weights|dbias)")


def test_packs_are_moved_16_bytes_at_a_time(built):
    """The branch for aligned rows exists in every kernel that takes packs, for what it reads and what it writes."""
    packed = {k: n for k, n in built.items() if not (SCALAR.match(k) or SMALL_PACKS.match(k))}
    reads = lambda n: n["LDG128"] + n["LDGSTS"]  # noqa: E731
    reads_none = [k for k, n in packed.items() if not reads(n) and not k.startswith("zero_rows")]
    writes_none = [k for k, n in packed.items() if not n["STG128"] and not WRITES_NUMBERS.match(k)]
    assert (reads_none, writes_none) == ([], [])


def test_halves_and_tf32_are_multiplied_on_tensor_cores(built):
    """Two steps a stage, of 16 k or of 8 of tf32, 32 mma.sync for 8 ldmatrix each, and those before the first stage."""
    products = {k: n for k, n in built.items() if k.startswith("gemm_halves")}
    assert len(products) == 12 + 2 and sum("<float" in k for k in products) == 2
    counts = {k: (n["HMMA"], n["LDSM"]) for k, n in products.items()}
    assert set(counts.values()) == {(64, 24)}, counts
    assert min(n["LDGSTS"] for n in products.values()) >= 6  # of a stage: 24 or 16 KB, 16 bytes a thread


def test_few_rows_are_multiplied_on_tensor_cores(built):
    """Four steps of 16 k a stage, for each of one or four tiles of 8 columns, and no barrier: a block is a warp."""
    products = {k: n for k, n in built.items() if k.startswith("gemm_few_rows")}
    assert len(products) == 4
    assert {(n["HMMA"], n["LDSM"], n["BAR"]) for n in products.values()} == {(4, 6, 0), (16, 12, 0)}


def test_registers_leave_room_for_the_block(built):
    """64 Ki registers a processor: 128 each for a block of 512 threads, or for two of 256; products take them all."""
    of_rows, of_products = ("norm_", "softmax_", "cross_entropy_"), ("gemm_", "attention_")
    found = {k: n["registers"] for k, n in built.items() if k.startswith(of_rows + of_products)}
    products = {k: n for k, n in found.items() if k.startswith(of_products)}
    assert products and {k: n for k, n in products.items() if n > 255} == {}
    assert {k: n for k, n in found.items() if n > 128 and k not in products} == {}


def test_counts_are_those_recorded(built, golden):
    """To a tenth: another compiler may move an instruction, but a lost unrolling or a new branch shows."""
    version = sass.compiler(_C.__file__)
    if version != golden["compiler"]:
        pytest.skip(f"the golden file is of ptxas {golden['compiler']}, these kernels of {version}")
    assert set(built) == set(golden["kernels"]), "kernels came or went: PYTHONPATH=. python tests/sass.py --write"
    differ = {}
    for kernel, numbers in built.items():
        for key, count in numbers.items():
            recorded = golden["kernels"][kernel][key]
            if abs(count - recorded) > recorded / 10:
                differ[f"{kernel}: {key}"] = (recorded, count)
    assert differ == {}, "recorded and built; if meant: PYTHONPATH=. python tests/sass.py --write"
