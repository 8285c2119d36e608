// The DLPack 1.x binary interface (layouts of version 1.3), declared here because the extension
// depends on no framework: the protocol is the agreement, not a header.
#pragma once
#include <cstdint>

namespace pykern::dlpack {

constexpr uint32_t kMajorVersion = 1;

// bits of ManagedVersioned::flags
constexpr uint64_t kReadOnly = 1;
constexpr uint64_t kCopied = 2;  // made for this call: what is written there is lost

enum DeviceType : int32_t { kCPU = 1, kCUDA = 2, kCUDAHost = 3, kCUDAManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Version {
  uint32_t major, minor;
};
struct DeviceId {
  int32_t type, index;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct View {
  void* data;
  DeviceId device;
  int32_t rank;
  DataType dtype;
  int64_t* size;
  int64_t* stride;  // null: row-major
  uint64_t byte_offset;
};
struct Managed {
  View view;
  void* context;
  void (*deleter)(Managed*);
};
struct ManagedVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  View view;
};

// type(x).__dlpack_c_exchange_api__: a capsule named "dlpack_exchange_api"
struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};
struct ExchangeApi {
  ExchangeHeader header;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_from_object)(void* object, View* out);  // borrowed; -1 with a Python error
  int (*current_stream)(DeviceType type, int32_t index, void** stream);
};

}  // namespace pykern::dlpack
