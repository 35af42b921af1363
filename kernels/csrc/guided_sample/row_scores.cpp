#include "row_scores.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "common/pool.h"

namespace genarm {
namespace {

constexpr float kInf = INFINITY;
constexpr float kMostSum = 0x1p64f;  // largest sum of a tile whose logarithm has float32's usual resolution

}  // namespace

RowScores::RowScores(const Request& request, const TileLoops& loops, int threads)
    : q_(request),
      f_(loops),
      threads_(threads),
      tiles_((request.vocab + kTile - 1) / kTile),
      padded_(whole_lanes(tiles_)),
      stats_((3 + 2 * request.members.size()) * padded_, -kInf) {
  for (int64_t i = -1; i < static_cast<int64_t>(request.members.size()); ++i) {
    std::fill(part(i).sums, part(i).sums + padded_, 0.f);
  }
}

int32_t RowScores::read(int64_t row, int64_t block, float scale, bool keep, bool log_sums) {
  row_ = row, block_ = block, scale_ = scale, keep_ = keep;
  if (keep) {
    scores_.resize(tiles_ * kTile);
    lane_peaks_.resize(tiles_ * kLanes);
  }
  std::atomic<int32_t> members{0};  // status bits
  std::atomic<bool> bad{false};
  parallel(threads_, tiles_, [&](int64_t begin, int64_t end) {
    alignas(64) float buffer[kTile];
    for (int64_t t = begin; t < end; ++t) {
      float* out = keep ? scores_.data() + t * kTile : buffer;
      if (log_sums && sum_tile(t, out)) continue;
      int32_t status = 0;
      const float* combined = combine(t, out, &status);
      const int width = tile_width(t);
      if (keep) keep_tile(t, combined, out);
      const Scan seen = f_.scan(combined, width);
      members |= status;
      if (seen.bad) bad = true;
      stats_[t] = seen.peak;
      const bool summed = log_sums && std::fabs(seen.peak) < kInf;
      keep_sum(-1, t, {seen.peak, summed ? f_.exp_sum(combined, width, seen.peak, scale_) : 0.f});
    }
  });
  int32_t status = members;
  if (status == 0 && (bad || peak() == -kInf)) status = 1;
  return status;
}

// Returns n logits of a member's tile as floats, padded to whole lanes: in `buffer`, or in their own memory if they are
// float32 and need no padding.
const float* RowScores::load(const Member& member, int64_t first, int64_t n, float* buffer) const {
  if (member.dtype == Dtype::kFloat32) {
    const float* source = static_cast<const float*>(member.data) + offset(member, first);
    if (n % kLanes == 0) return source;
    std::memcpy(buffer, source, n * sizeof(float));
  } else {
    const uint16_t* source = static_cast<const uint16_t*>(member.data) + offset(member, first);
    (member.dtype == Dtype::kBfloat16 ? f_.load_bf16 : f_.load_fp16)(source, static_cast<int>(n), buffer);
  }
  std::fill(buffer + n, buffer + whole_lanes(n), -kInf);
  return buffer;
}

// Returns the combined scores of tile t: in `out`, or in the base's own memory if there is nothing to add. If `status`
// is not null, also adds the members' status bits, and keeps each member's (max, sum) if log-probabilities are wanted.
const float* RowScores::combine(int64_t t, float* out, int32_t* status) {
  const int64_t first = t * kTile, n = tile_size(t);
  const int width = tile_width(t);
  const auto look = [&](size_t i, const float* z, Scan seen) {
    if (seen.bad) *status |= 2 << i;
    if (q_.logprobs) {
      keep_sum(i, t, {seen.peak, seen.peak == -kInf ? 0.f : f_.exp_sum(z, width, seen.peak, kLog2e)});
    }
  };
  const float* combined = load(q_.members[0], first, n, out);
  if (status) look(0, combined, f_.scan(combined, width));
  for (size_t i = 1; i < q_.members.size(); ++i) {
    alignas(64) float buffer[kTile];
    const float* z = load(q_.members[i], first, n, buffer);
    const Scan seen = f_.add_member(combined, z, width, weight(i), weight(i) == 0.f ? 0.f : -kInf, out);
    if (status) look(i, z, seen);
    combined = out;
  }
  return q_.bias ? add_bias(combined, first, n, out) : combined;
}

const float* RowScores::add_bias(const float* combined, int64_t first, int64_t n, float* out) const {
  alignas(64) float buffer[kTile];
  const float* bias = q_.bias + row_ * q_.bias_row_stride + first;
  const int64_t width = whole_lanes(n);
  if (n < width) {
    std::memcpy(buffer, bias, n * sizeof(float));
    std::fill(buffer + n, buffer + width, 0.f);
    bias = buffer;
  }
  f_.add(combined, bias, static_cast<int>(width), out);
  return out;
}

// Keeps a tile's scores for filters and top tokens.
void RowScores::keep_tile(int64_t t, const float* combined, float* out) {
  if (combined != out) std::memcpy(out, combined, tile_width(t) * sizeof(float));
  f_.lane_peaks(out, tile_width(t), lane_peaks_.data() + t * kLanes);
}

// Computes (max, sum) of tile t and of its members, in one pass over each. False if a sum is not known (see
// log_sums.h): then the tile has to be computed again with known maxima.
bool RowScores::sum_tile(int64_t t, float* out) {
  const int64_t first = t * kTile, n = tile_size(t);
  const int width = tile_width(t);
  alignas(64) float buffer[kTile];
  const float* combined = nullptr;
  for (size_t i = 0; i < q_.members.size(); ++i) {
    const Member& member = q_.members[i];
    const bool bf16 = member.dtype == Dtype::kBfloat16 && n == width;
    const void* z = bf16 ? static_cast<const void*>(static_cast<const uint16_t*>(member.data) + offset(member, first))
                         : load(member, first, n, i == 0 ? out : buffer);
    const bool in_place = i == 0 && !bf16;
    if (!in_place || q_.logprobs) {
      const PartialSum sum = f_.add_member_once(z, bf16, width, combined, i == 0 ? 1.f : weight(i), q_.logprobs,
                                                in_place ? nullptr : out);
      if (!(sum.sum < kMostSum)) return false;
      if (q_.logprobs) keep_sum(i, t, sum);
    }
    combined = in_place ? static_cast<const float*>(z) : out;
  }
  if (q_.bias) combined = add_bias(combined, first, n, out);
  const PeakSum seen = f_.peak_sum(combined, width, scale_);
  if (!(seen.part.sum < kMostSum)) return false;
  stats_[t] = seen.peak;
  keep_sum(-1, t, seen.part);
  if (keep_) keep_tile(t, combined, out);
  return true;
}

float RowScores::logit(size_t member, int64_t token) const {
  alignas(64) float one[kLanes];
  return load(q_.members[member], token, 1, one)[0];
}

}  // namespace genarm
