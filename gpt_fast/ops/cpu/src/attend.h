// A step's attention, item by item (plan.h): what a thread does of it, and merging what several have done.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "attention.h"
#include "cache_view.h"
#include "model.h"
#include "plan.h"

namespace gf {

// A thread's working memory for one item.
struct ItemScratch {
  AttentionScratch memory;
  std::vector<const float*> q;
  std::vector<int> position;
  std::vector<Partial> state, part, chunk;  // of each query: merged so far, this part's, this chunk's

  void resize(int head_dim, int queries) {
    memory.resize(head_dim, queries);
    q.resize(size_t(queries));
    position.resize(size_t(queries));
    state.resize(size_t(queries));
    part.resize(size_t(queries));
    chunk.resize(size_t(queries));
    for (int i = 0; i < queries; i++) {
      state[i] = partial_at(memory.state.data(), i, head_dim);
      chunk[i] = partial_at(memory.chunk.data(), i, head_dim);
    }
  }
};

// One layer's attention: what it reads and writes. Tokens are rows.
class LayerAttention {
 public:
  LayerAttention(const ModelWeights& model, const Plan& plan, const CacheView& cache, int layer, int window,
                 const float* q, float* attended, float* partials)
      : head_dim_(model.head_dim),
        n_head_(model.n_head),
        group_(model.queries_per_kv_head()),
        layer_(layer),
        window_(window),
        plan_(plan),
        cache_(cache),
        q_(q),
        attended_(attended),
        partials_(partials) {}

  // Results go to `attended` where the item is a whole, else to `partials`.
  void attend(int item, ItemScratch& s) const {
    const Item& here = plan_.attention.items[item];
    const size_t at = first_position(here);
    const Item& following = plan_.attention.items[std::min(item + 1, int(plan_.attention.items.size()) - 1)];
    const ptrdiff_t next = ptrdiff_t(first_position(following)) + following.first_part * kPart * kChunk;
    cache_.with_element([&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      attend_item(here, cache_.slot<T>(at), (next - ptrdiff_t(at)) * head_dim_, s);
    });
  }

  // All heads of a row that was split, from the results of its parts: out[n_head][head_dim].
  void merge_parts(int row, ItemScratch& s, float* out) const {
    const int parts = plan_.tokens[row].position / (kChunk * kPart) + 1;
    const Partial total = s.state[0];
    for (int head = 0; head < n_head_; head++) {
      clear(total, head_dim_);
      for (int part = 0; part < parts; part++) merge(total, stored(row, head, part), head_dim_);
      finish(total, out + head * head_dim_);
    }
  }

 private:
  size_t first_position(const Item& item) const {
    return cache_.first(layer_, plan_.tokens[item.span.first].slot, item.kv_head);
  }

  // An item's queries are its tokens' of each head of its group.
  int token_of(const Item& item, int query) const { return item.span.first + query / group_; }
  int head_of(const Item& item, int query) const { return item.kv_head * group_ + query % group_; }
  size_t row_of(const Item& item, int query) const {
    return (size_t(token_of(item, query)) * n_head_ + head_of(item, query)) * head_dim_;
  }

  Queries gather_queries(const Item& item, ItemScratch& s) const {
    const int count = item.span.count * group_;
    for (int i = 0; i < count; i++) {
      s.q[i] = q_ + row_of(item, i);
      s.position[i] = plan_.tokens[token_of(item, i)].position;
    }
    return {count, s.q.data(), s.position.data(), window_};
  }

  template <class T>
  void attend_item(const Item& item, const Slot<T>& slot, ptrdiff_t next_item, ItemScratch& s) const {
    const Queries queries = gather_queries(item, s);
    for (int i = 0; item.whole && i < queries.count; i++) clear(s.state[i], head_dim_);
    for (int part = item.first_part; part < item.first_part + item.part_count; part++) {
      for (int i = 0; i < queries.count; i++)
        s.part[i] = item.whole ? partial_at(s.memory.part.data(), i, head_dim_)
                               : stored(token_of(item, i), head_of(item, i), part);
      const bool last = part + 1 == item.first_part + item.part_count;
      attend_part(queries, part, slot, last ? next_item : ptrdiff_t(part + 1) * kPart * kChunk * head_dim_, s);
      for (int i = 0; item.whole && i < queries.count; i++) merge(s.state[i], s.part[i], head_dim_);
    }
    for (int i = 0; item.whole && i < queries.count; i++) finish(s.state[i], attended_ + row_of(item, i));
  }

  // All queries' results of a part: in s.part.
  template <class T>
  void attend_part(const Queries& queries, int part, const Slot<T>& slot, ptrdiff_t next_part, ItemScratch& s) const {
    const int first = std::max(part * kPart, queries.first_seen() / kChunk);
    const int end = std::min((part + 1) * kPart, queries.last_position() / kChunk + 1);
    for (int i = 0; first >= end && i < queries.count; i++) *s.part[i].max = -INFINITY;
    for (int chunk = first; chunk < end; chunk++) {
      const ptrdiff_t next = chunk + 1 == end ? next_part : ptrdiff_t(chunk + 1) * kChunk * head_dim_;
      attend_chunk(queries, chunk, slot, next, head_dim_, s.memory, (chunk == first ? s.part : s.chunk).data());
      for (int i = 0; chunk > first && i < queries.count; i++) merge(s.part[i], s.chunk[i], head_dim_);
    }
  }

  Partial stored(int token, int head, int part) const {
    const AttentionPlan& plan = plan_.attention;
    return partial_at(partials_, (plan.split_index[token] * n_head_ + head) * plan.split_parts + part, head_dim_);
  }

  void finish(const Partial& p, float* out) const {
    const f32x16 inverse = splat(1.0f / *p.sum);
    for (int d = 0; d < head_dim_; d += kLanes) store(out + d, load(p.o + d) * inverse);
  }

  int head_dim_, n_head_, group_, layer_, window_;
  const Plan& plan_;
  const CacheView& cache_;
  const float* q_;
  float* attended_;
  float* partials_;
};

}  // namespace gf
