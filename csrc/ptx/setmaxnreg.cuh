#pragma once

namespace cce::ptx {

// Changes the registers of each thread of the executing warpgroup: fewer, which frees the rest, or more,
// which waits until others have freed them. All its warps take part; multiples of 8 from 24 to 256. PTX ISA,
// "Miscellaneous Instructions: setmaxnreg" (PTX 8.0, sm_90a).
template <int kRegisters>
__device__ __forceinline__ void keep_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "what the instruction takes");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "what the instruction takes");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace cce::ptx
