// Stand-in for ROCm's oclc_*.bc, the constants by which its device libraries are compiled for a chip and a mode;
// included before every text where ROCm is not installed. The modes are those that hipcc links by default.
#pragma once

#if defined(__HIP_DEVICE_COMPILE__)
namespace tilelang_ext {
// "gfx90a" is 9010: 1000 * major + 100 * minor + stepping, of which the last two are one hexadecimal digit each.
constexpr int isa_version(const char* name) {
  constexpr auto digit = [](char c) { return c <= '9' ? c - '0' : c - 'a' + 10; };
  int major = 0;
  name += 3;
  for (; name[2]; ++name) major = major * 10 + digit(*name);
  return major * 1000 + digit(name[0]) * 100 + digit(name[1]);
}
static_assert(isa_version("gfx90a") == 9010 && isa_version("gfx1201") == 12001);
}  // namespace tilelang_ext

#define OCLC_CONTROL(type, name, value) \
  extern "C" __attribute__((visibility("hidden"))) __constant__ const type __oclc_##name = value;
OCLC_CONTROL(int, ABI_version, 600)  // that of -mcode-object-version=6
OCLC_CONTROL(int, ISA_version, tilelang_ext::isa_version(__amdgcn_processor__))
OCLC_CONTROL(bool, unsafe_math_opt, false)
OCLC_CONTROL(bool, finite_only_opt, false)
OCLC_CONTROL(bool, correctly_rounded_sqrt32, true)
#undef OCLC_CONTROL
#endif
