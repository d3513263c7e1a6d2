// A standalone run of the decoder over random weights of every format, for the sanitizers (python -m gpt_fast.ops.cpu).
// Buffers have exactly the documented sizes, so that a read past one is caught. Exits with 1 when a row's logits
// depend on threads, batch or chunking, or its best token on the head's screen, when a pool loses or repeats work, or
// when ranks, which are threads here, hold different logits.
#include <cstdio>
#include <memory>
#include <random>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "decoder.h"
#include "screen_build.h"

namespace {

using gf::Linear;

struct RandomModel {
  static constexpr int kPositions = 101, kVocab = 77, kDim = 72, kHeads = 6, kKvHeads = 2, kHeadDim = 48, kFfn = 56;
  static constexpr int kRotary = 44;

  // Of several ranks, one's share: weights of its own, and its run of their vocabulary.
  explicit RandomModel(int format, int rank = 0, int ranks = 1) : format_(format), random_(unsigned(7 + rank)) {
    for (auto& layer : layers_) {
      layer.qkv = linear((kHeads + 2 * kKvHeads) * kHeadDim, kDim, true);
      layer.out = linear(kDim, kHeads * kHeadDim, true);
      layer.gate_up = linear(2 * gf::round_up(kFfn, gf::kGroup), kDim, true);
      layer.down = linear(kDim, kFfn, true);
      layer.attention_norm = floats(kDim, 1);
      layer.ffn_norm = floats(kDim, 1);
      layer.q_norm = floats(kHeadDim, 1);
      layer.k_norm = floats(kHeadDim, 1);
    }
    layers_[1].window = 21;
    weights.n_layer = 2, weights.dim = kDim, weights.ffn_dim = kFfn;
    weights.vocab = ranks * kVocab, weights.vocab_first = rank * kVocab;
    weights.n_head = kHeads, weights.n_kv_head = kKvHeads, weights.head_dim = kHeadDim, weights.rotary_dim = kRotary;
    weights.embedding_type = 0, weights.embedding_group = 1, weights.norm_eps = 1e-5f;
    weights.embedding = floats(kVocab * kDim, 1);
    weights.rope = floats(kPositions * kRotary, 1);
    weights.norm = floats(kDim, 1);
    weights.head = linear(kVocab, kDim, false);
    weights.layers = layers_;
  }

  gf::ModelWeights weights{};

  gf::Screen screen() {
    static const int32_t outliers[] = {3, kDim - 1, 40};
    const Linear& head = weights.head;
    const size_t rows = size_t(head.tiles()) * gf::kLanes, groups = size_t(head.groups());
    uint8_t *q = bytes(rows * groups * 16, 0, 255), *scale = bytes(rows * (4 + groups), 0, 255);
    const Linear copy{gf::kLevels, head.rows, head.cols, gf::kGroup, q, scale, nullptr};
    const gf::ScreenMemory memory = gf::ScreenMemory::of(copy, q, scale);
    gf::Screen s{};
    s.weights = copy, s.outliers = outliers, s.outlier_count = 3, s.max_rows = 2;
    s.outlier_error = reinterpret_cast<int8_t*>(bytes(rows * 3, 0, 255));
    s.error_scale = floats(int(rows), 1), s.error_norm = floats(int(rows), 1), s.weight_norm = floats(head.tiles(), 1);
    gf::build_screen(head, s, memory, 0, 3);
    gf::build_screen(head, s, memory, 3, head.tiles() - 3);
    return s;
  }

 private:
  float* floats(int n, float size) {
    floats_.emplace_back(new float[size_t(n)]);
    std::normal_distribution<float> normal(0, size);
    for (int i = 0; i < n; i++) floats_.back()[i] = normal(random_);
    return floats_.back().get();
  }

  uint8_t* bytes(size_t n, int low, int high) {
    bytes_.emplace_back(new (std::align_val_t(64)) uint8_t[n]);
    std::uniform_int_distribution<int> byte(low, high);
    for (size_t i = 0; i < n; i++) bytes_.back().get()[i] = uint8_t(byte(random_));
    return bytes_.back().get();
  }

  Linear linear(int rows, int cols, bool bias) {
    Linear w{format_, rows, cols, format_ == gf::kInt4 ? 64 : gf::kGroup, nullptr, nullptr, nullptr};
    const size_t outputs = size_t(w.tiles()) * gf::kLanes, inputs = size_t(w.groups()) * gf::kGroup;
    const size_t bits = format_ == gf::kInt4 ? 4 : format_ == gf::kBf16 ? 16 : 8;
    uint8_t* q = bytes(outputs * inputs * bits / 8, 0, 255);
    w.q = q;
    if (format_ == gf::kInt8Row) w.scale = floats(int(outputs), 0.01f);
    if (format_ == gf::kInt8Group) w.scale = halves(outputs * w.groups());
    if (format_ == gf::kInt4) w.scale = halves(outputs * w.scale_groups() * 2);
    if (format_ == gf::kBf16) small_bf16(q, outputs * inputs);
    if (bias) w.bias = floats(int(outputs), 0.1f);
    return w;
  }

  const void* halves(size_t n) {  // 0x1c00..0x1cff: about 0.004
    uint8_t* p = bytes(2 * n, 0, 255);
    for (size_t i = 0; i < n; i++) p[2 * i + 1] = 0x1c;
    return p;
  }

  void small_bf16(uint8_t* p, size_t n) {
    std::normal_distribution<float> normal(0, 0.05f);
    for (size_t i = 0; i < n; i++) {
      const uint16_t bits = gf::float_to_bf16(normal(random_));
      std::memcpy(p + 2 * i, &bits, 2);
    }
  }

  struct Free {
    void operator()(uint8_t* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };

  int format_;
  std::mt19937 random_;
  std::vector<std::unique_ptr<float[]>> floats_;
  std::vector<std::unique_ptr<uint8_t[], Free>> bytes_;
  gf::LayerWeights layers_[2] = {};
};

struct Cache {
  std::vector<uint8_t> k, v;
  std::vector<float> k_scale, v_scale;

  Cache(int slots, gf::CacheType type) {
    const size_t positions = size_t(2) * slots * RandomModel::kKvHeads * RandomModel::kPositions;
    const size_t bytes = type == gf::CacheType::kFloat ? 4 : type == gf::CacheType::kBf16 ? 2 : 1;
    k.assign(positions * RandomModel::kHeadDim * bytes, 0xff);  // NaN in both float types
    v = k;
    k_scale.assign(type == gf::CacheType::kInt8 ? positions : 0, NAN);
    v_scale = k_scale;
  }
};

constexpr int kSequences = 4, kSequenceTokens = 60;

// Four sequences of 60 tokens, fed `chunk` tokens at a time, together or one after another: all logits.
std::vector<float> run(const RandomModel& model, int threads, int chunk, bool together, gf::CacheType type,
                       gf::Link* link = nullptr) {
  constexpr int kRows = kSequences, kTokens = kSequenceTokens;
  const int vocab = model.weights.vocab;
  gf::Pool pool(threads, 50, link && link->rank());
  gf::Decoder decoder(model.weights, pool, std::shared_ptr<gf::Link>(std::shared_ptr<gf::Link>(), link));
  Cache cache(kRows, type);
  std::vector<float> all(size_t(kRows) * kTokens * vocab), some;
  std::vector<int64_t> best;
  uint64_t steps = 0;
  const int rows = together ? kRows : 1;
  for (int first = 0; first < kRows; first += rows)
    for (int at = 0; at < kTokens; at += chunk) {
      const int now = std::min(chunk, kTokens - at);
      std::vector<int64_t> tokens, positions, slots;
      for (int row = first; row < first + rows; row++) {
        slots.push_back(kRows - 1 - row);
        for (int i = at; i < at + now; i++) {
          tokens.push_back((row * 31 + i * i) % vocab);
          positions.push_back(i);
        }
      }
      best.assign(size_t(rows) * now, -9);
      some.assign(size_t(rows) * now * vocab, NAN);
      gf::StepInput step{};
      step.rows = rows, step.row_tokens = now, step.length = kTokens;
      step.tokens = tokens.data(), step.position = positions.data(), step.slot = slots.data();
      step.logits = some.data(), step.best = best.data();
      step.positions = RandomModel::kPositions, step.slots = kRows, step.cache_type = int(type);
      step.k = cache.k.data(), step.v = cache.v.data();
      if (!cache.k_scale.empty()) step.k_scale = cache.k_scale.data(), step.v_scale = cache.v_scale.data();
      if (decoder.start(step) != gf::kFine) std::exit(2);
      decoder.finish(++steps);
      for (int row = 0; row < rows; row++)
        std::memcpy(&all[(size_t(first + row) * kTokens + at) * vocab], &some[size_t(row) * now * vocab],
                    sizeof(float) * now * vocab);
    }
  return all;
}

struct Greedy {
  std::vector<float> logits;
  std::vector<int64_t> best;
};

// Two sequences of 40 tokens, each the best after the one before; with `ahead`, a step begins before the last has
// ended. With a screen, no logits.
Greedy run_greedily(const RandomModel& model, int threads, bool ahead, const gf::Screen* screen,
                    gf::Link* link = nullptr) {
  constexpr int kRows = 2, kTokens = 40;
  const int vocab = model.weights.vocab;
  gf::Pool pool(threads, 50, link && link->rank());
  gf::Decoder decoder(model.weights, pool, std::shared_ptr<gf::Link>(std::shared_ptr<gf::Link>(), link));
  Cache cache(kRows, gf::CacheType::kFloat);
  if (screen) decoder.set_screen(*screen);
  std::vector<float> all(screen ? 0 : size_t(kTokens) * kRows * vocab, NAN);
  std::vector<int64_t> best(size_t(kTokens + 1) * kRows, -1), positions(size_t(kTokens) * kRows);
  best[0] = 5, best[1] = 9;
  for (int at = 0; at < kTokens; at++) {
    gf::StepInput step{};
    step.rows = kRows, step.row_tokens = 1, step.length = kTokens;
    step.positions = RandomModel::kPositions, step.slots = kRows, step.cache_type = int(gf::CacheType::kFloat);
    step.k = cache.k.data(), step.v = cache.v.data();
    step.tokens = at == 0 || !ahead ? &best[size_t(at) * kRows] : nullptr;
    positions[size_t(at) * kRows] = positions[size_t(at) * kRows + 1] = at;
    step.position = &positions[size_t(at) * kRows];
    step.logits = screen ? nullptr : &all[size_t(at) * kRows * vocab];
    step.best = &best[size_t(at + 1) * kRows];
    if ((step.tokens ? decoder.start(step) : decoder.follow(step)) != gf::kFine) std::exit(2);
    decoder.finish(uint64_t(ahead ? at : at + 1));
  }
  decoder.finish(kTokens);
  return {all, best};
}

// A job that counts its chunks; each time its phases are through it checks that every chunk ran once, in its phase.
struct Counting final : gf::Job {
  static constexpr int kRounds = 3;
  std::vector<int> wanted;
  std::vector<std::atomic<int>> ran;
  std::atomic<int> rounds{0};
  std::atomic<bool> fine{true};

  explicit Counting(std::vector<int> chunks) : wanted(std::move(chunks)), ran(wanted.size()) {}
  int phases() const override { return int(wanted.size()); }
  int chunks(int phase) const override { return wanted[size_t(phase)]; }
  void run(int phase, int, int) override {
    if (phase > 0 && ran[size_t(phase - 1)] != wanted[size_t(phase - 1)]) fine = false;
    ran[size_t(phase)]++;
  }
  bool again() override {
    for (size_t i = 0; i < wanted.size(); i++) fine = fine && ran[i].exchange(0) == wanted[i];
    return ++rounds < kRounds;
  }
};

// Jobs of a few phases with no chunks, fewer than threads, or more; the user leaves early or helps to the end.
bool check_pool(int threads, int spins) {
  gf::Pool pool(threads, spins);
  std::mt19937 random(unsigned(threads * 1000 + spins));
  bool fine = true;
  for (int i = 0; i < 2000; i++) {
    std::vector<int> chunks(1 + random() % 9);
    for (int& n : chunks) n = random() % 4 ? int(random() % 12) : 0;
    chunks[0]++;
    Counting job(chunks);
    pool.start(job);
    pool.help_until([&, enough = int(random() % 3)] { return job.rounds >= enough; });
    if (threads == 1 || i % 2) pool.help_until([] { return false; });
    pool.wait_until_idle();
    fine = fine && job.fine && job.rounds == Counting::kRounds;
  }
  std::printf("pool of %d: %s\n", threads, fine ? "fine" : "DIFFERS");
  return fine;
}

// FNV-1a of the bits, so that the runs of two instruction sets can be compared.
unsigned digest(const std::vector<float>& values) {
  uint32_t hash = 2166136261u;
  for (const float& v : values) hash = (hash ^ gf::read_as<uint32_t>(&v)) * 16777619u;
  return hash;
}

bool check(int format, gf::CacheType type) {
  RandomModel model(format);
  const std::vector<float> expected = run(model, 1, 1, false, type);
  bool fine = true;
  for (float v : expected) fine = fine && std::isfinite(v);
  const std::tuple<int, int, bool> ways[] = {{3, 1, true}, {2, 17, false}, {3, 60, true}, {1, 7, true}};
  for (const auto& [threads, chunk, together] : ways)
    fine = fine && run(model, threads, chunk, together, type) == expected;
  const Greedy plain = run_greedily(model, 1, false, nullptr);
  const gf::Screen screen = format == gf::kInt4 ? gf::Screen{} : model.screen();
  for (int threads : {1, 2, 3}) {
    fine = fine && run_greedily(model, threads, true, nullptr).logits == plain.logits;
    if (screen.weights.rows) fine = fine && run_greedily(model, threads, threads != 2, &screen).best == plain.best;
  }
  std::printf("format %d, cache %d: %s, logits %08x\n", format, int(type), fine ? "fine" : "DIFFERS", digest(expected));
  return fine;
}

// Three ranks, each a thread, whose parts and logits leave just the room that they need.
template <class F>
auto on_ranks(const std::vector<std::unique_ptr<RandomModel>>& models, F&& run_one) {
  const int ranks = int(models.size());
  const size_t part_bytes = 64 + sizeof(float) * kSequences * kSequenceTokens * RandomModel::kDim;
  gf::Buffer<uint8_t> memory(gf::Link::bytes(ranks, part_bytes));
  std::vector<gf::Link> links;
  for (int rank = 0; rank < ranks; rank++) links.emplace_back(memory.data(), rank, ranks, part_bytes, 60, 200);
  std::vector<decltype(run_one(*models[0], links[0]))> results(models.size());
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; rank++)
    threads.emplace_back([&, rank] { results[size_t(rank)] = run_one(*models[size_t(rank)], links[size_t(rank)]); });
  for (std::thread& thread : threads) thread.join();
  return results;
}

bool check_ranks(int format) {
  constexpr int kRanks = 3;
  constexpr auto type = gf::CacheType::kFloat;
  std::vector<std::unique_ptr<RandomModel>> models;
  std::vector<gf::Screen> screens;
  for (int rank = 0; rank < kRanks; rank++) {
    models.push_back(std::make_unique<RandomModel>(format, rank, kRanks));
    screens.push_back(format == gf::kInt4 ? gf::Screen{} : models.back()->screen());
  }
  const auto expected = on_ranks(
      models, [&](const RandomModel& model, gf::Link& link) { return run(model, 1, 1, false, type, &link); })[0];
  bool fine = true;
  for (float v : expected) fine = fine && std::isfinite(v);
  for (const auto& [chunk, together] : {std::pair(60, true), std::pair(17, false)}) {
    const auto logits = on_ranks(models, [&](const RandomModel& model, gf::Link& link) {
      return run(model, 1 + link.rank() % 2, chunk, together, type, &link);
    });
    for (const std::vector<float>& of_rank : logits) fine = fine && of_rank == expected;
  }
  const auto greedy = on_ranks(models, [&](const RandomModel& model, gf::Link& link) {
    return run_greedily(model, 2, link.rank() != 1, nullptr, &link);
  });
  const auto screened = on_ranks(models, [&](const RandomModel& model, gf::Link& link) {
    return run_greedily(model, 1, true, &screens[size_t(link.rank())], &link);
  });
  for (int rank = 0; rank < kRanks; rank++) {
    fine = fine && greedy[size_t(rank)].logits == greedy[0].logits && greedy[size_t(rank)].best == greedy[0].best;
    fine = fine && screened[size_t(rank)].best == greedy[0].best;
  }
  std::printf("format %d, ranks: %s\n", format, fine ? "fine" : "DIFFERS");
  return fine;
}

}  // namespace

int main() {
  bool fine = true;
  for (int threads : {1, 2, 3, 5}) fine = check_pool(threads, 20) && check_pool(threads, 2000) && fine;
  for (int format : {gf::kInt8Row, gf::kInt8Group, gf::kInt4, gf::kBf16})
    for (gf::CacheType type : gf::kCacheTypes) fine = check(format, type) && fine;
  for (int format : {gf::kInt8Row, gf::kInt8Group, gf::kInt4, gf::kBf16}) fine = check_ranks(format) && fine;
  return fine ? 0 : 1;
}
