/*!
 * \file step.cc
 * \brief Steps: from the facts of a call to the driver.
 */
#include "step.h"

#include <cstring>
#include <map>
#include <tuple>

namespace tilelang_ext {
namespace launch {

using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::String;

namespace {

constexpr int kMaxDynamicSharedBytes = 8, kNonPortableClusterSize = 14;  // CUfunction_attribute
constexpr int kRelaxedCapture = 2;                                       // CUstreamCaptureMode
constexpr uint32_t kPortableClusterSize = 8;

}  // namespace

// --- binaries ---

Binary::Binary(std::string bytes, const std::string& target, const std::string& who)
    : bytes_(std::move(bytes)), facts_(ReadCubin(bytes_, who)) {
  if (facts_.arch() != target) {
    Raise("ValueError") << who << ": binary must be for " << target << "; got one whose ELF says " << facts_.arch()
                        << "; compile it for " << target;
  }
}

CudaFunction Binary::Load(Driver* driver, int device, const std::string& kernel, const std::string& who) {
  std::lock_guard<std::mutex> lock(mutex_);
  Module& module = modules_[device];
  // A module may be loaded while another stream, or this one, is captured.
  int mode = kRelaxedCapture;
  driver->Check(driver->exchange_capture_mode(&mode), "cuThreadExchangeStreamCaptureMode", who);
  // Never unloaded: graphs that were captured hold its kernels.
  const int loaded = module == nullptr ? driver->load_module(&module, bytes_.data()) : 0;
  driver->exchange_capture_mode(&mode);
  driver->Check(loaded, "cuModuleLoadData", who);
  CudaFunction function;
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
  parameter_bytes_ = end;
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

CudaFunction Step::Load(Driver* driver, int device, int64_t shared_bytes, const std::string& who) {
  OnDevice& on_device = on_device_[device];
  CudaFunction function = on_device.function.load(std::memory_order_acquire);
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
  out->memory.resize((parameter_bytes_ + sizeof(TensorMap) - 1) / sizeof(TensorMap));
  out->parameters.resize(parameters_.size());
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Parameter& parameter = parameters_[i];
    unsigned char* at = reinterpret_cast<unsigned char*>(out->memory.data()) + parameter.offset;
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
  const int result = driver.launch(&config, resolved.function, const_cast<void**>(resolved.parameters.data()), nullptr);
  if (result != 0) {
    driver.Check(result, "cuLaunchKernelEx",
                 who + ": " + kernel_ + " of grid " + Join(config.grid, 3) + ", block " + Join(config.block, 3) + ", " +
                     std::to_string(config.shared_bytes) + " bytes of shared memory");
  }
}

}  // namespace launch
}  // namespace tilelang_ext
