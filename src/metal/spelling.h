/*!
 * \file spelling.h
 * \brief How types and functions are spelled in Metal: tables and the few rules about vectors.
 */
#ifndef TILELANG_EXT_METAL_SPELLING_H_
#define TILELANG_EXT_METAL_SPELLING_H_

#include <tvm/runtime/data_type.h>

#include <string>
#include <vector>

namespace tilelang_ext {
namespace metal {

using tvm::runtime::DataType;

/*! \brief The type in which Metal holds values of `t`: of tfloat32, whose values are floats, float32. */
DataType StoredType(DataType t);

/*! \brief A number format that Metal stores as bytes and computes on only after a conversion. */
struct NarrowFloat {
  const char* name;     // in error messages
  const char* decode;   // helper: codes to half or float
  const char* decoded;  // "half" or "float"
  const char* encode;   // helper: float to codes
  int mantissa, bias, max_code;
  bool fnuz;         // 0x80 is NaN and there is no -0
  int infinity = 0;  // its code, 0 if there is none
};

/*! \brief The format of a dtype, or nullptr for types that Metal computes on. */
const NarrowFloat* AsNarrowFloat(DataType t);

/*! \brief A constant of a narrow format: round to nearest even, saturate; infinity where it has a code. */
int EncodeNarrow(const NarrowFloat& format, double value);

/*!
 * \brief The type as Metal spells it in registers; fails with a TypeError that tells what to use instead.
 *
 * Up to 4 lanes: Metal's own vectors (codes of narrow floats are `uchar`s; FP4 codes are packed, two per byte). Beyond:
 * 8-bit x8 and x16 and 16-bit x8 are packed into `uint2` and `uint4`; all else is `wide<chunk, n>`.
 */
std::string TypeName(DataType t);

/*! \brief Is a vector of this type stored in `wide`? */
bool IsWideStruct(DataType t);

/*! \brief The chunks of at most 4 lanes of which a longer vector consists. */
DataType ChunkType(DataType t);

/*! \brief Chunk i of a vector (a variable) of more than 4 lanes. */
std::string Chunk(const std::string& var, DataType t, int i);

/*! \brief A vector of more than 4 lanes from its chunks. */
std::string FromChunks(DataType t, const std::vector<std::string>& chunks);

/*! \brief Element i of a vector, which is a variable or a parenthesised expression. */
std::string Element(const std::string& vec, DataType t, int i);

/*! \brief A vector from its elements. */
std::string FromElements(DataType t, const std::vector<std::string>& elements);

/*! \brief Metal's words and the functions that generated text calls: no variable may hide them. */
std::vector<std::string> ReservedNames();

/*! \brief Metal's name for a math function of TIR or of libm ("expf", "tl.__exp", ...); "" when there is none. */
std::string MathFunction(const std::string& name);

}  // namespace metal
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_METAL_SPELLING_H_
