/*!
 * \file callable.h
 * \brief The Python type of what launches: calling it costs no Python frame and no argument conversion.
 */
#ifndef TILELANG_EXT_LAUNCH_CALLABLE_H_
#define TILELANG_EXT_LAUNCH_CALLABLE_H_

#include <memory>

#include "cpython.h"

namespace tilelang_ext {
namespace launch {

/*! \brief What an object of the type does with the arguments of a call, given as Python's objects with its lock held.
 */
class Callable {
 public:
  virtual ~Callable() = default;
  /*! \brief object(*arguments). */
  virtual void Call(void* const* arguments, size_t count) = 0;
  /*! \brief object.launch(*arguments): false where there is nothing to launch for them. */
  virtual bool Launch(void* const* arguments, size_t count) = 0;
  /*! \brief object.launch_directly(*arguments): the same, and false where somebody would miss torch's operator. */
  virtual bool LaunchDirectly(void* const* arguments, size_t count) = 0;
};

/*! \brief Make the type, a subclass of object that Python may derive from; its objects do nothing until `Attach`. */
void* MakeCallableType();

/*! \brief Give an object of the type what it calls. */
void Attach(void* object, std::shared_ptr<Callable> callable);

}  // namespace launch
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_LAUNCH_CALLABLE_H_
