// The types that small_linear and quant_linear share. Both compute y = x Wᵀ + bias, with LoRA on ranges of rows.
#pragma once

#include <cstdint>
#include <vector>

namespace genarm {

template <typename W>
struct LinearLoops;
template <typename W>
struct OutputLoops;
struct QuantLoops;

// Loops over numbers of type W: uint16_t (bfloat16) or float.
template <typename W>
struct LoopsOf {
  const LinearLoops<W>* small;  // null if the instruction set has no loops for W
  const OutputLoops<W>* output;
};

// The loops of one instruction set.
struct LinearTables {
  LoopsOf<uint16_t> bfloat16;
  LoopsOf<float> float32;
  const QuantLoops* quant;

  template <typename W>
  const LoopsOf<W>& of() const {
    if constexpr (sizeof(W) == sizeof(float)) return float32; else return bfloat16;
  }
};

LinearTables linear_tables();  // returns the loops of the instruction set in use

// A low-rank addition to a linear: scale · (x aᵀ) b. a, b and a linear's bias have the type of its inputs.
struct Lora {
  const void* a;  // [rank, in]
  const void* b;  // [rank, out]
  int64_t rank;
  float scale;
};

struct Linear {
  LinearTables loops;
  const void* weight;     // [out, in] if bits is 32 or 16
  const uint8_t* packed;  // the quantized weight if bits is 8 or 4
  int bits;               // bits of a weight: 32 (float32), 16 (bfloat16), 8 or 4
  int64_t in, out;
  const void* bias;  // [out] or null
  std::vector<Lora> loras;

  // Whether weights, inputs and outputs are float32. Otherwise inputs and outputs are bfloat16.
  bool is_float32() const { return bits == 32; }
};

// Rows first .. last - 1 get the LoRA of index `lora`.
struct Span {
  int64_t first, last, lora;
};

// A linear to multiply with the inputs, the spans of its LoRAs, and the memory of its output.
struct Product {
  const Linear* linear;
  std::vector<Span> spans;
  void* y;         // [rows, out], type of the inputs
  int64_t stride;  // elements between rows of y
};

}  // namespace genarm
