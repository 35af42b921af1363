#include "guided_sample.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <mutex>
#include <numeric>

#include "common/pool.h"
#include "row_scores.h"
#include "select.h"

namespace genarm {
namespace {

constexpr float kInf = INFINITY;
constexpr float kColdest = 1e-30f;  // the COLDEST of reference.py
constexpr int64_t kElementsPerThread = 1 << 18;  // about 0.1 ms of work, several times as long as waking a helper takes
constexpr uint32_t kTileLevel = 0, kTokenLevel = 1;

// Samples one row after another. With many rows, each thread has its own sampler. With few rows, threads share the
// tiles of a row.
class RowSampler {
 public:
  RowSampler(const Request& request, const TileLoops& loops, int threads)
      : q_(request), f_(loops), scores_(request, loops, threads), noise_(scores_.padded()) {}

  void run(int64_t index) {
    row_ = index / q_.block, block_ = index % q_.block;
    // Values in tensors are not checked. A NaN or a value out of range must not make the code read beyond the row.
    const float temperature = q_.temperature.at(row_, block_), top_p = std::max(q_.top_p.at(row_, block_), 0.f);
    const int64_t top_k = q_.top_k.at(row_, block_);
    const bool greedy = temperature == 0.f, limited = top_k > 0 && top_k < q_.vocab;
    const float log_min_p = std::log(std::min(q_.min_p.at(row_, block_), 1.f));
    const bool truncated = !greedy && (limited || top_p < 1.f || log_min_p > -kInf);
    const bool nucleus = truncated && top_p < 1.f;
    coldness_ = greedy ? 1.f : 1.f / std::max(kColdest, temperature);
    scale_ = coldness_ * kLog2e;

    const bool log_sums = q_.logprobs || (!greedy && (!truncated || (nucleus && !limited)));
    const int32_t status = scores_.read(row_, block_, scale_, truncated || q_.top_n > 0, log_sums);
    if (status != 0) return fail(index, status);
    peak_ = scores_.peak();
    const RowScores::Parts sums = scores_.part(-1);
    const double total = log_sums ? f_.scaled_sum(sums.refs, sums.sums, scores_.padded(), peak_, scale_) : 0.;

    float lowest = -kInf;
    if (truncated) {
      if (limited) lowest = kth_score(scores_.kept(), top_k, candidates_);
      if (nucleus) lowest = std::max(lowest, nucleus_edge(lowest, top_p, limited ? 0. : total));
      lowest = std::max(lowest, peak_ + log_min_p / coldness_);
    }
    const int64_t token = greedy ? first_peak() : draw(truncated, lowest);
    q_.tokens[index] = token;
    q_.status[index] = 0;
    if (q_.logprobs) report(index, token, std::log(total));
  }

 private:
  // The lowest score that top-p keeps among the scores >= lowest, whose mass is `total` (0 if not known yet).
  float nucleus_edge(float lowest, float top_p, double total) {
    float bound = lowest;
    if (total > 0) {  // all tokens below this bound together have less than (1 - top_p) of the mass
      const double share = (1. - top_p) * total / static_cast<double>(q_.vocab);
      bound = static_cast<float>(peak_ + std::log(share) / coldness_ - 1e-3 / coldness_);
    }
    gather_above(scores_.kept(), bound, candidates_);
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
    const float* peaks = scores_.peaks();
    const int64_t t = std::max_element(peaks, peaks + scores_.tiles()) - peaks;
    alignas(64) float buffer[kTile];
    const float* combined = scores_.tile(t, buffer);
    return t * kTile + (std::find(combined, combined + kTile - 1, peak_) - combined);
  }

  // Two-level Gumbel-max over the scores >= lowest.
  int64_t draw(bool truncated, float lowest) {
    alignas(64) float buffer[kTile];
    const uint64_t seed = static_cast<uint64_t>(q_.seeds.at(row_, block_));
    const uint32_t position = static_cast<uint32_t>(q_.positions.at(row_, block_));
    f_.gumbel(seed, kTileLevel, position, 0, scores_.padded(), noise_.data());
    const RowScores::Parts sums = scores_.part(-1);
    int64_t chosen = 0;
    float best = -kInf;
    for (int64_t t = 0; t < scores_.tiles(); ++t) {
      const float peak = scores_.peaks()[t];
      if (!(peak >= lowest) || peak == -kInf) continue;
      PartialSum sum{sums.refs[t], sums.sums[t]};
      if (truncated) {
        sum = {peak, f_.exp_sum_above(scores_.kept().scores + t * kTile, scores_.tile_width(t), lowest, peak, scale_)};
      }
      const float value = (sum.ref - peak_) * coldness_ + std::log(sum.sum) + noise_[t];
      if (value > best) best = value, chosen = t;
    }
    const float* combined = scores_.tile(chosen, buffer);
    const int width = scores_.tile_width(chosen);
    alignas(64) float noise[kTile];
    f_.gumbel(seed, kTokenLevel, position, static_cast<uint32_t>(chosen * kTile), width, noise);
    return chosen * kTile + f_.draw(combined, noise, width, lowest, peak_, coldness_);
  }

  void report(int64_t index, int64_t token, double log_total) {
    const auto logprob = [&](float score) { return static_cast<float>((score - peak_) * coldness_ - log_total); };
    alignas(64) float buffer[kTile];
    q_.logprobs[index] = logprob(scores_.tile(token / kTile, buffer)[token % kTile]);
    for (size_t i = 0; i < q_.members.size(); ++i) {
      const RowScores::Parts sums = scores_.part(static_cast<int64_t>(i));
      const float ref = *std::max_element(sums.refs, sums.refs + scores_.tiles());
      const double sum = f_.scaled_sum(sums.refs, sums.sums, scores_.padded(), ref, kLog2e);
      q_.member_logprobs[i * q_.rows * q_.block + index] =
          static_cast<float>(scores_.logit(i, token) - ref - std::log(sum));
    }
    if (q_.top_n == 0) return;
    const ScoredRow row = scores_.kept();
    const float last = kth_score(row, q_.top_n, candidates_);
    order_.clear();
    for (int64_t t = 0; t < row.tiles; ++t) {
      if (row.tile_peaks[t] < last) continue;
      const int64_t end = std::min((t + 1) * kTile, q_.vocab);
      for (int64_t x = t * kTile; x < end; ++x) {
        if (row.scores[x] >= last) order_.push_back(x);
      }
    }
    const auto before = [&](int64_t x, int64_t y) {
      return row.scores[x] > row.scores[y] || (row.scores[x] == row.scores[y] && x < y);
    };
    std::partial_sort(order_.begin(), order_.begin() + q_.top_n, order_.end(), before);
    for (int64_t i = 0; i < q_.top_n; ++i) {
      q_.top_tokens[index * q_.top_n + i] = order_[i];
      q_.top_logprobs[index * q_.top_n + i] = logprob(row.scores[order_[i]]);
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
  RowScores scores_;
  int64_t row_ = 0, block_ = 0;
  float coldness_ = 1, scale_ = kLog2e, peak_ = 0;
  std::vector<float> noise_;  // [padded tiles]
  std::vector<float> candidates_, masses_;
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
