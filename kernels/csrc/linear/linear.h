// What small_linear and quant_linear share: y = x Wᵀ + bias, and LoRA on ranges of rows.
#pragma once

#include <cstdint>
#include <vector>

namespace genarm {

struct LinearLoops;
struct OutputLoops;
struct QuantLoops;

struct LinearTables {  // of one instruction set
  const LinearLoops* small;  // null: it has none
  const QuantLoops* quant;
  const OutputLoops* output;
};

LinearTables linear_tables();  // of the instruction set in use

struct Lora {
  const uint16_t* a;  // [rank, in]
  const uint16_t* b;  // [rank, out]
  int64_t rank;
  float scale;
};

struct Linear {
  LinearTables loops;
  const uint16_t* weight;  // [out, in] where bits is 16
  const uint8_t* packed;   // else
  int bits;                // of a weight: 16, 8 or 4
  int64_t in, out;
  const uint16_t* bias;  // [out] or null
  std::vector<Lora> loras;
};

struct Span {  // rows first .. last - 1 get this LoRA
  int64_t first, last, lora;
};

struct Product {
  const Linear* linear;
  std::vector<Span> spans;
  uint16_t* y;     // [rows, out]
  int64_t stride;  // of its rows
};

}  // namespace genarm
