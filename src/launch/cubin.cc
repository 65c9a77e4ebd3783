/*!
 * \file cubin.cc
 * \brief Reading a cubin's ELF.
 *
 * | assembler | ABI version | SM | machine code of one chip alone ("sm_90a") |
 * | --- | --- | --- | --- |
 * | CUDA 12 | 7 | e_flags, bits 0 to 7 | e_flags, bit 11 |
 * | CUDA 13 | 8 | e_flags, bits 8 to 15 | `.nv.compat`, attribute 9 (CUDA_ACCELERATOR_TARGET) is 1 |
 *
 * SMs before 90 have no such code, and no such attribute. Seen in cubins of ptxas 12.9, 13.0 and 13.5; nvdisasm 13.5
 * names the target by the same bits.
 */
#include "cubin.h"

#include <algorithm>
#include <cstring>

#include "error.h"

namespace tilelang_ext {
namespace launch {
namespace {

constexpr uint16_t kMachineCuda = 190;
constexpr uint32_t kNoBits = 8;  // a section without content
constexpr int kFirstWithAccelerators = 90;
constexpr uint8_t kAbiOfCuda12 = 7, kAbiOfCuda13 = 8;
constexpr uint32_t kAcceleratorOfCuda12 = 1u << 11;
constexpr uint8_t kCompatAcceleratorTarget = 9, kInfoParameter = 0x17, kByteValue = 2, kSized = 4;

/*! \brief Bytes of the file, every read checked. */
class Reader {
 public:
  Reader(const std::string& bytes, const std::string& who) : bytes_(bytes), who_(who) {}

  template <typename T>
  T At(uint64_t offset) const {
    T value;
    if (offset > bytes_.size() || bytes_.size() - offset < sizeof(T)) Refuse("is cut short");
    std::memcpy(&value, bytes_.data() + offset, sizeof(T));
    return value;
  }

  std::string Text(uint64_t offset) const {
    const size_t end = offset < bytes_.size() ? bytes_.find('\0', offset) : std::string::npos;
    if (end == std::string::npos) Refuse("is cut short");
    return bytes_.substr(offset, end - offset);
  }

  [[noreturn]] void Refuse(const std::string& got) const {
    Raise("ValueError") << who_ << ": binary must be a cubin whose ELF proves its architecture; got one that " << got
                        << "; compile it with `nvcc -cubin -arch=sm_90a` of CUDA 12 or 13";
  }

 private:
  const std::string& bytes_;
  const std::string& who_;
};

struct Section {
  std::string name;
  uint64_t offset, size;
};

std::vector<Section> ReadSections(const Reader& file) {
  const auto start = file.At<uint64_t>(40);
  const auto count = file.At<uint16_t>(60), names = file.At<uint16_t>(62);
  auto header = [&](uint64_t index) { return start + index * 64; };
  const uint64_t texts = file.At<uint64_t>(header(names) + 24);
  std::vector<Section> sections;
  for (uint64_t i = 0; i < count; ++i) {
    file.At<uint64_t>(header(i) + 56);  // all of the header is there
    const auto offset = file.At<uint64_t>(header(i) + 24), size = file.At<uint64_t>(header(i) + 32);
    const bool in_file = file.At<uint32_t>(header(i) + 4) != kNoBits;
    if (in_file && size != 0) file.At<char>(offset + size - 1);
    sections.push_back({file.Text(texts + file.At<uint32_t>(header(i))), offset, in_file ? size : 0});
  }
  return sections;
}

/*! \brief Call visit(attribute, offset of its value, bytes of its value) for each record of an `.nv.info` or
 * `.nv.compat`. */
template <typename Visit>
void VisitRecords(const Reader& file, const Section& section, Visit visit) {
  for (uint64_t at = section.offset; at + 4 <= section.offset + section.size;) {
    const auto form = file.At<uint8_t>(at), attribute = file.At<uint8_t>(at + 1);
    const uint64_t bytes = form == kSized ? file.At<uint16_t>(at + 2) : 0;
    if (form == kSized) {
      visit(attribute, at + 4, bytes);
    } else if (form == kByteValue) {
      visit(attribute, at + 2, uint64_t{1});
    }
    at += 4 + bytes;
  }
}

std::vector<uint32_t> ReadParameters(const Reader& file, const Section& info) {
  std::vector<uint32_t> sizes;
  VisitRecords(file, info, [&](uint8_t attribute, uint64_t at, uint64_t bytes) {
    if (attribute != kInfoParameter || bytes < 12) return;
    const auto ordinal = file.At<uint16_t>(at + 4);
    sizes.resize(std::max<size_t>(sizes.size(), ordinal + 1));
    sizes[ordinal] = file.At<uint32_t>(at + 8) >> 18;
  });
  return sizes;
}

}  // namespace

CubinFacts ReadCubin(const std::string& bytes, const std::string& who) {
  const Reader file(bytes, who);
  if (bytes.compare(0, 4,
                    "\x7f"
                    "ELF") != 0)
    file.Refuse("is no ELF");
  if (file.At<uint8_t>(4) != 2 || file.At<uint16_t>(18) != kMachineCuda) file.Refuse("is not of a GPU");
  const auto abi = file.At<uint8_t>(8);
  const auto flags = file.At<uint32_t>(48);
  CubinFacts facts;
  const std::vector<Section> sections = ReadSections(file);
  if (abi == kAbiOfCuda12) {
    facts.sm = flags & 0xff;
    facts.arch_specific = flags & kAcceleratorOfCuda12;
  } else if (abi == kAbiOfCuda13) {
    facts.sm = flags >> 8 & 0xff;
    bool known = false;
    for (const Section& section : sections) {
      if (section.name != ".nv.compat") continue;
      VisitRecords(file, section, [&](uint8_t attribute, uint64_t at, uint64_t) {
        if (attribute != kCompatAcceleratorTarget) return;
        known = true;
        facts.arch_specific = file.At<uint8_t>(at) == 1;
      });
    }
    if (!known && facts.sm >= kFirstWithAccelerators) file.Refuse("has no .nv.compat with a CUDA_ACCELERATOR_TARGET");
  } else {
    file.Refuse("has ABI version " + std::to_string(abi));
  }
  const std::string prefix = ".nv.info.";
  for (const Section& section : sections) {
    if (section.name.compare(0, prefix.size(), prefix) == 0) {
      facts.sizes[section.name.substr(prefix.size())] = ReadParameters(file, section);
    }
  }
  return facts;
}

}  // namespace launch
}  // namespace tilelang_ext
