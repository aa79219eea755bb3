// The check of what torch's C interface answers, by its name since 2.12.
#pragma once
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/shim_utils.h>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif
