// What is kept between an operator's calls, under a number: to hand some hundred tensors over takes as long as a layer.
#pragma once
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace llama {

template <class T>
class Kept {
 public:
  int64_t add(T one) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ones_[++last_] = std::make_shared<const T>(std::move(one));
    return last_;
  }

  // Stays what it is while somebody has it, also where it is removed meanwhile.
  std::shared_ptr<const T> at(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = ones_.find(number);
    STD_TORCH_CHECK(found != ones_.end(), "nothing is kept under the number ", number);
    return found->second;
  }

  void remove(int64_t number) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ones_.erase(number);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<const T>> ones_;
  int64_t last_ = 0;
};

}  // namespace llama
