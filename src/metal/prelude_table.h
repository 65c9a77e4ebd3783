/*!
 * \file prelude_table.h
 * \brief The rows of the table of Metal helpers, which several files hold by what they are about.
 *
 * In a text, `$` stands for the lane count as Metal spells it ("", "2", "3", "4"): one text defines the overloads of
 * every width that is used. `@` makes two overloads, one for `device` and one for `threadgroup` pointers.
 * Number formats: see docs and tilelang_ext/formats.py.
 */
#ifndef TILELANG_EXT_METAL_PRELUDE_TABLE_H_
#define TILELANG_EXT_METAL_PRELUDE_TABLE_H_

#include <vector>

namespace tilelang_ext {
namespace metal {

struct Helper {
  const char* name;
  std::vector<const char*> needs;
  const char* text;
};

// A row may need earlier rows only, of its own file or of one before it.
std::vector<Helper> NumberHelpers();
std::vector<Helper> FormatHelpers();
std::vector<Helper> SimdgroupHelpers();
std::vector<Helper> MatrixHelpers();
std::vector<Helper> ThreadHelpers();

}  // namespace metal
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_METAL_PRELUDE_TABLE_H_
