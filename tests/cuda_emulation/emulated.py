"""A pytest plugin (-p emulated): pykern's extension is the one whose kernels are those of csrc/cuda, on the emulator.

$PYKERN_EMULATED names the file; it is loaded before anything imports pykern, so the tests of the CPU run unchanged.
"""

import ctypes
import importlib.util
import os
import sys


def load(path):
    spec = importlib.util.spec_from_file_location("pykern._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    import pykern

    sys.modules["pykern._C"] = pykern._C = module
    return module


library = ctypes.CDLL(os.environ["PYKERN_EMULATED"])
library.emulation_seen.restype = ctypes.c_char_p


def counts():
    """Launches and blocks so far."""
    counted = (ctypes.c_uint64 * 2)()
    library.emulation_counts(counted)
    return list(counted)


def set_seed(seed):
    """Of the order in which threads run."""
    library.emulation_seed(ctypes.c_uint64(seed))


def sites_of(function):
    """The barriers and waits that kernels come to in function(): "norm.cu:31 barrier"."""
    library.emulation_watch(True)
    function()
    library.emulation_watch(False)
    return library.emulation_seen().decode().splitlines()


def leave_out(site):
    """As if that barrier or wait were not there; None puts it back."""
    library.emulation_leave_out((site or "").encode())


load(os.environ["PYKERN_EMULATED"])
