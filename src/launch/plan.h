/*!
 * \file plan.h
 * \brief A plan: an operator bound to all that does not change from call to call.
 *
 * A plan has a key, expressions over its arguments, and a size, one more. A variant serves one value of the key and a
 * range of sizes. It has rules that its arguments must keep, workspace, and steps: launches of kernels and fills of
 * memory. A call reads the arguments. If the plan has launched the same on this stream, all that follows from them is
 * known, and the steps are enqueued; else it finds the variant, checks its rules and computes the parameters of every
 * kernel.
 */
#ifndef TILELANG_EXT_LAUNCH_PLAN_H_
#define TILELANG_EXT_LAUNCH_PLAN_H_

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "callable.h"
#include "prepared.h"

namespace tilelang_ext {
namespace launch {

/*! \brief All that decides what a call launches, as words: the stream, the arguments; and a hash of what mostly
 * differs. */
class CallKey {
 public:
  CallKey(Stream stream, const Argument* arguments, const std::vector<ArgumentName>& names);
  bool fits() const { return size_ <= kMost; }
  uint64_t hash() const { return hash_; }
  bool operator==(const std::vector<uint64_t>& words) const {
    return words.size() == size_ && std::equal(words.begin(), words.end(), words_.begin());
  }
  std::vector<uint64_t> words() const { return {words_.begin(), words_.begin() + size_}; }

 private:
  static constexpr size_t kMost = 384;
  void Add(uint64_t word) {
    if (size_ < kMost) words_[size_] = word;
    ++size_;
  }
  void AddHashed(uint64_t word) {
    // Words times odd numbers, each another: they need not wait for one another.
    hash_ += word * (0x9e3779b97f4a7c15u + size_ * 0xbf58476d1ce4e5b8u);
    Add(word);
  }
  std::array<uint64_t, kMost> words_;
  size_t size_ = 0;
  uint64_t hash_ = 0;
};

/*! \brief Calls that were made, by what decides what they launch. */
class RecentCalls {
 public:
  std::shared_ptr<Prepared> Find(const CallKey& key) const;
  void Add(const CallKey& key, std::shared_ptr<Prepared> prepared);
  void Clear();

 private:
  static constexpr size_t kMost = 1024;  // then all are forgotten
  struct Known {
    std::vector<uint64_t> words;
    std::shared_ptr<Prepared> prepared;
  };
  mutable std::mutex mutex_;
  std::unordered_map<uint64_t, Known> calls_;
};

/*! \brief An operator's variants. */
class Plan : public Callable, public std::enable_shared_from_this<Plan> {
 public:
  Plan(std::shared_ptr<Shared> shared, const Recipe& recipe);
  /*! \brief Let an integer argument be given by objects alone, such as the members of an enum. */
  void AddMember(int64_t argument, void* object, int64_t value) {
    names_.at(argument).members.emplace_back(object, value);
  }

  /*! \brief Add a variant, in place of those of its key and range. */
  void Add(const Recipe& recipe, const tvm::ffi::Array<tvm::ffi::Bytes>& cubins,
           const tvm::ffi::Array<tvm::ffi::Tensor>& constants);
  void Call(void* const* arguments, size_t count) override;
  bool Launch(void* const* arguments, size_t count) override;
  bool LaunchDirectly(void* const* arguments, size_t count) override;
  /*! \brief Return the key of the arguments in a tuple, and their size. Needs Python's lock. */
  tvm::ffi::Array<int64_t> KeyOf(int64_t tuple) const;
  /*! \brief Return what launches without arguments with those in a tuple, which it keeps. Needs Python's lock. */
  std::shared_ptr<Callable> Bind(int64_t tuple);

 private:
  using Key = std::array<int64_t, kMaxKey>;  // as many as key_ has
  struct Served {
    Key key;
    int64_t first, last;  // sizes
    Variant* variant;
  };
  using Table = std::unordered_map<uint64_t, std::vector<Served>>;  // by the hash of the key

  void ReadTuple(int64_t tuple, Argument* arguments, std::vector<ManagedTensor>* kept) const;
  int64_t ReadKey(const Argument* arguments, Key* key) const;  // returns the size
  void RaiseMissing(const Argument* arguments) const;          // says that no variant has their key
  uint64_t HashOf(const Key& key) const;
  bool IsEqual(const Key& one, const Key& other) const { return std::equal(&one[0], &one[0] + key_.size(), &other[0]); }
  Variant* Find(const Argument* arguments) const;
  bool LaunchRead(const Argument* arguments);

  std::shared_ptr<Shared> shared_;
  std::string name_;
  std::vector<ArgumentName> names_;
  FactTable key_table_;
  std::vector<Expression> key_;
  Expression size_;
  RecentCalls recent_;
  std::mutex mutex_;  // of Add
  // A call reads the table without a lock: Add puts a new one in its place, and keeps the old ones and all variants.
  std::atomic<const Table*> table_;
  std::vector<std::unique_ptr<const Table>> tables_;
  std::vector<std::unique_ptr<Variant>> variants_;
};

}  // namespace launch
}  // namespace tilelang_ext
#endif  // TILELANG_EXT_LAUNCH_PLAN_H_
