#include "guided_sample.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <mutex>
#include <numeric>

#include "pool.h"
#include "select.h"

namespace genarm {
namespace {

constexpr float kInf = INFINITY;
constexpr float kMostSum = 0x1p64f;  // of one tile; its logarithm still has float32's usual resolution
constexpr float kColdest = 1e-30f;  // as in the reference
constexpr int64_t kElementsPerThread = 1 << 18;  // about 0.1 ms of work: several times what waking a helper takes
constexpr uint32_t kTileLevel = 0, kTokenLevel = 1;

int64_t whole_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Rows are independent: a thread takes one after another with its own scratch, or several share the tiles of one.
class RowSampler {
 public:
  RowSampler(const Request& request, const TileLoops& loops, int threads)
      : q_(request),
        f_(loops),
        threads_(threads),
        tiles_((request.vocab + kTile - 1) / kTile),
        padded_(whole_lanes(tiles_)),
        stats_((4 + 2 * request.members.size()) * padded_, -kInf) {
    for (int64_t i = -1; i < static_cast<int64_t>(request.members.size()); ++i) {
      std::fill(part(i).sums, part(i).sums + padded_, 0.f);
    }
  }

  void run(int64_t index) {
    row_ = index / q_.block, block_ = index % q_.block;
    const float temperature = q_.temperature.at(row_, block_), top_p = q_.top_p.at(row_, block_);
    const int64_t top_k = q_.top_k.at(row_, block_);
    const bool greedy = temperature == 0.f, limited = top_k > 0 && top_k < q_.vocab;
    const float log_min_p = std::log(std::min(q_.min_p.at(row_, block_), 1.f));
    const bool truncated = !greedy && (limited || top_p < 1.f || log_min_p > -kInf);
    const bool nucleus = truncated && top_p < 1.f;
    coldness_ = greedy ? 1.f : 1.f / std::max(temperature, kColdest);
    scale_ = coldness_ * kLog2e;
    keep_row_ = truncated || q_.top_n > 0;
    if (keep_row_) {
      scores_.resize(tiles_ * kTile);
      lane_peaks_.resize(tiles_ * kLanes);
    }

    const bool log_sums = q_.logprobs || (!greedy && (!truncated || (nucleus && !limited)));
    const int32_t status = pass(log_sums);
    if (status != 0) return fail(index, status);
    peak_ = row_peak();
    const double total = log_sums ? f_.scaled_sum(part(-1).refs, part(-1).sums, padded(), peak_, scale_) : 0.;

    float lowest = -kInf;
    if (truncated) {
      if (limited) lowest = kth_score(scored_row(), top_k, candidates_);
      if (nucleus) lowest = std::max(lowest, nucleus_edge(lowest, top_p, limited ? 0. : total));
      lowest = std::max(lowest, peak_ + log_min_p / coldness_);
    }
    const int64_t token = greedy ? first_peak() : draw(truncated, lowest);
    q_.tokens[index] = token;
    q_.status[index] = 0;
    if (q_.logprobs) report(index, token, std::log(total));
  }

 private:
  struct Parts {
    float *refs, *sums;  // of each tile: Σ 2^((x - ref) · scale)
  };

  float* peaks() { return stats_.data(); }
  float row_peak() { return *std::max_element(peaks(), peaks() + tiles_); }
  int padded() const { return static_cast<int>(padded_); }

  // Sums of a member's own probabilities; -1: of the combination's.
  Parts part(int64_t member) {
    float* refs = stats_.data() + (member < 0 ? 1 : 4 + 2 * member) * padded_;
    return {refs, refs + padded_};
  }

  void keep_sum(int64_t member, int64_t t, PartialSum sum) {
    part(member).refs[t] = sum.ref, part(member).sums[t] = sum.sum;
  }

  ScoredRow scored_row() { return {scores_.data(), peaks(), lane_peaks_.data(), q_.vocab, tiles_}; }

  int64_t offset(const Member& member, int64_t first) const {
    return row_ * member.row_stride + block_ * member.block_stride + first;
  }

  float weight(size_t member) const {
    return q_.weights[row_ * q_.weights_row_stride + static_cast<int64_t>(member) - 1];
  }

  // n logits of a member's tile as floats padded to whole lanes; float32 is used in place.
  const float* load(const Member& member, int64_t first, int64_t n, float* buffer) const {
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

  // Combined scores of tile t: in `out`, or in the base's own memory where there is nothing to add. With `members`, also
  // the members' status bits, and their (max, sum) where log-probabilities are wanted.
  const float* combine(int64_t t, float* out, bool members, int32_t* status) {
    const int64_t first = t * kTile, n = tile_size(t);
    const int width = tile_width(t);
    alignas(64) float buffer[kTile];
    const float* combined = nullptr;
    for (size_t i = 0; i < q_.members.size(); ++i) {
      const float* z = load(q_.members[i], first, n, i == 0 ? out : buffer);
      Scan seen;
      if (i == 0) {
        combined = z;
        seen = members ? f_.scan(z, width) : Scan{};
      } else {
        seen = f_.add_member(combined, z, width, weight(i), weight(i) == 0.f ? 0.f : -kInf, out);
        combined = out;
      }
      if (!members) continue;
      if (seen.bad) *status |= 2 << i;
      if (q_.logprobs) {
        keep_sum(i, t, {seen.peak, seen.peak == -kInf ? 0.f : f_.exp_sum(z, width, seen.peak, kLog2e)});
      }
    }
    return q_.bias ? add_bias(combined, first, n, out) : combined;
  }

  const float* add_bias(const float* combined, int64_t first, int64_t n, float* out) const {
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

  // Keeps a tile's scores for the filters and for the top tokens.
  void keep(int64_t t, const float* combined, float* out) {
    if (combined != out) std::memcpy(out, combined, tile_width(t) * sizeof(float));
    f_.lane_peaks(out, tile_width(t), lane_peaks_.data() + t * kLanes);
  }

  // (max, sum) of tile t and its members in one pass over each; false where the tile needs care: see log_sums.h.
  bool sum_tile(int64_t t, float* out) {
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
    peaks()[t] = seen.peak;
    keep_sum(-1, t, seen.part);
    if (keep_row_) keep(t, combined, out);
    return true;
  }

  // The one read of every logit: (max, sum) per tile. Returns the row's status.
  int32_t pass(bool log_sums) {
    std::atomic<int32_t> members{0};  // status bits
    std::atomic<bool> bad{false};
    parallel(threads_, tiles_, [&](int64_t begin, int64_t end) {
      alignas(64) float buffer[kTile];
      for (int64_t t = begin; t < end; ++t) {
        float* out = keep_row_ ? scores_.data() + t * kTile : buffer;
        if (log_sums && sum_tile(t, out)) continue;
        int32_t status = 0;
        const float* combined = combine(t, out, true, &status);
        const int width = tile_width(t);
        if (keep_row_) keep(t, combined, out);
        const Scan seen = f_.scan(combined, width);
        members |= status;
        if (seen.bad) bad = true;
        peaks()[t] = seen.peak;
        const bool summed = log_sums && std::fabs(seen.peak) < kInf;
        keep_sum(-1, t, {seen.peak, summed ? f_.exp_sum(combined, width, seen.peak, scale_) : 0.f});
      }
    });
    int32_t status = members;
    if (status == 0 && (bad || row_peak() == -kInf)) status = 1;
    return status;
  }

  // Lowest score that top-p keeps among the scores >= lowest, whose mass is `total` (0: not known yet).
  float nucleus_edge(float lowest, float top_p, double total) {
    float bound = lowest;
    if (total > 0) {  // tokens below this have less than (1 - top_p) of the mass between them
      const double share = (1. - top_p) * total / static_cast<double>(q_.vocab);
      bound = static_cast<float>(peak_ + std::log(share) / coldness_ - 1e-3 / coldness_);
    }
    gather_above(scored_row(), bound, candidates_);
    const size_t n = candidates_.size();
    candidates_.resize(whole_lanes(static_cast<int64_t>(n)), -kInf);
    masses_.resize(candidates_.size());
    f_.exps(candidates_.data(), static_cast<int>(candidates_.size()), peak_, scale_, masses_.data());
    candidates_.resize(n);
    masses_.resize(n);
    if (total == 0) total = std::accumulate(masses_.begin(), masses_.end(), 0.);
    return mass_threshold(candidates_, masses_, std::max(top_p * total, 1e-300));
  }

  int64_t first_peak() {
    const int64_t t = std::max_element(peaks(), peaks() + tiles_) - peaks();
    alignas(64) float buffer[kTile];
    const float* combined = tile(t, buffer);
    return t * kTile + (std::find(combined, combined + kTile - 1, peak_) - combined);
  }

  // Two-level Gumbel-max over the scores >= lowest.
  int64_t draw(bool truncated, float lowest) {
    alignas(64) float buffer[kTile];
    const uint64_t seed = static_cast<uint64_t>(q_.seeds.at(row_, block_));
    const uint32_t position = static_cast<uint32_t>(q_.positions.at(row_, block_));
    float* tile_noise = stats_.data() + 3 * padded_;
    f_.gumbel(seed, kTileLevel, position, 0, padded(), tile_noise);
    int64_t chosen = 0;
    float best = -kInf;
    for (int64_t t = 0; t < tiles_; ++t) {
      const float peak = peaks()[t];
      if (!(peak >= lowest) || peak == -kInf) continue;
      PartialSum sum{part(-1).refs[t], part(-1).sums[t]};
      if (truncated) {
        sum = {peak, f_.exp_sum_above(scores_.data() + t * kTile, tile_width(t), lowest, peak, scale_)};
      }
      const float value = (sum.ref - peak_) * coldness_ + std::log(sum.sum) + tile_noise[t];
      if (value > best) best = value, chosen = t;
    }
    const float* combined = tile(chosen, buffer);
    const int width = tile_width(chosen);
    alignas(64) float noise[kTile];
    f_.gumbel(seed, kTokenLevel, position, static_cast<uint32_t>(chosen * kTile), width, noise);
    return chosen * kTile + f_.draw(combined, noise, width, lowest, peak_, coldness_);
  }

  int64_t tile_size(int64_t t) const { return std::min<int64_t>(kTile, q_.vocab - t * kTile); }
  int tile_width(int64_t t) const { return static_cast<int>(whole_lanes(tile_size(t))); }

  const float* tile(int64_t t, float* buffer) {
    return keep_row_ ? scores_.data() + t * kTile : combine(t, buffer, false, nullptr);
  }

  float logit(const Member& member, int64_t token) const {
    alignas(64) float one[kLanes];
    return load(member, token, 1, one)[0];
  }

  void report(int64_t index, int64_t token, double log_total) {
    const auto logprob = [&](float score) { return static_cast<float>((score - peak_) * coldness_ - log_total); };
    alignas(64) float buffer[kTile];
    q_.logprobs[index] = logprob(tile(token / kTile, buffer)[token % kTile]);
    for (size_t i = 0; i < q_.members.size(); ++i) {
      const Parts sums = part(static_cast<int64_t>(i));
      const float ref = *std::max_element(sums.refs, sums.refs + tiles_);
      const double sum = f_.scaled_sum(sums.refs, sums.sums, padded(), ref, kLog2e);
      q_.member_logprobs[i * q_.rows * q_.block + index] =
          static_cast<float>(logit(q_.members[i], token) - ref - std::log(sum));
    }
    if (q_.top_n == 0) return;
    const float last = kth_score(scored_row(), q_.top_n, candidates_);
    order_.clear();
    for (int64_t t = 0; t < tiles_; ++t) {
      if (peaks()[t] < last) continue;
      const int64_t end = std::min((t + 1) * kTile, q_.vocab);
      for (int64_t x = t * kTile; x < end; ++x) {
        if (scores_[x] >= last) order_.push_back(x);
      }
    }
    const auto before = [&](int64_t x, int64_t y) {
      return scores_[x] > scores_[y] || (scores_[x] == scores_[y] && x < y);
    };
    std::partial_sort(order_.begin(), order_.begin() + q_.top_n, order_.end(), before);
    for (int64_t i = 0; i < q_.top_n; ++i) {
      q_.top_tokens[index * q_.top_n + i] = order_[i];
      q_.top_logprobs[index * q_.top_n + i] = logprob(scores_[order_[i]]);
    }
  }

  void fail(int64_t index, int32_t status) {
    q_.tokens[index] = 0;
    q_.status[index] = status;
    if (!q_.logprobs) return;
    q_.logprobs[index] = NAN;
    for (size_t i = 0; i < q_.members.size(); ++i) q_.member_logprobs[i * q_.rows * q_.block + index] = NAN;
    for (int64_t i = 0; i < q_.top_n; ++i) {
      q_.top_tokens[index * q_.top_n + i] = i;
      q_.top_logprobs[index * q_.top_n + i] = NAN;
    }
  }

  const Request& q_;
  const TileLoops& f_;
  const int threads_;  // for the tiles of a row
  const int64_t tiles_, padded_;
  int64_t row_ = 0, block_ = 0;
  float coldness_ = 1, scale_ = kLog2e, peak_ = 0;
  bool keep_row_ = false;
  std::vector<float> stats_;  // [4 + 2 · members, padded tiles]: peaks, refs, sums, noise, refs and sums of each member
  std::vector<float> scores_, lane_peaks_, candidates_, masses_;
  std::vector<int64_t> order_;
};

}  // namespace

void guided_sample(const Request& request, const TileLoops& loops, int threads) {
  const int64_t rows = request.rows * request.block;
  const int64_t elements = rows * request.vocab * static_cast<int64_t>(request.members.size());
  const int useful = static_cast<int>(std::min<int64_t>(threads, elements / kElementsPerThread));
  const bool by_row = rows >= useful;
  std::exception_ptr error;
  std::mutex mutex;
  parallel(by_row ? useful : 1, rows, [&](int64_t first, int64_t last) {
    try {
      RowSampler sampler(request, loops, by_row ? 1 : useful);
      for (int64_t row = first; row < last; ++row) sampler.run(row);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace genarm
