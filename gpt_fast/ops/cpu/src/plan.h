// What a step is cut into before it runs: chunks of each matrix product, items of the attention.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "attention.h"
#include "model.h"
#include "pool.h"
#include "step.h"
#include "tuning.h"

namespace gf {

inline constexpr int kRowBlock = 48;    // rows whose products are finished before going on
inline constexpr int kSpanTokens = 16;  // tokens of a slot attended together, at most
inline constexpr int kItemsEach = 4;    // items of the attention to a thread, where there is that much to share out
inline constexpr int kFewRows = 4;      // rows to a chunk of the small phases

// The kinds of phases: those of every layer, those at the end, and those of every block of logits. Sums and kGather are
// of ranks (exchanges.h).
enum Phase : int {
  kSumInput,
  kNormalizeAttention,
  kQkv,
  kAttend,
  kMerge,
  kOut,
  kSumAttention,
  kNormalizeFfn,
  kGateUp,
  kDown,
  kSumOutput,
  kNormalizeSelected,
  kScreen,
  kHead,
  kGather,
  kPhaseKinds
};
inline constexpr int kLayerPhases = kSumOutput, kLastPhases = kHead - kSumOutput, kBlockPhases = kPhaseKinds - kHead;

// How a matrix product is cut into chunks of work.
struct Split {
  int tiles, tiles_each, rows, rows_each;

  // `unit` tiles belong together. About `chunks` of them: small enough to share out evenly, large enough to stream.
  static Split make(int tiles, int unit, int rows, int cols, int chunks) {
    Split s{tiles, 0, rows, 0};
    const int fit = 256 * 1024 / cols / 24 * 24;  // rows of x that stay in the level 2 cache
    s.rows_each = std::min(rows, std::max(fit, 48));
    s.tiles_each = unit * std::max(1, std::min(tiles / unit / chunks, 1024 / unit));
    while (s.chunks() > Pool::kMaxChunks) s.tiles_each *= 2;
    return s;
  }
  int tile_chunks() const { return (tiles + tiles_each - 1) / tiles_each; }
  int chunks() const { return rows == 0 ? 0 : tile_chunks() * ((rows + rows_each - 1) / rows_each); }
  struct Part {
    int tile, tiles, row, rows;
  };
  Part part(int chunk) const {
    const int tile = chunk % tile_chunks() * tiles_each, row = chunk / tile_chunks() * rows_each;
    return {tile, std::min(tiles_each, tiles - tile), row, std::min(rows_each, rows - row)};
  }
};

// Calls run(part, weights wanted next) for `unit` tiles and kRowBlock rows at a time; `next` follows the last tile.
template <class F>
void for_blocks(const Linear& w, const Split::Part& all, int unit, const uint8_t* next, F&& run) {
  const int end = all.tile + all.tiles, end_row = all.row + all.rows;
  for (int tile = all.tile; tile < end; tile += unit) {
    const uint8_t* following = tile + unit < end ? w.pair(tile + unit) : next;
    for (int row = all.row; row < end_row; row += kRowBlock)
      run(Split::Part{tile, std::min(unit, end - tile), row, std::min(kRowBlock, end_row - row)}, following);
  }
}

// Neighbouring tokens of one slot, whose queries read the cache together.
struct Span {
  int first, count;
};

// One KV head of one span: `part_count` parts of the cache from `first_part`. They are all when `whole`; else each
// part's result is stored, to be merged when all are there.
struct Item {
  Span span;
  int kv_head, first_part, part_count;
  bool whole;
};

// The items of a step's attention, in an order that does not matter to the result. A span that is longer than a
// thread's share is split.
struct AttentionPlan {
  std::vector<Item> items;
  std::vector<int> split_index;  // token -> its place among the split ones, or -1
  int split_tokens = 0, split_parts = 0;

  void make(const std::vector<Token>& tokens, int kv_heads, int threads) {
    items.clear();
    split_tokens = split_parts = 0;
    split_index.assign(tokens.size(), -1);
    find_spans(tokens);
    int64_t work = 0;
    for (const Span& span : spans_) work += int64_t(span.count) * parts(span, tokens) * kv_heads;
    const int64_t share = std::max<int64_t>(1, work / (kItemsEach * threads));
    for (const Span& span : spans_) add_items(span, parts(span, tokens), kv_heads, share);
  }

 private:
  std::vector<Span> spans_;

  void find_spans(const std::vector<Token>& tokens) {
    spans_.clear();
    const int rows = int(tokens.size());
    for (int first = 0; first < rows; first += spans_.back().count) {
      int count = 1;
      while (first + count < rows && count < kSpanTokens && tokens[first + count].slot == tokens[first].slot) count++;
      spans_.push_back({first, count});
    }
  }

  // Parts of the cache up to the span's last position.
  static int parts(const Span& span, const std::vector<Token>& tokens) {
    int last = 0;
    for (int i = 0; i < span.count; i++) last = std::max(last, tokens[span.first + i].position);
    return last / (kChunk * kPart) + 1;
  }

  void add_items(const Span& span, int all, int kv_heads, int64_t share) {
    const int pieces = int(std::min<int64_t>(all, (int64_t(all) * span.count + share - 1) / share));
    const bool whole = pieces == 1;
    if (!whole) {
      for (int i = 0; i < span.count; i++) split_index[span.first + i] = split_tokens++;
      split_parts = std::max(split_parts, all);
    }
    const int each = (all + pieces - 1) / pieces;
    for (int head = 0; head < kv_heads; head++)
      for (int part = 0; part < all; part += each)
        items.push_back({span, head, part, std::min(each, all - part), whole});
  }
};

// All that is decided of a step before it runs.
struct Plan {
  std::vector<Token> tokens;  // as read_tokens left them
  std::vector<int> selected;  // those whose logits or best tokens are wanted
  AttentionPlan attention;
  Split qkv{}, out{}, gate_up{}, down{}, head{};
  int head_rows = 0, head_blocks = 0;  // the selected rows' logits are computed in blocks of so many, one by one
  int chunks[kPhaseKinds] = {};
  uint64_t serial = 0;  // tells one step's plan from another's

  int rows() const { return int(tokens.size()); }
  bool few_rows() const { return tokens.size() <= kFewRows; }
  // The selected rows of a part of the head's product in a block: first, and how many.
  std::pair<int, int> rows_of(int block, const Split::Part& part) const {
    const int first = block * head_rows + part.row;
    return {first, std::min(part.rows, int(selected.size()) - first)};
  }
  // The rows of a chunk of a small phase over `rows` rows.
  static int first_row(int chunk) { return chunk * kFewRows; }
  static int end_row(int chunk, int rows) { return std::min(rows, (chunk + 1) * kFewRows); }

  // `layer` stands for all, which are of one shape. logit_rows: to a block, at most. Others say how many chunks the
  // screen (head_screen.h) and the sums of ranks (exchanges.h) have.
  void make(const ModelWeights& model, const LayerWeights& layer, const Tuning& tuning, int threads, int logit_rows) {
    serial++;
    selected.clear();
    for (int i = 0; i < rows(); i++)
      if (tokens[i].out >= 0) selected.push_back(i);
    attention.make(tokens, model.n_kv_head, threads);
    head_rows = std::min(int(selected.size()), logit_rows);
    head_blocks = head_rows ? (int(selected.size()) + head_rows - 1) / head_rows : 0;
    split(model, layer, threads * tuning.chunks_each);
    count_chunks();
  }

 private:
  void split(const ModelWeights& model, const LayerWeights& layer, int wanted) {
    const int head_tiles = model.head_dim / kLanes;
    qkv = {model.heads() * head_tiles, head_tiles, rows(), std::min(rows(), kRowBlock)};
    out = Split::make(layer.out.tiles(), 2, rows(), layer.out.cols, wanted);
    gate_up = Split::make(layer.gate_up.tiles(), 4, rows(), model.dim, wanted);
    down = Split::make(layer.down.tiles(), 2, rows(), layer.down.cols, wanted);
    head = Split::make(model.head.tiles(), 2, head_rows, model.dim, wanted);
  }

  void count_chunks() {
    const int row_chunks = few_rows() ? 0 : (rows() + kFewRows - 1) / kFewRows;
    chunks[kNormalizeAttention] = chunks[kNormalizeFfn] = chunks[kMerge] = row_chunks;
    chunks[kQkv] = qkv.chunks();
    chunks[kAttend] = int(attention.items.size());
    chunks[kOut] = out.chunks();
    chunks[kGateUp] = gate_up.chunks();
    chunks[kDown] = down.chunks();
    chunks[kNormalizeSelected] = (int(selected.size()) + kFewRows - 1) / kFewRows;
    chunks[kHead] = head.chunks();
  }
};

}  // namespace gf
