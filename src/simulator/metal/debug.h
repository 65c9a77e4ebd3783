// T.print and T.device_assert, in the words that TileLang's templates print them with on other GPUs.
#pragma once
#include "types.h"

namespace metal {

template <class T>
struct printed_as;
#define SIM_PRINTED(T, name_, format_, as_)        \
  template <>                                      \
  struct printed_as<T> {                           \
    static constexpr const char* name = name_;     \
    static constexpr const char* format = format_; \
    SIM_FN static auto value(T v) { return as_; }  \
  };
SIM_PRINTED(bool, "bool", "%s", v ? "true" : "false")
SIM_PRINTED(char, "char", "%d", int(v))
SIM_PRINTED(uchar, "uchar", "%u", unsigned(v))
SIM_PRINTED(short, "short", "%d", int(v))
SIM_PRINTED(ushort, "ushort", "%u", unsigned(v))
SIM_PRINTED(int, "int", "%d", v)
SIM_PRINTED(uint, "uint", "%u", v)
SIM_PRINTED(long, "long", "%ld", v)
SIM_PRINTED(ulong, "ulong", "%lu", v)
SIM_PRINTED(half, "half", "%f", double(v))
SIM_PRINTED(bfloat, "bfloat", "%f", double(float(v)))
SIM_PRINTED(float, "float", "%f", double(v))
#undef SIM_PRINTED

#define SIM_WHERE "BlockIdx=(%u, %u, %u), ThreadIdx=(%u, %u, %u)"
#define SIM_WHERE_VALUES                                                                             \
  sim::group_position[0], sim::group_position[1], sim::group_position[2], sim::current->position[0], \
      sim::current->position[1], sim::current->position[2]

}  // namespace metal

inline void debug_print_msg(const char* message) { sim::print("msg='%s' " SIM_WHERE "\n", message, SIM_WHERE_VALUES); }
// The value is formatted first: there is one format for each type.
template <class T>
SIM_FN void debug_print_var(const char* message, T v) {
  using As = metal::printed_as<T>;
  char value[64];
  sim::format(value, sizeof value, As::format, As::value(v));
  sim::print("msg='%s' " SIM_WHERE ": dtype=%s value=%s\n", message, SIM_WHERE_VALUES, As::name, value);
}
template <class T>
SIM_FN void debug_print_buffer_value(const char* message, const char* buffer, int index, T v) {
  using As = metal::printed_as<T>;
  char value[64];
  sim::format(value, sizeof value, As::format, As::value(v));
  sim::print("msg='%s' " SIM_WHERE ": buffer=%s, index=%d, dtype=%s value=%s\n", message, SIM_WHERE_VALUES, buffer,
             index, As::name, value);
}
#undef SIM_WHERE_VALUES
#undef SIM_WHERE
