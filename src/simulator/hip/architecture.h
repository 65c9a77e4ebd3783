// The architecture that SIM_ARCHITECTURE names (0x942 is gfx942) and what it has.
#pragma once

namespace sim {

struct Architecture {
  unsigned id;
  constexpr bool cdna() const { return id >= 0x908 && id <= 0x950; }
  constexpr bool cdna2_or_later() const { return id >= 0x90a && id <= 0x950; }
  constexpr bool cdna1_or_2() const { return id == 0x908 || id == 0x90a; }
  constexpr bool cdna3_or_later() const { return id >= 0x940 && id <= 0x950; }
  constexpr bool cdna4() const { return id == 0x950; }
  constexpr bool rdna3() const { return id >= 0x1100 && id <= 0x11ff; }
  constexpr bool rdna4() const { return id == 0x1200 || id == 0x1201; }
  constexpr bool fnuz() const { return id >= 0x940 && id <= 0x942; }         // its fp8 is FNUZ, that of all others OCP
  constexpr bool flushes_subnormal_operands() const { return id == 0x90a; }  // of 16-bit products
};
inline constexpr Architecture architecture{SIM_ARCHITECTURE};

}  // namespace sim
