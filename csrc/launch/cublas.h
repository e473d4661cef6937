#pragma once

#include <cstdint>

#include "launch/params.h"

namespace cce {

// A matrix as cuBLAS takes it: rows of contiguous elements, `stride` of them apart, none of them overlapping.
struct BlasMatrix {
  const void* data;
  int64_t stride;
};

// Products with sums in fp32, on torch's handle and stream. The library is torch's own, found at run time, so
// that it is declared here: no header of it has to be there when we build. Errors are kept until asked for.
class Cublas {
 public:
  // element: fp16 or bf16, what the operands are.
  Cublas(const Blas& blas, DType element) : handle_(blas.handle), element_(element) {
    find(blas, status_text_, "cublasGetStatusString");
    find(blas, gemm_, "cublasGemmEx_64");
    find(blas, set_math_mode_, "cublasSetMathMode");
    find(blas, get_math_mode_, "cublasGetMathMode");
    find(blas, set_pointer_mode_, "cublasSetPointerMode_v2");
    if (error_ != nullptr) return;
    check(get_math_mode_(handle_, &math_mode_));
    has_mode_ = error_ == nullptr;
    // Otherwise parts of a sum may be added in 16 bits.
    check(set_math_mode_(handle_, kDisallowReducedPrecisionReduction));
  }

  ~Cublas() {
    if (has_mode_) set_math_mode_(handle_, math_mode_);
  }

  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  // out [m, n] = a [k, m]^T b [k, n] in the operands' dtype, rows contiguous. factors: null, or two floats on
  // the device, of which the first multiplies the product and the second what was in out.
  void multiply_transposed(const BlasMatrix& a, const BlasMatrix& b, int64_t m, int64_t n, int64_t k,
                           void* out, const float* factors) {
    if (error_ != nullptr) return;
    constexpr float kHostFactors[2] = {1.0f, 0.0f};
    if (factors != nullptr) check(set_pointer_mode_(handle_, kDevicePointers));
    const float* f = factors == nullptr ? kHostFactors : factors;
    gemm(kTransposed, a, b, m, n, k, f, f + 1, out, type(element_));
    if (factors != nullptr) check(set_pointer_mode_(handle_, kHostPointers));
  }

  // The same of a [m, k], times a factor.
  void multiply_rounded(const BlasMatrix& a, const BlasMatrix& b, int64_t m, int64_t n, int64_t k, void* out,
                        float factor) {
    if (error_ != nullptr) return;
    const float none = 0.0f;
    gemm(kNotTransposed, a, b, m, n, k, &factor, &none, out, type(element_));
  }

  // out [m, n] = a [m, k] b [k, n] in fp32, rows contiguous; or that is added to what was in out.
  void multiply(const BlasMatrix& a, const BlasMatrix& b, int64_t m, int64_t n, int64_t k, float* out,
                bool add) {
    if (error_ != nullptr) return;
    const float one = 1.0f, old = add ? 1.0f : 0.0f;
    gemm(kNotTransposed, a, b, m, n, k, &one, &old, out, kFloat32);
  }

  // out [m, n] = a [k, m]^T b [k, n] in fp32, rows contiguous.
  void multiply_transposed_wide(const BlasMatrix& a, const BlasMatrix& b, int64_t m, int64_t n, int64_t k,
                                float* out) {
    if (error_ != nullptr) return;
    const float one = 1.0f, none = 0.0f;
    gemm(kTransposed, a, b, m, n, k, &one, &none, out, kFloat32);
  }

  // Null, or what went wrong first.
  const char* error() const { return error_; }

 private:
  // Numbers of cuBLAS's API, see its documentation: cublasOperation_t, cublasPointerMode_t, cublasMath_t,
  // cudaDataType_t, cublasComputeType_t and cublasGemmAlgo_t.
  enum : int { kNotTransposed = 0, kTransposed = 1 };
  enum : int { kHostPointers = 0, kDevicePointers = 1 };
  enum : int { kDisallowReducedPrecisionReduction = 16 };
  enum : int { kFloat32 = 0, kFloat16 = 2, kBFloat16 = 14 };
  enum : int { kComputeFloat32 = 68 };
  enum : int { kDefaultAlgorithm = -1 };
  using Gemm = int (*)(void* handle, int op_a, int op_b, int64_t m, int64_t n, int64_t k, const void* alpha,
                       const void* a, int type_a, int64_t stride_a, const void* b, int type_b,
                       int64_t stride_b, const void* beta, void* c, int type_c, int64_t stride_c, int compute,
                       int algorithm);

  static int type(DType dtype) { return dtype == DType::kFloat16 ? kFloat16 : kBFloat16; }

  // cuBLAS has columns where we have rows: it is asked for the transposed product, whose operands change
  // places.
  void gemm(int op_a, const BlasMatrix& a, const BlasMatrix& b, int64_t m, int64_t n, int64_t k,
            const float* alpha, const float* beta, void* out, int type_out) {
    check(gemm_(handle_, kNotTransposed, op_a, n, m, k, alpha, b.data, type(element_), b.stride, a.data,
                type(element_), a.stride, beta, out, type_out, n, kComputeFloat32, kDefaultAlgorithm));
  }

  template <typename Function>
  void find(const Blas& blas, Function& function, const char* name) {
    function = reinterpret_cast<Function>(blas.function(name));
    if (function == nullptr && error_ == nullptr) {
      error_ = "torch's cuBLAS is older than CUDA 12's, or not to be found";
    }
  }

  void check(int status) {
    if (status != 0 && error_ == nullptr) error_ = status_text_(status);
  }

  void* handle_;
  DType element_;
  Gemm gemm_ = nullptr;
  const char* (*status_text_)(int) = nullptr;
  int (*set_math_mode_)(void*, int) = nullptr;
  int (*get_math_mode_)(void*, int*) = nullptr;
  int (*set_pointer_mode_)(void*, int) = nullptr;
  bool has_mode_ = false;
  int math_mode_ = 0;  // torch's
  const char* error_ = nullptr;
};

}  // namespace cce
