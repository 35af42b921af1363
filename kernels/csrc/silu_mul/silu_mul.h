// silu_mul on the CPU; kernels/ops/silu_mul/reference.py is the specification.
#pragma once

#include <cstdint>

namespace genarm {

struct SiluLoops {
  void (*float32)(const void* gate, const void* up, int64_t n, void* out);
  void (*bfloat16)(const void* gate, const void* up, int64_t n, void* out);
};

// Computes n elements of silu(gate) · up, with the loops of the instruction set in use. All memory is bfloat16,
// or float32 if `bfloat16` is false.
void run_silu(const void* gate, const void* up, int64_t n, bool bfloat16, void* out);

extern const SiluLoops silu_baseline;
#ifdef GENARM_X86
extern const SiluLoops silu_avx2, silu_avx512;
#endif

}  // namespace genarm
