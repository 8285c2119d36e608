#include "bind/borrow.h"

#include <pybind11/numpy.h>

#include <atomic>

#include "bind/dlpack_abi.h"
#include "core/device.h"

namespace pykern {

static constexpr char kExpected[] =
    ", expected float32, float64, bfloat16, float16, int64, int32, uint8 or bool";

static DType dtype_of(dlpack::DataType d, const char* op, const char* name) {
  if (d.lanes == 1) {
    if (d.code == dlpack::kFloat && d.bits == 32) return DType::f32;
    if (d.code == dlpack::kFloat && d.bits == 64) return DType::f64;
    if (d.code == dlpack::kFloat && d.bits == 16) return DType::f16;
    if (d.code == dlpack::kBfloat && d.bits == 16) return DType::bf16;
    if (d.code == dlpack::kInt && d.bits == 64) return DType::i64;
    if (d.code == dlpack::kInt && d.bits == 32) return DType::i32;
    if (d.code == dlpack::kUInt && d.bits == 8) return DType::u8;
    if (d.code == dlpack::kBool && d.bits == 8) return DType::b8;
  }
  constexpr const char* kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  const char* kind = d.code < 7 ? kinds[d.code] : "float";  // from 7 on: the small floats
  fail(Kind::type, op, ": ", name, " has dtype ", kind, int(d.bits), d.lanes == 1 ? "" : " vectors",
       kExpected);
}

static Tensor from_view(const dlpack::View& view, bool readonly, const char* op, const char* name) {
  Tensor t;
  PYKERN_CHECK(value, view.rank >= 0 && view.rank <= kMaxRank, op, ": ", name, " has ", view.rank,
               " dimensions, at most ", kMaxRank, " are supported");
  t.rank = view.rank;
  t.dtype = dtype_of(view.dtype, op, name);
  t.readonly = readonly;
  t.given = true;
  const int32_t device = view.device.type;
  PYKERN_CHECK(value,
               device == dlpack::kCPU || device == dlpack::kCUDA || device == dlpack::kCUDAHost ||
                   device == dlpack::kCUDAManaged,
               op, ": ", name, " is on an unsupported device (DLPack type ", device,
               "), expected CPU or CUDA");
  const bool on_cpu = device == dlpack::kCPU || device == dlpack::kCUDAHost;
  t.device = on_cpu ? Device::cpu : Device::cuda;
  t.device_index = on_cpu ? 0 : view.device.index;
  int64_t packed = 1, elements = 1;
  for (int i = view.rank - 1; i >= 0; --i) {
    t.size[i] = view.size[i];
    t.stride[i] = view.stride ? view.stride[i] : packed;
    packed *= view.size[i];
    elements *= view.size[i];
  }
  PYKERN_CHECK(type, view.data || elements == 0, op, ": ", name,
               " has no memory (a fake, meta or wrapper tensor)");
  t.data = static_cast<char*>(view.data) + view.byte_offset;
  const int64_t item = view.dtype.bits / 8;
  PYKERN_CHECK(value, elements == 0 || reinterpret_cast<uintptr_t>(t.data) % item == 0, op, ": ",
               name, " is not aligned to its item size of ", item, " bytes");
  return t;
}

// The exchange API of a type, looked up once per type. Guarded by the GIL; types are kept alive.
static const dlpack::ExchangeApi* exchange_api(PyTypeObject* type) {
  struct Entry {
    PyTypeObject* type;
    const dlpack::ExchangeApi* api;
  };
  constexpr int kEntries = 16;
  static Entry cache[kEntries];
  static int used = 0;
  for (int i = 0; i < used; ++i)
    if (cache[i].type == type) return cache[i].api;

  const dlpack::ExchangeApi* api = nullptr;
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  if (!capsule) {
    PyErr_Clear();  // a type without the protocol
  } else {
    if (PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
      auto* header = static_cast<dlpack::ExchangeHeader*>(
          PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
      while (header && header->version.major != dlpack::kMajorVersion) header = header->previous;
      api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
      if (api && !api->view_from_object) api = nullptr;
    }
    Py_DECREF(capsule);
  }
  if (used < kEntries) {
    Py_INCREF(type);
    cache[used++] = {type, api};
  }
  return api;
}

static Tensor from_numpy(const py::array& array, const char* op, const char* name) {
  const py::dtype dtype = array.dtype();
  const char kind = dtype.kind();
  const int64_t item = dtype.itemsize();
  PYKERN_CHECK(type, dtype.byteorder() != '>', op, ": ", name,
               " is big-endian, expected the byte order of this processor");
  dlpack::DataType d{255, static_cast<uint8_t>(item * 8), 1};
  if (kind == 'f') d.code = dlpack::kFloat;
  if (kind == 'i') d.code = dlpack::kInt;
  if (kind == 'b') d.code = dlpack::kBool;
  PYKERN_CHECK(type, d.code != 255 && item <= 8, op, ": ", name, " has dtype ",
               std::string(py::str(dtype)), kExpected);
  PYKERN_CHECK(value, array.ndim() <= kMaxRank, op, ": ", name, " has ", array.ndim(),
               " dimensions, at most ", kMaxRank, " are supported");
  int64_t size[kMaxRank], stride[kMaxRank];
  for (int i = 0; i < array.ndim(); ++i) {
    size[i] = array.shape(i);
    PYKERN_CHECK(value, array.strides(i) % item == 0, op, ": ", name, " has a stride of ",
                 array.strides(i), " bytes, not a multiple of its item size of ", item);
    stride[i] = array.strides(i) / item;
  }
  const dlpack::View view{const_cast<void*>(array.data()),
                          {dlpack::kCPU, 0},
                          static_cast<int32_t>(array.ndim()),
                          d,
                          size,
                          stride,
                          0};
  return from_view(view, !array.writeable(), op, name);
}

// The first line of a Python error: torch's own go on with a C++ stack trace.
[[noreturn]] static void fail_to_borrow(const py::error_already_set& error, const char* op,
                                        const char* name) {
  const std::string reason = error.what();
  fail(Kind::type, op, ": ", name, " cannot be borrowed: ", reason.substr(0, reason.find('\n')));
}

// Whether the type of array is of that package.
static bool is_of(py::handle array, const std::string& package) {
  const auto module = py::str(py::type::handle_of(array).attr("__module__")).cast<std::string>();
  return module == package || module.rfind(package + ".", 0) == 0;
}

// The stream on which a CUDA array without the exchange API is used: for a torch before 2.10 the
// one that torch computes on, else the default one, which the producer is asked to let wait for
// itself.
static void* stream_of(py::handle array) {
  if (!is_of(array, "torch")) return nullptr;
  const py::object torch = py::module_::import("torch");
  const py::object stream = torch.attr("cuda").attr("current_stream")(array.attr("device"));
  return reinterpret_cast<void*>(stream.attr("cuda_stream").cast<uintptr_t>());
}

// array.__dlpack__(), and on CUDA the stream that its memory is ready on.
static py::object call_dlpack(py::handle array, void** stream, const char* op, const char* name) {
  const py::int_ kOnCuda(static_cast<int>(dlpack::kCUDA));
  py::dict options;
  try {
    if (py::hasattr(array, "__dlpack_device__")) {
      const py::object device = array.attr("__dlpack_device__")();
      if (py::isinstance<py::tuple>(device) && py::int_(device[py::int_(0)]).equal(kOnCuda)) {
        *stream = stream_of(array);
        const auto number = reinterpret_cast<uintptr_t>(*stream);
        options["stream"] = number == 0 ? 1 : number;  // 1: DLPack's number of the default stream
      }
    }
    py::dict newer = options.attr("copy")();
    newer["max_version"] = py::make_tuple(1, 3);
    return array.attr("__dlpack__")(**newer);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) fail_to_borrow(error, op, name);
  }
  try {
    return array.attr("__dlpack__")(**options);  // a producer older than DLPack 1.0
  } catch (py::error_already_set& error) {
    fail_to_borrow(error, op, name);
  }
}

void require_cuda(const char* kernel) {
  static std::atomic<bool> usable{false};  // once it is, it stays so
  if (!kCudaBuilt || usable.load(std::memory_order_relaxed)) return;
  const CudaStatus status = cuda_status();
  PYKERN_CHECK(runtime, status.usable, kernel, ": the CUDA kernels of pykern are ",
               status.sentence);
  usable.store(true, std::memory_order_relaxed);
}

Borrowed::Borrowed(py::handle array, const char* op, const char* name) {
  if (const auto* api = exchange_api(Py_TYPE(array.ptr()))) {
    dlpack::View view;
    if (api->view_from_object(array.ptr(), &view) != 0)
      fail_to_borrow(py::error_already_set(), op, name);
    tensor_ = from_view(view, false, op, name);
    if (tensor_.device == Device::cuda && api->current_stream &&
        api->current_stream(dlpack::kCUDA, tensor_.device_index, &tensor_.stream) != 0)
      fail_to_borrow(py::error_already_set(), op, name);
    path_ = "exchange";
  } else if (py::isinstance<py::array>(array)) {
    tensor_ = from_numpy(py::reinterpret_borrow<py::array>(array), op, name);
    path_ = "numpy";
  } else if (py::hasattr(array, "__dlpack__")) {
    void* stream = nullptr;
    capsule_ = call_dlpack(array, &stream, op, name);
    PyObject* c = capsule_.ptr();  // never renamed: its own destructor releases the memory
    if (PyCapsule_IsValid(c, "dltensor_versioned")) {
      const auto* m =
          static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(c, "dltensor_versioned"));
      PYKERN_CHECK(type, m->version.major == dlpack::kMajorVersion, op, ": ", name,
                   " comes with DLPack version ", m->version.major, ", expected 1");
      tensor_ = from_view(m->view, m->flags & (dlpack::kReadOnly | dlpack::kCopied), op, name);
    } else if (PyCapsule_IsValid(c, "dltensor")) {
      const auto* m = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(c, "dltensor"));
      // An old capsule cannot say that its array is immutable, as every one of JAX is.
      tensor_ = from_view(m->view, is_of(array, "jaxlib") || is_of(array, "jax"), op, name);
    } else {
      fail(Kind::type, op, ": ", name, ".__dlpack__() returned no DLPack capsule");
    }
    if (tensor_.device == Device::cuda) tensor_.stream = stream;
    path_ = "dlpack";
  } else {
    fail(Kind::type, op, ": ", name, " must be an array, got ",
         std::string(py::str(py::type::handle_of(array).attr("__name__"))));
  }
}

}  // namespace pykern
