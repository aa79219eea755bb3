// Tensors of torch's stable interface, where it offers no short way.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "checked.h"

namespace llama {

inline std::vector<int64_t> strides_of(const std::vector<int64_t>& size) {  // where rows follow one another
  std::vector<int64_t> strides(size.size());
  int64_t stride = 1;
  for (size_t i = size.size(); i-- > 0; stride *= size[i]) strides[i] = stride;
  return strides;
}

// A contiguous tensor on the CPU, with nothing in it. torch::stable::new_empty finds its operator by name at every
// call, which takes longer than a small kernel.
inline torch::stable::Tensor empty_of(int32_t type, const std::vector<int64_t>& size) {
  const auto strides = strides_of(size);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(size.size(), size.data(), strides.data(), type,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor empty_floats(const std::vector<int64_t>& size) {
  return empty_of(aoti_torch_dtype_float32(), size);
}

inline torch::stable::Tensor empty_like(const torch::stable::Tensor& x, const std::vector<int64_t>& size) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
  return empty_of(type, size);
}

// The same numbers in another shape; x is contiguous.
inline torch::stable::Tensor shaped(const torch::stable::Tensor& x, const std::vector<int64_t>& size) {
  const auto strides = strides_of(size);
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(x.get(), size.size(), size.data(), strides.data(), 0, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace llama
