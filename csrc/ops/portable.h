#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>

#include "ops/checks.h"

namespace cce {

// A boxed CUDA kernel that serves fp16 and bf16 itself and hands every other dtype to the portable operator
// of the same signature. kTensor: the place of e among the arguments.
template <auto kKernel, int kTensor>
void sixteen_bit_or(const char* portable, StableIValue* stack, uint64_t num_args, uint64_t num_outputs) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_dtype(torch::stable::detail::to<AtenTensorHandle>(stack[kTensor]), &dtype));
  if (dtype == aoti_torch_dtype_float16() || dtype == aoti_torch_dtype_bfloat16()) {
    kKernel(stack, num_args, num_outputs);
  } else {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(portable, "", stack, TORCH_ABI_VERSION));
  }
}

}  // namespace cce
