// Errors that cross the Python boundary. Kernels never throw; checks run before them.
#pragma once
#include <sstream>
#include <stdexcept>

namespace pykern {

// The Python exception that an error becomes.
enum class Kind { type, value, index, runtime };

class Error : public std::runtime_error {
 public:
  Error(Kind kind, const std::string& message) : std::runtime_error(message), kind(kind) {}
  const Kind kind;
};

template <typename... Parts>
[[noreturn]] void fail(Kind kind, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(kind, message.str());
}

}  // namespace pykern

// PYKERN_CHECK(value, D == E, "attention: k has head size ", E, " but q has ", D);
#define PYKERN_CHECK(kind, condition, ...)                               \
  do {                                                                   \
    if (!(condition)) ::pykern::fail(::pykern::Kind::kind, __VA_ARGS__); \
  } while (0)
