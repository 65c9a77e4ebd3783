/*!
 * \file cubin.h
 * \brief What a cubin's ELF proves: the architecture of its machine code, and the parameters of its kernels.
 *
 * Only what the assembler wrote for the driver is read: the header's flags, `.nv.compat` and `.nv.info.*`. Notes that
 * repeat the command line of the build prove nothing and are not read.
 */
#ifndef TILELANG_EXT_LAUNCH_CUBIN_H_
#define TILELANG_EXT_LAUNCH_CUBIN_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace tilelang_ext {
namespace launch {

/*! \brief What was read from a cubin. */
struct CubinFacts {
  int sm = 0;                                          // 90 for sm_90 and sm_90a
  bool arch_specific = false;                          // sm_90a, which runs on compute capability 9.0 alone
  std::map<std::string, std::vector<uint32_t>> sizes;  // of each kernel's parameters in bytes, in order

  std::string arch() const { return "sm_" + std::to_string(sm) + (arch_specific ? "a" : ""); }
};

/*! \brief Read a cubin. Throws ValueError, naming `who`, for anything else and for formats that prove no architecture.
 */
CubinFacts ReadCubin(const std::string& bytes, const std::string& who);

}  // namespace launch
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_LAUNCH_CUBIN_H_
