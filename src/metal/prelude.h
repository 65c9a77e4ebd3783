/*!
 * \file prelude.h
 * \brief The Metal functions that generated text may call: one table of name, text and dependencies.
 *
 * A helper is printed if and only if the generator asked for it, so that a helper called is a helper defined.
 */
#ifndef TILELANG_EXT_METAL_PRELUDE_H_
#define TILELANG_EXT_METAL_PRELUDE_H_

#include <set>
#include <string>
#include <utility>

namespace tilelang_ext {
namespace metal {

/*! \brief The helpers that one kernel calls, each for the lane counts that it calls them with. */
class Prelude {
 public:
  /*! \brief Is there a helper of this name? */
  static bool Has(const std::string& name);

  /*! \brief Ask for a helper (and what it needs) for 1..4 lanes; fails for a name that the table lacks. */
  void Use(const std::string& name, int lanes = 1);

  void Merge(const Prelude& other) { used_.insert(other.used_.begin(), other.used_.end()); }

  /*! \brief Includes and definitions, in the order of the table. */
  std::string Text() const;

 private:
  std::set<std::pair<int, int>> used_;  // (row of the table, lanes)
};

}  // namespace metal
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_METAL_PRELUDE_H_
