#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "tile/swizzle.h"

// Descriptions of matrices for the copy engine. The driver encodes them; it is asked for the function at run
// time, since the library links no libcuda.
namespace cce {

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    auto found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                               cudaEnableDefault, &found);
#else
    const cudaError_t error =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    const bool usable = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(usable ? function : nullptr);
  }();
  return encoder;
}

template <typename Element>
constexpr CUtensorMapDataType tensor_map_type();
template <>
constexpr CUtensorMapDataType tensor_map_type<__half>() {
  return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}
template <>
constexpr CUtensorMapDataType tensor_map_type<__nv_bfloat16>() {
  return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}
template <>
constexpr CUtensorMapDataType tensor_map_type<__nv_fp8_e4m3>() {
  return CU_TENSOR_MAP_DATA_TYPE_UINT8;
}

// Boxes of `box_rows` rows by 128 bytes of a [rows, d] matrix, swizzled as wgmma takes them, zeros outside.
// stride: in elements. Returns null, or what went wrong.
template <typename Element>
const char* encode_rows(CUtensorMap& map, const void* data, int64_t rows, int64_t d, int64_t stride,
                        int box_rows) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  // A single row's stride may be anything; it is never used, but checked: a multiple of 16 bytes.
  constexpr int64_t kAlignment = 16;
  const int64_t bytes = (rows == 1 ? d : stride) * static_cast<int64_t>(sizeof(Element));
  const int64_t row_bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(d), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {kRowBytes / sizeof(Element), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_strides[2] = {1, 1};
  const CUresult result =
      encode(&map, tensor_map_type<Element>(), 2, const_cast<void*>(data), sizes, strides, box,
             element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused the strides or sizes";
}

}  // namespace cce
