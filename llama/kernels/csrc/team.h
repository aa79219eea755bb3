// A loop that several threads share. See team.cpp.
#pragma once
#include <cstdint>

namespace llama {

using Part = void (*)(int64_t begin, int64_t end, void* context);

// Calls `part` for pieces of 0 ... count - 1 until each is done once, in this thread alone where there are no more than
// `grain`. `part` throws nothing.
void share(int64_t count, int64_t grain, Part part, void* context);

template <class F>
void share(int64_t count, int64_t grain, const F& f) {
  share(count, grain, [](int64_t begin, int64_t end, void* context) { (*(const F*)context)(begin, end); }, (void*)&f);
}

// Says who made the last product: torch's threads, which watch for more to do for some milliseconds afterwards and
// meanwhile do the parts here, or these.
void torch_multiplied(bool torch);

}  // namespace llama
