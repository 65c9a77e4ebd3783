/*!
 * \file variant.cc
 * \brief Variants: reading their recipes, checking arguments, placing buffers.
 */
#include "variant.h"

#include <tvm/ffi/dtype.h>

#include <algorithm>

namespace tilelang_ext {
namespace launch {

using tvm::ffi::Any;
using tvm::ffi::Array;
using tvm::ffi::Bytes;
using tvm::ffi::String;
using tvm::ffi::Tensor;

std::string DeviceName(const DLDevice& device) {
  const bool cuda = device.device_type == kDLCUDA;
  const std::string type = cuda ? "cuda" : device.device_type == kDLCPU ? "cpu" : "another type";
  return cuda ? type + ":" + std::to_string(device.device_id) : type;
}

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
  bool is_empty = false;
  for (int i = 0; i < rank; ++i) is_empty |= tensor.shape[i] == 0;
  if (address == 0 && !is_empty) {
    Raise("ValueError") << who_ << ": " << names_[rule.argument].name
                        << " must have memory; got a tensor without; pass one with data";
  }
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

}  // namespace launch
}  // namespace tilelang_ext
