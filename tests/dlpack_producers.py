"""Objects that hand memory over through __dlpack__, well and badly behaved."""

import ctypes

import numpy as np
import torch


class Wrapped:
    """A producer of DLPack 1.x around a numpy array."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Old(Wrapped):
    """A producer from before DLPack 1.0: it knows no max_version and gives an unversioned capsule."""

    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()


class OnCuda(Wrapped):
    """Says that it is on a GPU, and keeps what it was asked for; its memory is the CPU's."""

    def __dlpack__(self, **options):
        self.asked = options
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return 2, 0


class Copying(Wrapped):
    """Hands over a copy, and says so."""

    def __dlpack__(self, max_version=None):
        return self.array.__dlpack__(max_version=max_version, copy=True)


class Returning:
    """Returns this from __dlpack__, or raises it."""

    def __init__(self, result):
        self.result = result

    def __dlpack__(self, **options):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class _View(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("rank", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("size", ctypes.POINTER(ctypes.c_int64)),
        ("stride", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("view", _View),
    )


class Forged:
    """float32 [4] in row-major order, except for what the arguments change. Its memory lives as long as it does."""

    def __init__(self, *, version=(1, 0), device=(1, 0), code=2, bits=32, lanes=1, data=True, byte_offset=0):
        self.array = np.arange(4, dtype=np.float32)
        self.size = (ctypes.c_int64 * 1)(4)
        address = self.array.ctypes.data - byte_offset if data else None
        view = _View(address, device, 1, code, bits, lanes, self.size, None, byte_offset)
        self.managed = _Versioned(version, None, None, 0, view)

    def __dlpack__(self, max_version=None):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.managed), b"dltensor_versioned", None)


class Elsewhere:
    """A tensor that claims to be on a GPU: the emulator runs the kernel, and the host must not read it."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, max_version=None):
        capsule = torch.utils.dlpack.to_dlpack(self.tensor)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        _View.from_address(pointer(capsule, b"dltensor")).device[0] = 2
        return capsule


class OfLibrary(Wrapped):
    """An array of a library of its own, as CuPy's is: it names the namespace whose from_dlpack makes such arrays."""

    def __array_namespace__(self):
        return OfLibrary

    @staticmethod
    def from_dlpack(producer):
        return OfLibrary(np.from_dlpack(producer))


class Elsewhere8(Wrapped):
    """On a device that is neither CPU nor CUDA."""

    def __dlpack_device__(self):
        return 8, 0
