/*!
 * \file prelude.cc
 * \brief Which Metal helpers a kernel calls, and their text.
 */
#include "prelude.h"

#include <tvm/ffi/error.h>

#include <vector>

#include "prelude_table.h"

namespace tilelang_ext {
namespace metal {
namespace {

const std::vector<Helper>& Table() {
  static const std::vector<Helper> table = [] {
    std::vector<Helper> rows;
    for (auto part : {NumberHelpers, FormatHelpers, SimdgroupHelpers, MatrixHelpers, ThreadHelpers}) {
      for (const Helper& helper : part()) rows.push_back(helper);
    }
    return rows;
  }();
  return table;
}

int Find(const std::string& name) {
  const auto& table = Table();
  for (size_t i = 0; i < table.size(); ++i) {
    if (name == table[i].name) return static_cast<int>(i);
  }
  return -1;
}

std::string Replaced(std::string text, char mark, const std::string& by) {
  std::string out;
  for (char c : text) {
    if (c == mark) {
      out += by;
    } else {
      out += c;
    }
  }
  return out;
}

bool PerLane(const Helper& helper) { return std::string(helper.text).find('$') != std::string::npos; }

}  // namespace

bool Prelude::Has(const std::string& name) { return Find(name) >= 0; }

void Prelude::Use(const std::string& name, int lanes) {
  int row = Find(name);
  TVM_FFI_ICHECK_GE(row, 0) << "no Metal helper " << name;
  const Helper& helper = Table()[row];
  if (!PerLane(helper)) {
    for (const char* needed : helper.needs) Use(needed, 1);
    used_.insert({row, 1});
    return;
  }
  TVM_FFI_ICHECK(lanes >= 1 && lanes <= 4) << "Metal helper " << name << " for " << lanes << " lanes";
  for (const char* needed : helper.needs) Use(needed, lanes);
  used_.insert({row, lanes});
}

std::string Prelude::Text() const {
  std::string out = "#include <metal_stdlib>\n";
  if (used_.count({Find("simdgroup_mma"), 1})) out += "#include <metal_simdgroup_matrix>\n";
  if (used_.count({Find("matmul2d"), 1})) {
    out += "#include <MetalPerformancePrimitives/MetalPerformancePrimitives.h>\n";
  }
  out += "using namespace metal;\n";
  for (const auto& [row, lanes] : used_) {
    std::string text = Replaced(Table()[row].text, '$', lanes == 1 ? "" : std::to_string(lanes));
    if (text.find('@') != std::string::npos) {
      text = Replaced(text, '@', "device") + Replaced(text, '@', "threadgroup");
    }
    out += text;
  }
  return out;
}

}  // namespace metal
}  // namespace tilelang_ext
