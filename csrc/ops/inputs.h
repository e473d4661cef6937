#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "launch/launch.h"
#include "launch/params.h"

namespace cce {

// Of fp16, bf16, fp32 or fp64; throws for another.
DType dtype_of(const char* op, const torch::stable::Tensor& e);

// Shapes, dtypes and devices that belong together, all on one CUDA device; every error names the argument and
// what it was.
void check_inputs(const char* op, const torch::stable::Tensor& e, const torch::stable::Tensor& c,
                  const std::optional<torch::stable::Tensor>& bias, const torch::stable::Tensor& targets,
                  std::optional<double> softcap);

// One of the tensors that belong to e, by its name.
void check_device(const char* op, const char* name, const torch::stable::Tensor& tensor,
                  const torch::stable::Tensor& e);

// Of the logits, a token each: of the sums' dtype.
void check_scale(const char* op, const std::optional<torch::stable::Tensor>& scale,
                 const torch::stable::Tensor& e);

// Of the draws: there must be one.
void check_seed(const char* op, const std::optional<torch::stable::Tensor>& seed,
                const torch::stable::Tensor& e);

// The tensor itself where it is contiguous, which the dispatcher need not be asked for; else a copy.
torch::stable::Tensor with_contiguous_memory(const torch::stable::Tensor& tensor);

// The tensor itself where its last dimension is contiguous, whatever its row stride; else a contiguous copy.
torch::stable::Tensor with_contiguous_rows(const torch::stable::Tensor& tensor);

// The same where each row also begins at a multiple of 16 bytes and has a multiple of 8 elements; else a
// copy, padded with zeros, which change no product.
torch::stable::Tensor with_vector_rows(const torch::stable::Tensor& tensor);

// The same for rows that do not overlap, as an expanded tensor's do; else a copy.
torch::stable::Tensor with_separate_rows(const torch::stable::Tensor& tensor);

LossInputs loss_inputs(DType dtype, const torch::stable::Tensor& e, const torch::stable::Tensor& c,
                       const std::optional<torch::stable::Tensor>& bias, const torch::stable::Tensor& targets,
                       std::optional<int64_t> ignore_index, std::optional<double> softcap);

// Throws where a launcher says that something refused.
void check_launch(const char* op, const LaunchError& error, int32_t device);
void check_launch(const char* op, const LaunchError& error, const torch::stable::Tensor& e);

// Of e's GPU.
DeviceLimits device_limits(const char* op, const torch::stable::Tensor& e);

}  // namespace cce
