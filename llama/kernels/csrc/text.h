// The strings that operators take. Up to 2.13 torch's own conversion to std::string leaves one behind at every call
// (mended by pytorch/pytorch#190493), which adds up over a server's steps: `Text` is a std::string converted here.
#pragma once
#include <torch/csrc/stable/library.h>

#include <string>

#include "checked.h"

namespace llama {

struct Text : std::string {
  using std::string::string;
  using std::string::operator=;
};

}  // namespace llama

template <>
struct torch::stable::detail::ToImpl<llama::Text> {
  // The argument's handle is ours, and ends here.
  static llama::Text call(StableIValue argument, uint64_t, bool) {
    const auto handle = to<StringHandle>(argument);
    size_t length;
    const char* data;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    const llama::Text text(data, length);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};
