/*!
 * \file plan.cc
 * \brief Plans: from a call's arguments to the driver.
 */
#include "plan.h"

#include <tvm/ffi/dtype.h>

#include <algorithm>
#include <cstring>

#include "error.h"

namespace tilelang_ext {
namespace launch {

using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Bytes;
using tvm::ffi::String;
using tvm::ffi::Tensor;

namespace {

constexpr int kMaxDynamicSharedBytes = 8, kNonPortableClusterSize = 14;  // CUfunction_attribute
constexpr int kRelaxedCapture = 2;                                       // CUstreamCaptureMode
constexpr uint32_t kPortableClusterSize = 8;

std::string TextOf(const Recipe& recipe, const char* key) { return recipe.at(key).cast<String>(); }

int64_t IntegerOf(const Recipe& recipe, const char* key, int64_t otherwise) {
  const auto found = recipe.Get(key);
  return found.has_value() ? found->cast<int64_t>() : otherwise;
}

Array<Any> ArrayOf(const Recipe& recipe, const char* key) {
  const auto found = recipe.Get(key);
  return found.has_value() ? found->cast<Array<Any>>() : Array<Any>();
}

template <typename T>
std::string Join(const T* values, int count) {
  std::ostringstream text;
  text << "(";
  for (int i = 0; i < count; ++i) text << (i ? ", " : "") << values[i];
  text << (count == 1 ? ",)" : ")");
  return text.str();
}

int FindBuffer(const std::vector<std::string>& buffers, const std::string& name) {
  const auto found = std::find(buffers.begin(), buffers.end(), name);
  if (found == buffers.end()) {
    Raise("ValueError") << "plan: a step must name an argument, a workspace slot or a constant; got " << name
                        << "; see the recipe";
  }
  return static_cast<int>(found - buffers.begin());
}

std::string DeviceName(const DLDevice& device) {
  const bool cuda = device.device_type == kDLCUDA;
  const std::string type = cuda ? "cuda" : device.device_type == kDLCPU ? "cpu" : "another type";
  return cuda ? type + ":" + std::to_string(device.device_id) : type;
}

void CheckLimit(size_t count, size_t most, const char* what, const std::string& who) {
  if (count > most) {
    Raise("ValueError") << who << ": a plan must have at most " << most << " " << what << "; got " << count
                        << "; divide the operator";
  }
}

}  // namespace

// --- binaries ---

Binary::Binary(std::string bytes, const std::string& target, const std::string& who)
    : bytes_(std::move(bytes)), facts_(ReadCubin(bytes_, who)) {
  if (facts_.arch() != target) {
    Raise("ValueError") << who << ": binary must be for " << target << "; got one whose ELF says " << facts_.arch()
                        << "; compile it for " << target;
  }
}

Function Binary::Load(Driver* driver, int device, const std::string& kernel, const std::string& who) {
  std::lock_guard<std::mutex> lock(mutex_);
  Module& module = modules_[device];
  // A module may be loaded while another stream, or this one, is captured.
  int mode = kRelaxedCapture;
  driver->Check(driver->exchange_capture_mode(&mode), "cuThreadExchangeStreamCaptureMode", who);
  // Never unloaded: graphs that were captured hold its kernels.
  const int loaded = module == nullptr ? driver->load_module(&module, bytes_.data()) : 0;
  driver->exchange_capture_mode(&mode);
  driver->Check(loaded, "cuModuleLoadData", who);
  Function function;
  driver->Check(driver->get_function(&function, module, kernel.c_str()), "cuModuleGetFunction", who);
  return function;
}

// --- TMA descriptors ---

TensorMapRecipe::TensorMapRecipe(const Recipe& recipe, FactTable* table, const std::vector<std::string>& buffers)
    : base_{FindBuffer(buffers, TextOf(recipe, "of")), Expression(recipe.at("offset"), table)},
      dtype_(static_cast<int>(recipe.at("dtype").cast<int64_t>())),
      interleave_(static_cast<int>(recipe.at("interleave").cast<int64_t>())),
      swizzle_(static_cast<int>(recipe.at("swizzle").cast<int64_t>())),
      promotion_(static_cast<int>(recipe.at("l2_promotion").cast<int64_t>())),
      fill_(static_cast<int>(recipe.at("fill").cast<int64_t>())) {
  for (const Any& extent : ArrayOf(recipe, "extents")) extents_.emplace_back(extent, table);
  for (const Any& stride : ArrayOf(recipe, "strides")) strides_.emplace_back(stride, table);
  const auto box = recipe.at("box").cast<Array<int64_t>>();
  const auto element_strides = recipe.at("element_strides").cast<Array<int64_t>>();
  rank_ = static_cast<int>(extents_.size());
  if (rank_ < 1 || rank_ > kMaxTensorMapRank || strides_.size() != extents_.size() - 1 ||
      box.size() != extents_.size() || element_strides.size() != extents_.size()) {
    Raise("ValueError") << "plan: a tensor map must have 1 to 5 extents, a box and element strides for each, and one "
                           "stride less; got "
                        << rank_ << " extents and " << strides_.size() << " strides; see the recipe";
  }
  for (int i = 0; i < rank_; ++i) {
    box_[i] = static_cast<uint32_t>(box[i]);
    element_strides_[i] = static_cast<uint32_t>(element_strides[i]);
  }
}

void TensorMapRecipe::Encode(const Driver& driver, const uint64_t* addresses, const int64_t* facts,
                             const std::string& who, void* out) {
  Key key{};
  key[0] = addresses[base_.buffer] + base_.offset(facts);
  uint64_t *extents = &key[1], *strides = &key[1 + rank_];
  for (int i = 0; i < rank_; ++i) extents[i] = extents_[i](facts);
  for (int i = 0; i < rank_ - 1; ++i) strides[i] = strides_[i](facts);
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = cache_.find(key);
  if (found != cache_.end()) {
    std::memcpy(out, &found->second, sizeof(TensorMap));
    return;
  }
  TensorMap map;
  const int result = driver.encode_tiled(&map, dtype_, rank_, reinterpret_cast<void*>(key[0]), extents, strides, box_,
                                         element_strides_, interleave_, swizzle_, promotion_, fill_);
  if (result != 0) {
    Raise("RuntimeError") << who
                          << ": a TMA descriptor must be of addresses at a multiple of 16 bytes, extents above 0 and "
                          << "strides of whole 16 bytes; got address % 16 = " << key[0] % 16 << ", extents "
                          << Join(extents, rank_) << ", strides in bytes " << Join(strides, rank_ - 1) << ", box "
                          << Join(box_, rank_) << " (error " << result << "); see cuTensorMapEncodeTiled";
  }
  if (cache_.size() >= kMaxCached) cache_.clear();
  std::memcpy(out, &map, sizeof(TensorMap));
  cache_.emplace(key, map);
}

// --- steps ---

Step::Step(const Recipe& recipe, FactTable* table, const std::vector<std::string>& buffers,
           std::vector<std::shared_ptr<Binary>> binaries, const std::string& who) {
  if (recipe.count("fill")) {
    filled_ = {FindBuffer(buffers, TextOf(recipe, "fill")), Expression(IntegerOf(recipe, "offset", 0), table)};
    fill_bytes_ = Expression(recipe.at("bytes"), table);
    fill_byte_ = static_cast<unsigned char>(IntegerOf(recipe, "byte", 0));
    return;
  }
  kernel_ = TextOf(recipe, "launch");
  binary_ = binaries.at(IntegerOf(recipe, "cubin", 0));
  const auto grid = ArrayOf(recipe, "grid");
  const auto block = recipe.at("block").cast<Array<int64_t>>();
  for (size_t i = 0; i < 3; ++i) {
    grid_[i] = i < grid.size() ? Expression(grid[i], table) : Expression(1, table);
    block_[i] = i < block.size() ? static_cast<uint32_t>(block[i]) : 1;
  }
  shared_bytes_ = Expression(recipe.at("shared_bytes"), table);
  const auto cluster = recipe.Get("cluster");
  if (cluster.has_value()) {
    const auto dims = cluster->cast<Array<int64_t>>();
    LaunchAttribute& attribute = attributes_[num_attributes_++];
    attribute = {};
    attribute.id = kClusterDimension;
    for (size_t i = 0; i < 3; ++i) {
      attribute.value.cluster[i] = i < dims.size() ? static_cast<uint32_t>(dims[i]) : 1;
      cluster_size_ *= attribute.value.cluster[i];
    }
  }
  if (IntegerOf(recipe, "pdl", 0)) {
    LaunchAttribute& attribute = attributes_[num_attributes_++];
    attribute = {};
    attribute.id = kProgrammaticStreamSerialization;
    attribute.value.programmatic_stream_serialization = 1;
  }
  ReadParameters(ArrayOf(recipe, "parameters"), table, buffers, who);
  on_device_ = std::make_unique<OnDevice[]>(kMaxDevices);
}

void Step::ReadParameters(const Array<Any>& recipes, FactTable* table, const std::vector<std::string>& buffers,
                          const std::string& who) {
  static const std::map<std::string, std::pair<Parameter::Kind, uint32_t>> kinds = {
      {"int8", {Parameter::kInteger, 1}},    {"int16", {Parameter::kInteger, 2}},
      {"int32", {Parameter::kInteger, 4}},   {"int64", {Parameter::kInteger, 8}},
      {"float32", {Parameter::kFloat32, 4}}, {"float64", {Parameter::kFloat64, 8}},
      {"pointer", {Parameter::kPointer, 8}}, {"tensor_map", {Parameter::kTensorMap, sizeof(TensorMap)}},
  };
  CheckLimit(recipes.size(), kMaxParameters, "parameters of a kernel", who);
  uint32_t end = 0;
  for (const Any& any : recipes) {
    const auto recipe = any.cast<Array<Any>>();
    Parameter parameter;
    std::tie(parameter.kind, parameter.bytes) = kinds.at(recipe[0].cast<String>());
    if (parameter.kind == Parameter::kPointer) {
      parameter.pointer.buffer = FindBuffer(buffers, recipe[1].cast<String>());
      if (recipe.size() > 2) parameter.pointer.offset = Expression(recipe[2], table);
    } else if (parameter.kind == Parameter::kTensorMap) {
      parameter.tensor_map = std::make_shared<TensorMapRecipe>(recipe[1].cast<Recipe>(), table, buffers);
    } else {
      parameter.value = Expression(recipe[1], table);
    }
    const uint32_t alignment = parameter.kind == Parameter::kTensorMap ? alignof(TensorMap) : 8;
    parameter.offset = (end + alignment - 1) / alignment * alignment;
    end = parameter.offset + parameter.bytes;
    parameters_.push_back(std::move(parameter));
  }
  CheckLimit(end, kMaxParameterBytes, "bytes of parameters of a kernel", who);
  const auto found = binary_->facts().sizes.find(kernel_);
  std::vector<uint32_t> sizes;
  for (const Parameter& parameter : parameters_) sizes.push_back(parameter.bytes);
  if (found == binary_->facts().sizes.end() || found->second != sizes) {
    const bool known = found != binary_->facts().sizes.end();
    Raise("ValueError") << who << ": binary must have kernel " << kernel_ << " with parameters of bytes "
                        << Join(sizes.data(), static_cast<int>(sizes.size())) << "; got one "
                        << (known ? "with " + Join(found->second.data(), static_cast<int>(found->second.size()))
                                  : std::string("without it"))
                        << "; compile binary and recipe together";
  }
}

Function Step::Load(Driver* driver, int device, int64_t shared_bytes, const std::string& who) {
  OnDevice& on_device = on_device_[device];
  Function function = on_device.function.load(std::memory_order_acquire);
  if (function != nullptr && shared_bytes <= on_device.shared_bytes.load(std::memory_order_acquire)) return function;
  function = binary_->Load(driver, device, kernel_, who);
  if (shared_bytes > on_device.shared_bytes) {
    driver->Check(driver->set_attribute(function, kMaxDynamicSharedBytes, static_cast<int>(shared_bytes)),
                  "cuFuncSetAttribute of shared memory", who);
    on_device.shared_bytes.store(shared_bytes, std::memory_order_release);
  }
  if (cluster_size_ > kPortableClusterSize) {
    driver->Check(driver->set_attribute(function, kNonPortableClusterSize, 1), "cuFuncSetAttribute of clusters", who);
  }
  on_device.function.store(function, std::memory_order_release);
  return function;
}

void Step::Resolve(Driver* driver, int device, const uint64_t* addresses, const int64_t* facts, const std::string& who,
                   Resolved* out) {
  out->function = nullptr;
  out->fill_bytes = 0;
  if (kernel_.empty()) {
    out->fill_address = addresses[filled_.buffer] + filled_.offset(facts);
    out->fill_bytes = fill_bytes_(facts);
    return;
  }
  LaunchConfig& config = out->config;
  for (int i = 0; i < 3; ++i) {
    const int64_t blocks = grid_[i](facts);
    if (blocks <= 0) return;  // nothing to compute
    config.grid[i] = static_cast<uint32_t>(blocks);
    config.block[i] = block_[i];
  }
  const int64_t shared_bytes = shared_bytes_(facts);
  config.shared_bytes = static_cast<uint32_t>(shared_bytes);
  config.attributes = attributes_;
  config.num_attributes = num_attributes_;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& parameter = parameters_[i];
    unsigned char* at = out->values + parameter.offset;
    out->parameters[i] = at;
    switch (parameter.kind) {
      case Parameter::kPointer: {
        const uint64_t address = addresses[parameter.pointer.buffer] + parameter.pointer.offset(facts);
        std::memcpy(at, &address, sizeof(address));
        break;
      }
      case Parameter::kTensorMap:
        parameter.tensor_map->Encode(*driver, addresses, facts, who, at);
        break;
      case Parameter::kFloat32: {
        const int64_t bits = parameter.value(facts);
        double value;
        std::memcpy(&value, &bits, sizeof(value));
        const float narrow = static_cast<float>(value);
        std::memcpy(at, &narrow, sizeof(narrow));
        break;
      }
      default: {
        const int64_t value = parameter.value(facts);
        const int unused = 64 - 8 * static_cast<int>(parameter.bytes);
        const auto bits = static_cast<uint64_t>(value) << unused;
        if (static_cast<int64_t>(bits) >> unused != value && bits >> unused != static_cast<uint64_t>(value)) {
          Raise("ValueError") << who << ": sizes must fit the kernel's integers of " << parameter.bytes
                              << " bytes; got " << value << " for parameter " << i << " of " << kernel_
                              << "; divide the tensor";
        }
        std::memcpy(at, &value, sizeof(value));  // little-endian, as every host of a GPU
      }
    }
  }
  out->function = Load(driver, device, shared_bytes, who);
}

void Step::Enqueue(const Driver& driver, Stream stream, const std::string& who, const Resolved& resolved) const {
  if (resolved.fill_bytes != 0) {
    driver.Check(driver.fill(resolved.fill_address, fill_byte_, resolved.fill_bytes, stream), "cuMemsetD8Async", who);
  }
  if (resolved.function == nullptr) return;
  LaunchConfig config = resolved.config;
  config.stream = stream;
  const int result = driver.launch(&config, resolved.function, const_cast<void**>(resolved.parameters), nullptr);
  if (result != 0) {
    driver.Check(result, "cuLaunchKernelEx",
                 who + ": " + kernel_ + " of grid " + Join(config.grid, 3) + ", block " + Join(config.block, 3) + ", " +
                     std::to_string(config.shared_bytes) + " bytes of shared memory");
  }
}

// --- variants ---

Variant::Variant(const Recipe& recipe, const Array<Bytes>& cubins, const Array<Tensor>& constants,
                 const std::vector<ArgumentName>& names, const std::string& who)
    : names_(names), who_(who), table_([&] {
        std::vector<std::string> texts;
        for (const ArgumentName& name : names) texts.push_back(name.name);
        return texts;
      }()) {
  std::vector<std::string> buffers;
  for (const ArgumentName& name : names) buffers.push_back(name.name);
  for (const Any& any : ArrayOf(recipe, "tensors")) {
    const auto tensor = any.cast<Recipe>();
    TensorRule rule;
    rule.argument = table_.Find(TextOf(tensor, "name"));
    rule.dtype = tvm::ffi::StringToDLDataType(TextOf(tensor, "dtype"));
    auto read = [&](const Array<Any>& recipes, std::vector<std::optional<Expression>>* out) {
      for (const Any& any : recipes) {
        out->push_back(any == nullptr ? std::nullopt : std::make_optional<Expression>(any, &table_));
      }
    };
    read(ArrayOf(tensor, "shape"), &rule.shape);
    rule.any_strides = tensor.at("strides") == nullptr;
    if (!rule.any_strides) read(ArrayOf(tensor, "strides"), &rule.strides);
    rule.alignment = IntegerOf(tensor, "alignment", 1);
    tensors_.push_back(std::move(rule));
  }
  for (const Any& any : ArrayOf(recipe, "requirements")) {
    const auto requirement = any.cast<Recipe>();
    requirements_.push_back({Expression(requirement.at("that"), &table_),
                             Expression(requirement.at("got"), &table_),
                             {TextOf(requirement, "rule"), TextOf(requirement, "hint")}});
  }
  for (const Any& any : ArrayOf(recipe, "workspace")) {
    const auto slot = any.cast<Recipe>();
    buffers.push_back(TextOf(slot, "name"));
    workspace_.emplace_back(slot.at("bytes"), &table_);
  }
  const auto constant_names = ArrayOf(recipe, "constants");
  if (constant_names.size() != constants.size()) {
    Raise("ValueError") << who << ": constants must be " << constant_names.size() << " tensors; got "
                        << constants.size() << "; pass one for each name of the recipe";
  }
  for (size_t i = 0; i < constants.size(); ++i) {
    buffers.push_back(constant_names[i].cast<String>());
    constants_.push_back(constants[i]);
  }
  const std::string target = TextOf(recipe, "target");
  std::vector<std::shared_ptr<Binary>> binaries;
  for (const Bytes& bytes : cubins) {
    binaries.push_back(std::make_shared<Binary>(std::string(bytes.data(), bytes.size()), target, who));
    sm_ = binaries.back()->facts().sm;
    arch_specific_ = binaries.back()->facts().arch_specific;
  }
  for (const Any& any : ArrayOf(recipe, "steps")) {
    steps_.push_back(std::make_unique<Step>(any.cast<Recipe>(), &table_, buffers, binaries, who));
  }
  CheckLimit(buffers.size(), kMaxBuffers, "arguments, workspace slots and constants", who);
  CheckLimit(table_.size(), kMaxFacts, "facts about arguments", who);
}

void Variant::CheckTensor(const TensorRule& rule, const Argument& argument) const {
  const std::string& name = names_[rule.argument].name;
  if (!argument.present) Raise("TypeError") << who_ << ": " << name << " must be a torch.Tensor; got None; pass one";
  const DLTensor& tensor = argument.tensor;
  if (tensor.device.device_type != kDLCUDA) {
    Raise("ValueError") << who_ << ": " << name << " must be on an NVIDIA GPU; got a tensor on "
                        << DeviceName(tensor.device) << "; move it";
  }
  if (tensor.dtype.code != rule.dtype.code || tensor.dtype.bits != rule.dtype.bits ||
      tensor.dtype.lanes != rule.dtype.lanes) {
    Raise("TypeError") << who_ << ": " << name << " must be " << std::string(tvm::ffi::DLDataTypeToString(rule.dtype))
                       << "; got " << std::string(tvm::ffi::DLDataTypeToString(tensor.dtype)) << "; convert it";
  }
  if (tensor.ndim != static_cast<int>(rule.shape.size())) {
    Raise("ValueError") << who_ << ": " << name << " must have " << rule.shape.size() << " dimensions; got shape "
                        << Join(tensor.shape, tensor.ndim) << "; reshape it";
  }
}

void Variant::CheckLayout(const TensorRule& rule, const Argument& argument, const int64_t* facts) const {
  const DLTensor& tensor = argument.tensor;
  const int rank = tensor.ndim;
  for (int i = 0; i < rank; ++i) {
    if (!rule.shape[i] || tensor.shape[i] == (*rule.shape[i])(facts)) continue;
    std::vector<int64_t> wanted(tensor.shape, tensor.shape + rank);
    for (int j = 0; j < rank; ++j) {
      if (rule.shape[j]) wanted[j] = (*rule.shape[j])(facts);
    }
    Raise("ValueError") << who_ << ": " << names_[rule.argument].name << " must have shape "
                        << Join(wanted.data(), rank) << " beside the other arguments; got " << Join(tensor.shape, rank)
                        << "; check the sizes";
  }
  if (!rule.any_strides && tensor.strides != nullptr) {
    bool empty = false;
    for (int i = 0; i < rank; ++i) empty |= tensor.shape[i] == 0;
    for (int i = 0; i < rank && !empty; ++i) {
      // The stride of one element is never used.
      if (!rule.strides[i] || tensor.shape[i] == 1 || tensor.strides[i] == (*rule.strides[i])(facts)) continue;
      std::vector<int64_t> wanted(tensor.strides, tensor.strides + rank);
      for (int j = 0; j < rank; ++j) {
        if (rule.strides[j]) wanted[j] = (*rule.strides[j])(facts);
      }
      Raise("ValueError") << who_ << ": " << names_[rule.argument].name << " must have strides "
                          << Join(wanted.data(), rank) << " for shape " << Join(tensor.shape, rank) << "; got "
                          << Join(tensor.strides, rank) << "; pass a contiguous copy";
    }
  }
  const uint64_t address = reinterpret_cast<uint64_t>(tensor.data) + tensor.byte_offset;
  if (address % rule.alignment != 0) {
    Raise("ValueError") << who_ << ": " << names_[rule.argument].name << " must start at a multiple of "
                        << rule.alignment << " bytes; got one " << address % rule.alignment
                        << " past it; clone the slice";
  }
}

DLDevice Variant::Check(const Argument* arguments, int64_t* facts) const {
  const TensorRule* first = nullptr;
  size_t present = 0;
  for (size_t i = 0; i < names_.size(); ++i) present += names_[i].type == ArgumentType::kTensor && arguments[i].present;
  for (const TensorRule& rule : tensors_) {
    const Argument& argument = arguments[rule.argument];
    CheckTensor(rule, argument);
    if (first == nullptr) first = &rule;
    const DLDevice &device = argument.tensor.device, &wanted = arguments[first->argument].tensor.device;
    if (device.device_id != wanted.device_id) {
      Raise("ValueError") << who_ << ": " << names_[rule.argument].name << " must be on " << DeviceName(wanted)
                          << " as " << names_[first->argument].name << " is; got " << DeviceName(device) << "; move it";
    }
  }
  if (first == nullptr || present != tensors_.size()) {
    Raise("ValueError") << who_ << ": a plan must be called with the " << tensors_.size()
                        << " tensors that it was prepared for; got " << present << "; pass None for others";
  }
  table_.Read(arguments, facts);
  for (const TensorRule& rule : tensors_) CheckLayout(rule, arguments[rule.argument], facts);
  for (const Requirement& requirement : requirements_) {
    if (requirement.that(facts)) continue;
    Raise("ValueError") << who_ << ": " << requirement.message[0] << "; got " << requirement.got(facts) << "; "
                        << requirement.message[1];
  }
  return arguments[first->argument].tensor.device;
}

int64_t Variant::Place(const Argument* arguments, const int64_t* facts, uint64_t* addresses) const {
  for (size_t i = 0; i < names_.size(); ++i) {
    const DLTensor& tensor = arguments[i].tensor;
    const bool is_tensor = names_[i].type == ArgumentType::kTensor && arguments[i].present;
    *addresses++ = is_tensor ? reinterpret_cast<uint64_t>(tensor.data) + tensor.byte_offset : 0;
  }
  int64_t end = 0;
  for (const Expression& bytes : workspace_) {
    *addresses++ = end;
    end += (std::max<int64_t>(bytes(facts), 0) + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
  }
  for (const Tensor& constant : constants_) {
    *addresses++ = reinterpret_cast<uint64_t>(constant.data_ptr()) + constant.byte_offset();
  }
  return end;
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
    names_.push_back({texts.back(), types.at(TextOf(argument, "type"))});
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

Array<int64_t> Plan::KeyOf(int64_t tuple) const {
  Argument arguments[kMaxArguments];
  shared_->python.Read(reinterpret_cast<void*>(tuple), names_, name_, arguments, nullptr);
  Key key;
  const int64_t size = ReadKey(arguments, &key);
  Array<int64_t> values(key.begin(), key.begin() + key_.size());
  values.push_back(size);
  return values;
}

const Device& Plan::DeviceOf(const Variant& variant, const DLDevice& device) {
  const Device& found = shared_->driver.device(device.device_id, name_);
  const int capability = found.major * 10 + found.minor;
  const bool runs = variant.arch_specific() ? capability == variant.sm()
                                            : found.major == variant.sm() / 10 && capability >= variant.sm();
  if (!runs) {
    Raise("RuntimeError") << name_ << ": kernels for sm_" << variant.sm() << (variant.arch_specific() ? "a" : "")
                          << " must run on compute capability " << variant.sm() / 10 << "." << variant.sm() % 10
                          << (variant.arch_specific() ? "" : " or a later one of that generation") << "; got "
                          << DeviceName(device) << " of " << found.major << "." << found.minor
                          << "; prepare it for that GPU";
  }
  return found;
}

bool Plan::Call(int64_t tuple) {
  Argument arguments[kMaxArguments];
  shared_->python.Read(reinterpret_cast<void*>(tuple), names_, name_, arguments, nullptr);
  Variant* variant = Find(arguments);
  if (variant == nullptr) return false;
  Launch(variant, arguments);
  return true;
}

void Plan::Launch(Variant* variant, const Argument* arguments) {
  int64_t facts[kMaxFacts];
  const DLDevice device = variant->Check(arguments, facts);
  uint64_t addresses[kMaxBuffers];
  const int64_t bytes = variant->Place(arguments, facts, addresses);
  const ReleaseLock release(shared_->python);
  Driver& driver = shared_->driver;
  const Device& opened = DeviceOf(*variant, device);
  const Stream stream = shared_->python.CurrentStream(device, name_);
  const ContextGuard guard(driver, opened.context, name_);
  const Workspace workspace(&shared_->workspaces, driver, shared_->python, device, stream, bytes, name_);
  variant->MoveWorkspace(workspace.address(), addresses);
  for (const std::unique_ptr<Step>& step : variant->steps()) {
    Resolved resolved;
    step->Resolve(&driver, device.device_id, addresses, facts, name_, &resolved);
    step->Enqueue(driver, stream, name_, resolved);
  }
}

/*! \brief A plan with its arguments: all that they decide is computed once. */
class Bound {
 public:
  Bound(std::shared_ptr<Plan> plan, std::vector<Argument> arguments, std::vector<ManagedTensor> kept)
      : plan_(std::move(plan)), arguments_(std::move(arguments)), kept_(std::move(kept)) {
    variant_ = plan_->Find(arguments_.data());
    if (variant_ == nullptr) {
      Raise("ValueError") << plan_->name_
                          << ": bind needs a variant for these sizes; got none compiled; call the plan first";
    }
    device_ = variant_->Check(arguments_.data(), facts_);
    context_ = plan_->DeviceOf(*variant_, device_).context;
    workspace_bytes_ = variant_->Place(arguments_.data(), facts_, addresses_);
    resolved_ = std::vector<Resolved>(variant_->steps().size());
    const ContextGuard guard(driver(), context_, plan_->name_);
    if (workspace_bytes_ == 0) Resolve(0);
  }

  void Call() {
    const Stream stream = plan_->shared_->python.CurrentStream(device_, plan_->name_);
    const ContextGuard guard(driver(), context_, plan_->name_);
    if (workspace_bytes_ == 0) return Enqueue(stream);
    const Workspace workspace(&plan_->shared_->workspaces, driver(), plan_->shared_->python, device_, stream,
                              workspace_bytes_, plan_->name_);
    std::lock_guard<std::mutex> lock(mutex_);
    if (workspace.address() != workspace_) Resolve(workspace.address());
    Enqueue(stream);
  }

 private:
  Driver& driver() { return plan_->shared_->driver; }

  void Resolve(uint64_t workspace) {
    variant_->MoveWorkspace(workspace - workspace_, addresses_);
    for (size_t i = 0; i < resolved_.size(); ++i) {
      variant_->steps()[i]->Resolve(&driver(), device_.device_id, addresses_, facts_, plan_->name_, &resolved_[i]);
    }
    workspace_ = workspace;
  }

  void Enqueue(Stream stream) {
    for (size_t i = 0; i < resolved_.size(); ++i) {
      variant_->steps()[i]->Enqueue(driver(), stream, plan_->name_, resolved_[i]);
    }
  }

  std::shared_ptr<Plan> plan_;
  std::vector<Argument> arguments_;
  std::vector<ManagedTensor> kept_;
  Variant* variant_;
  DLDevice device_;
  Context context_;
  int64_t facts_[kMaxFacts];
  int64_t workspace_bytes_;
  uint64_t addresses_[kMaxBuffers];
  std::mutex mutex_;        // of a call with workspace
  uint64_t workspace_ = 0;  // that addresses_ and resolved_ are for
  std::vector<Resolved> resolved_;
};

tvm::ffi::Function Plan::Bind(int64_t tuple) {
  std::vector<Argument> arguments(names_.size());
  std::vector<ManagedTensor> kept;
  shared_->python.Read(reinterpret_cast<void*>(tuple), names_, name_, arguments.data(), &kept);
  auto bound = std::make_shared<Bound>(shared_from_this(), std::move(arguments), std::move(kept));
  return tvm::ffi::Function::FromTyped([bound]() { bound->Call(); });
}

}  // namespace launch
}  // namespace tilelang_ext
