// What small_linear and quant_linear share: y = x Wᵀ + bias, and LoRA on ranges of rows.
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
  const LinearLoops<W>* small;  // null: the instruction set has none
  const OutputLoops<W>* output;
};

struct LinearTables {  // loops of one instruction set
  LoopsOf<uint16_t> bfloat16;
  LoopsOf<float> float32;
  const QuantLoops* quant;

  template <typename W>
  const LoopsOf<W>& of() const {
    if constexpr (sizeof(W) == sizeof(float)) return float32; else return bfloat16;
  }
};

LinearTables linear_tables();  // of the instruction set in use

struct Lora {
  const void* a;  // [rank, in], of the inputs' type, as b and a linear's bias
  const void* b;  // [rank, out]
  int64_t rank;
  float scale;
};

struct Linear {
  LinearTables loops;
  const void* weight;     // [out, in] where bits is 32 or 16
  const uint8_t* packed;  // else
  int bits;               // of a weight: 32 (float32), 16 (bfloat16), 8 or 4
  int64_t in, out;
  const void* bias;  // [out] or null
  std::vector<Lora> loras;

  bool is_float32() const { return bits == 32; }  // the type of inputs and outputs too, which is bfloat16 otherwise
};

struct Span {  // rows first .. last - 1 get this LoRA
  int64_t first, last, lora;
};

struct Product {
  const Linear* linear;
  std::vector<Span> spans;
  void* y;         // [rows, out], of the inputs' type
  int64_t stride;  // of its rows, in elements
};

}  // namespace genarm
