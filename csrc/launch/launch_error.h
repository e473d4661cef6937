#pragma once

namespace cce {

// Why a launch did not happen: what refused it, and its own words. Without a text there was no error.
struct LaunchError {
  const char* source = nullptr;  // "CUDA", "cuBLAS"
  const char* text = nullptr;
  bool no_kernel = false;  // the library has no machine code for the GPU

  explicit operator bool() const { return text != nullptr; }
};

}  // namespace cce
