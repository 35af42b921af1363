// The combined scores of one row, tile by tile: reads every logit once, and keeps sums and, if wanted, the scores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "guided_sample.h"
#include "select.h"

namespace genarm {

inline int64_t whole_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The scores of one row at a time. `read` takes the next row, and all other functions are about the row read last.
class RowScores {
 public:
  struct Parts {
    float *refs, *sums;  // [padded tiles]: sum = Σ 2^((x - ref) · scale) over a tile
  };

  RowScores(const Request& request, const TileLoops& loops, int threads);  // threads: those that share a row's tiles

  // Reads a row and returns its status. keep: keep all its scores, for filters and top tokens. log_sums: also compute
  // Σ 2^((score - ref) · scale) of each tile, and the same sums of each member if log-probabilities are wanted.
  int32_t read(int64_t row, int64_t block, float scale, bool keep, bool log_sums);

  int64_t tiles() const { return tiles_; }
  int tile_width(int64_t t) const { return static_cast<int>(whole_lanes(tile_size(t))); }  // padded to whole lanes
  int padded() const { return static_cast<int>(padded_); }  // number of tiles, padded to whole lanes
  const float* peaks() const { return stats_.data(); }      // largest score of each tile
  float peak() const { return *std::max_element(peaks(), peaks() + tiles_); }

  // The sums of a member's own probabilities. Member -1 stands for the combined scores.
  Parts part(int64_t member) {
    float* refs = stats_.data() + (member < 0 ? 1 : 3 + 2 * member) * padded_;
    return {refs, refs + padded_};
  }

  // The combined scores of a tile. They were kept, or are computed again: into `buffer`, or in the base's own memory if
  // there is nothing to add to it.
  const float* tile(int64_t t, float* buffer) {
    return keep_ ? scores_.data() + t * kTile : combine(t, buffer, nullptr);
  }

  ScoredRow kept() const { return {scores_.data(), peaks(), lane_peaks_.data(), q_.vocab, tiles_}; }
  float logit(size_t member, int64_t token) const;

 private:
  int64_t tile_size(int64_t t) const { return std::min<int64_t>(kTile, q_.vocab - t * kTile); }
  int64_t offset(const Member& member, int64_t first) const {
    return row_ * member.row_stride + block_ * member.block_stride + first;
  }
  float weight(size_t member) const {
    return q_.weights[row_ * q_.weights_row_stride + static_cast<int64_t>(member) - 1];
  }
  void keep_sum(int64_t member, int64_t t, PartialSum sum) {
    part(member).refs[t] = sum.ref, part(member).sums[t] = sum.sum;
  }
  const float* load(const Member& member, int64_t first, int64_t n, float* buffer) const;
  const float* combine(int64_t t, float* out, int32_t* status);
  const float* add_bias(const float* combined, int64_t first, int64_t n, float* out) const;
  void keep_tile(int64_t t, const float* combined, float* out);
  bool sum_tile(int64_t t, float* out);

  const Request& q_;
  const TileLoops& f_;
  const int threads_;
  const int64_t tiles_, padded_;
  int64_t row_ = 0, block_ = 0;
  float scale_ = kLog2e;
  bool keep_ = false;
  std::vector<float> stats_;  // [3 + 2 · members, padded tiles]: peaks, refs, sums, refs and sums of each member
  std::vector<float> scores_, lane_peaks_;
};

}  // namespace genarm
