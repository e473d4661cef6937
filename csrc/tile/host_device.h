#pragma once

#if defined(__CUDACC__)
#define CCE_HOST_DEVICE __host__ __device__
#else
#define CCE_HOST_DEVICE
#endif
