/*!
 * \file plan.cc
 * \brief Plans: from a call's arguments to the steps of a variant.
 */
#include "plan.h"

#include <algorithm>
#include <map>

#include "error.h"

namespace tilelang_ext {
namespace launch {

using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Bytes;
using tvm::ffi::Tensor;

// --- calls that were made ---

CallKey::CallKey(Stream stream, const Argument* arguments, const std::vector<ArgumentName>& names) {
  AddHashed(reinterpret_cast<uint64_t>(stream));
  for (size_t i = 0; i < names.size(); ++i) {
    const Argument& argument = arguments[i];
    if (names[i].type != ArgumentType::kTensor) {
      AddHashed(static_cast<uint64_t>(argument.value));
      continue;
    }
    if (!argument.present) {
      Add(~uint64_t{0});  // no device has this number
      continue;
    }
    const DLTensor& tensor = argument.tensor;
    Add(static_cast<uint64_t>(tensor.device.device_id) << 32 | static_cast<uint32_t>(tensor.device.device_type));
    Add(static_cast<uint64_t>(tensor.ndim) << 32 | tensor.dtype.lanes << 16 | tensor.dtype.bits << 8 |
        tensor.dtype.code);
    AddHashed(reinterpret_cast<uint64_t>(tensor.data) + tensor.byte_offset);
    for (int d = 0; d < tensor.ndim; ++d) {
      d == 0 ? AddHashed(tensor.shape[d]) : Add(tensor.shape[d]);
      Add(static_cast<uint64_t>(tensor.strides == nullptr ? -1 : tensor.strides[d]));
    }
  }
  hash_ ^= hash_ >> 32;
}

std::shared_ptr<Prepared> RecentCalls::Find(const CallKey& key) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = calls_.find(key.hash());
  return found != calls_.end() && key == found->second.words ? found->second.prepared : nullptr;
}

void RecentCalls::Add(const CallKey& key, std::shared_ptr<Prepared> prepared) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (calls_.size() >= kMost) calls_.clear();
  calls_[key.hash()] = {key.words(), std::move(prepared)};
}

void RecentCalls::Clear() {
  std::lock_guard<std::mutex> lock(mutex_);
  calls_.clear();
}

// --- plans ---

Plan::Plan(std::shared_ptr<Shared> shared, const Recipe& recipe)
    : shared_(std::move(shared)), name_(TextOf(recipe, "name")), key_table_({}), table_(nullptr) {
  static const std::map<std::string, ArgumentType> types = {{"tensor", ArgumentType::kTensor},
                                                            {"int", ArgumentType::kInt},
                                                            {"float", ArgumentType::kFloat},
                                                            {"str", ArgumentType::kText}};
  std::vector<std::string> texts;
  for (const Any& any : ArrayOf(recipe, "arguments")) {
    const auto argument = any.cast<Recipe>();
    texts.push_back(TextOf(argument, "name"));
    names_.push_back({texts.back(), types.at(TextOf(argument, "type")), {}});
  }
  CheckLimit(names_.size(), kMaxArguments, "arguments", name_);
  key_table_ = FactTable(std::move(texts));
  for (const Any& any : ArrayOf(recipe, "key")) key_.emplace_back(any, &key_table_);
  CheckLimit(key_.size(), kMaxKey, "expressions in its key", name_);
  size_ = Expression(recipe.at("size"), &key_table_);
  CheckLimit(key_table_.size(), kMaxFacts, "facts in its key", name_);
  tables_.push_back(std::make_unique<const Table>());
  table_.store(tables_.back().get());
}

uint64_t Plan::HashOf(const Key& key) const {
  uint64_t hash = 0;
  for (size_t i = 0; i < key_.size(); ++i) {
    hash = (hash ^ static_cast<uint64_t>(key[i])) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  }
  return hash;
}

void Plan::Add(const Recipe& recipe, const Array<Bytes>& cubins, const Array<Tensor>& constants) {
  auto variant = std::make_unique<Variant>(recipe, cubins, constants, names_, name_);
  Key key{};
  const auto values = ArrayOf(recipe, "key");
  if (values.size() != key_.size()) {
    Raise("ValueError") << name_ << ": the key of a variant must have " << key_.size() << " values; got "
                        << values.size() << "; see the plan's key";
  }
  for (size_t i = 0; i < values.size(); ++i) key[i] = values[i].cast<int64_t>();
  const auto sizes = recipe.at("sizes").cast<Array<int64_t>>();
  std::lock_guard<std::mutex> lock(mutex_);
  auto table = std::make_unique<Table>(*tables_.back());
  std::vector<Served>& served = (*table)[HashOf(key)];
  const Served added{key, sizes[0], sizes[1], variant.get()};
  const auto is_replaced = [&](const Served& other) {
    return IsEqual(key, other.key) && added.first <= other.first && other.last <= added.last;
  };
  served.erase(std::remove_if(served.begin(), served.end(), is_replaced), served.end());
  served.insert(served.begin(), added);
  variants_.push_back(std::move(variant));
  tables_.push_back(std::move(table));
  table_.store(tables_.back().get(), std::memory_order_release);
  recent_.Clear();
}

int64_t Plan::ReadKey(const Argument* arguments, Key* key) const {
  int64_t facts[kMaxFacts];
  key_table_.Read(arguments, facts);
  for (size_t i = 0; i < key_.size(); ++i) (*key)[i] = key_[i](facts);
  return size_(facts);
}

Variant* Plan::Find(const Argument* arguments) const {
  const Table& table = *table_.load(std::memory_order_acquire);
  Key key;
  const int64_t size = ReadKey(arguments, &key);
  const auto found = table.find(HashOf(key));
  if (found == table.end()) return nullptr;
  for (const Served& served : found->second) {
    if (served.first <= size && size <= served.last && IsEqual(key, served.key)) return served.variant;
  }
  return nullptr;
}

void Plan::ReadTuple(int64_t tuple, Argument* arguments, std::vector<ManagedTensor>* kept) const {
  void* const object = reinterpret_cast<void*>(tuple);
  void* objects[kMaxArguments];
  const auto count = static_cast<size_t>(cpython.PyTuple_Size(object));
  for (size_t i = 0; i < std::min(count, kMaxArguments); ++i) objects[i] = cpython.PyTuple_GetItem(object, i);
  shared_->torch.Read(objects, count, names_, name_, arguments, kept);
}

Array<int64_t> Plan::KeyOf(int64_t tuple) const {
  Argument arguments[kMaxArguments];
  ReadTuple(tuple, arguments, nullptr);
  Key key;
  const int64_t size = ReadKey(arguments, &key);
  Array<int64_t> values(key.begin(), key.begin() + key_.size());
  values.push_back(size);
  return values;
}

void Plan::Call(void* const* objects, size_t count) {
  Argument arguments[kMaxArguments];
  shared_->torch.Read(objects, count, names_, name_, arguments, nullptr);
  if (!LaunchRead(arguments)) RaiseMissing(arguments);
}

void Plan::RaiseMissing(const Argument* arguments) const {
  Key key;
  const int64_t size = ReadKey(arguments, &key);
  Raise error("LookupError");
  error << name_ << ": a plan must have a variant for its arguments; got none for key [";
  for (size_t i = 0; i < key_.size(); ++i) error << (i ? ", " : "") << key[i];
  error << "] and size " << size << "; add one";
}

bool Plan::Launch(void* const* objects, size_t count) {
  Argument arguments[kMaxArguments];
  shared_->torch.Read(objects, count, names_, name_, arguments, nullptr);
  return LaunchRead(arguments);
}

bool Plan::LaunchDirectly(void* const* objects, size_t count) {
  if (count != names_.size() || shared_->torch.IsObserved(objects, names_)) return false;
  try {
    return Launch(objects, count);
  } catch (const tvm::ffi::Error& error) {
    // What a rule refuses, the operator may still copy, and else says more of.
    if (error.kind() == "TypeError" || error.kind() == "ValueError") return false;
    throw;
  }
}

bool Plan::LaunchRead(const Argument* arguments) {
  const DLDevice* device = nullptr;
  for (size_t i = 0; i < names_.size() && device == nullptr; ++i) {
    if (names_[i].type == ArgumentType::kTensor && arguments[i].present) device = &arguments[i].tensor.device;
  }
  const bool on_gpu = device != nullptr && device->device_type == kDLCUDA;
  const Stream stream = on_gpu ? shared_->torch.CurrentStream(*device, name_) : nullptr;
  const CallKey key(stream, arguments, names_);
  std::shared_ptr<Prepared> prepared = key.fits() ? recent_.Find(key) : nullptr;
  if (prepared == nullptr) {
    Variant* variant = Find(arguments);
    if (variant == nullptr) return false;
    prepared = std::make_shared<Prepared>(shared_.get(), variant, arguments, name_);
    if (key.fits()) recent_.Add(key, prepared);
  }
  const ReleaseLock release;
  prepared->Launch(stream);
  return true;
}

namespace {

/*! \brief A plan with its arguments, which it keeps. */
class Bound : public Callable {
 public:
  Bound(std::shared_ptr<Plan> plan, std::shared_ptr<Shared> shared, std::string name, std::vector<ManagedTensor> kept,
        std::unique_ptr<Prepared> prepared)
      : plan_(std::move(plan)),
        shared_(std::move(shared)),
        name_(std::move(name)),
        kept_(std::move(kept)),
        prepared_(std::move(prepared)) {}

  void Call(void* const*, size_t count) override {
    if (count != 0) {
      Raise("TypeError") << name_ << ": what is bound must be called without arguments; got " << count
                         << "; leave them out";
    }
    const Stream stream = shared_->torch.CurrentStream(prepared_->device(), name_);
    const ReleaseLock release;
    prepared_->Launch(stream);
  }
  bool Launch(void* const* arguments, size_t count) override { return Call(arguments, count), true; }
  bool LaunchDirectly(void* const* arguments, size_t count) override { return Call(arguments, count), true; }

 private:
  std::shared_ptr<Plan> plan_;  // has the variant
  std::shared_ptr<Shared> shared_;
  std::string name_;
  std::vector<ManagedTensor> kept_;
  std::unique_ptr<Prepared> prepared_;
};

}  // namespace

std::shared_ptr<Callable> Plan::Bind(int64_t tuple) {
  Argument arguments[kMaxArguments];
  std::vector<ManagedTensor> kept;
  ReadTuple(tuple, arguments, &kept);
  Variant* variant = Find(arguments);
  if (variant == nullptr) RaiseMissing(arguments);
  auto prepared = std::make_unique<Prepared>(shared_.get(), variant, arguments, name_);
  return std::make_shared<Bound>(shared_from_this(), shared_, name_, std::move(kept), std::move(prepared));
}

}  // namespace launch
}  // namespace tilelang_ext
