"""Fixtures and settings that every test file shares.

The ISA is chosen once per process: tests/test_every_isa.py runs the kernel tests again, in a process per ISA.
"""

import os
import signal

import hypothesis
import pytest

# The same examples on every run and every machine. PYKERN_TEST_EXAMPLES=500 searches harder, for a night.
hypothesis.settings.register_profile(
    "pykern",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=int(os.environ.get("PYKERN_TEST_EXAMPLES", "25")),
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("pykern")

LONG = (
    "test_cuda_emulation",
    "test_every_isa",
    "test_training_curves",
    "test_benchmarks",
    "test_cuda_gate",
    "test_packaging",
)

LAST = ("test_arrays",)  # JAX has threads: a process that has loaded it should fork no more


def pytest_configure(config):
    """Ctrl-C works, also where a shell without job control started pytest in the background, which ignores it.

    Workers of pytest-xdist, which begin with this environment, share the processors: a kernel thread with nothing to
    do sleeps there, or it would spin while another worker waits for its turn.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collection_modifyitems(config, items):
    """Workers take file after file: the long ones first, or at the end one worker would wait for the other."""
    items.sort(key=lambda item: item.path.stem in LAST)
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


def pytest_report_header():
    import torch

    from pykern import _C

    return f"pykern: isa {_C.isa()}, {_C.num_threads()} threads, torch {torch.__version__}"


def pytest_sessionstart(session):
    from pykern import _C

    forced = os.environ.get("PYKERN_ISA")
    if forced and _C.isa() != forced:
        raise pytest.UsageError(f"PYKERN_ISA={forced}, but the kernels of {_C.isa()} are running")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    from pykern import _C

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: torch.cuda.is_available() is False")
    if not getattr(_C, "cuda_kernels", list)():
        pytest.skip(f"needs CUDA kernels, and this extension has none: CUDA is {_C.cuda_status()}")


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """Runs the test with 1, 2 and 3 kernel threads."""
    import pykern

    pykern.set_num_threads(request.param)
    yield request.param
    pykern.set_num_threads(0)


@pytest.fixture
def with_threads():
    """with_threads(n, f) = f() computed by n kernel threads."""
    import pykern

    def call(n, function):
        pykern.set_num_threads(n)
        try:
            return function()
        finally:
            pykern.set_num_threads(0)

    return call


@pytest.fixture
def generator():
    """A torch.Generator with a fixed seed."""
    import torch

    return torch.Generator().manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    from pykern import _C

    terminalreporter.write_line(f"ran on isa {_C.isa()}")
