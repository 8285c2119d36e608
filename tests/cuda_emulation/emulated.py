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


def counts():
    """Launches and blocks so far."""
    counted = (ctypes.c_uint64 * 2)()
    ctypes.CDLL(os.environ["PYKERN_EMULATED"]).emulation_counts(counted)
    return list(counted)


load(os.environ["PYKERN_EMULATED"])
