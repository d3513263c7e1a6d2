// The C interface that decoder.py calls through ctypes.
#include "decoder.h"

#include <memory>
#include <tuple>
#include <utility>

#include "layout.h"
#include "screen_build.h"
#include "shared_link.h"

using gf::Activations;
using gf::Decoder;
using gf::Linear;
using gf::Pool;
using gf::Screen;
using gf::SharedLink;
using LinkHandle = std::shared_ptr<SharedLink>;

extern "C" {

Pool* gf_pool_create(int threads, int spin_microseconds, bool apart) {
  return new Pool(threads, gf::pauses_in(spin_microseconds), apart);
}
void gf_pool_destroy(Pool* pool) { delete pool; }

size_t gf_link_bytes(int ranks, size_t part_bytes) { return SharedLink::bytes(ranks, part_bytes); }
// Over the memory that a file holds; null: it cannot be mapped.
LinkHandle* gf_link_create(int file, int rank, int ranks, size_t part_bytes, double seconds, int spin_microseconds) {
  LinkHandle link = SharedLink::open(file, rank, ranks, part_bytes, seconds, gf::pauses_in(spin_microseconds));
  return link ? new LinkHandle(std::move(link)) : nullptr;
}
void gf_link_destroy(LinkHandle* link) { delete link; }
int32_t gf_link_end(const LinkHandle* link) { return (*link)->link.end(); }
void gf_link_give_up(LinkHandle* link) { (*link)->link.end_with(gf::Link::kGivenUp); }
// Meets the others `count` times, as sums of nothing would; false: the link has ended.
bool gf_link_meet(LinkHandle* handle, int count) {
  gf::Link& link = (*handle)->link;
  const uint32_t before = link.reserve(count);
  for (int i = 1; i <= count; i++)
    if (!link.meet(before + uint32_t(i))) return false;
  return true;
}

// What rank 0 tells the others; false: the link has ended.
bool gf_link_send(LinkHandle* link, const int64_t* numbers, uint32_t count) {
  return (*link)->mailbox.send(numbers, count);
}
bool gf_link_receive(LinkHandle* link, int64_t* numbers, uint32_t count) {
  return (*link)->mailbox.receive(numbers, count);
}

// link: null, or to the other ranks of the model.
Decoder* gf_decoder_create(const gf::ModelWeights* model, Pool* pool, LinkHandle* link) {
  return new Decoder(*model, *pool, link ? std::shared_ptr<gf::Link>(*link, &(*link)->link) : nullptr);
}
void gf_decoder_destroy(Decoder* decoder) { delete decoder; }
int gf_decoder_start(Decoder* decoder, const gf::StepInput* input) { return decoder->start(*input); }
int gf_decoder_follow(Decoder* decoder, const gf::StepInput* input) { return decoder->follow(*input); }
int gf_decoder_finish(Decoder* decoder, uint64_t count) { return decoder->finish(count); }

void gf_decoder_head_energy(Decoder* decoder, float* out) { decoder->head_energy(out); }
void gf_decoder_set_tuning(Decoder* decoder, const gf::Tuning* tuning) { decoder->set_tuning(*tuning); }
void gf_decoder_set_screen(Decoder* decoder, const Screen* screen) { decoder->set_screen(*screen); }

// Fills in some tiles of a screen of `w` (screen_build.h); its weights point to q and scale.
void gf_screen_build(const Linear* w, Screen* screen, uint8_t* q, void* scale, int tile, int tiles) {
  gf::build_screen(*w, *screen, gf::ScreenMemory::of(screen->weights, q, scale), tile, tiles);
}

// What a screen of `w` says of w x, for tests: each output's estimate and how far above it may lie, [16 w.tiles()].
void gf_screen(const Linear* w, const Screen* screen, const float* x, float* estimate, float* margin) {
  Activations exact, coarse;
  const size_t n = size_t(w->cols);
  std::vector<float> exact_input(n), coarse_input(n);
  const gf::Kind own = w->format == gf::kBf16 ? gf::Kind::kBf16 : gf::Kind::kInt8;
  for (const auto& [form, kind, out] :
       {std::tuple(&exact, own, &exact_input), std::tuple(&coarse, gf::Kind::kInt8, &coarse_input)}) {
    form->resize(kind, 1, w->cols);
    form->put_row(0, x, w->cols);
    form->restore(0, w->cols, out->data());
  }
  gf::ScreenInput input;
  input.set(*screen, exact_input.data(), coarse_input.data(), w->cols);
  for (int tile = 0; tile < w->tiles(); tile++) {
    float product[gf::kLanes];
    gf::multiply(screen->weights, tile, 1, coarse, 0, 1, product, gf::kLanes, screen->weights.q, {});
    gf::estimate(*screen, tile, &input, 1, product, gf::kLanes);
    std::copy(product, product + gf::kLanes, estimate + tile * gf::kLanes);
    gf::store(margin + tile * gf::kLanes, gf::margin(*screen, tile, input));
  }
}

// Where the fields of the structures above lie, for the test of their ctypes twins.
const gf::Field* gf_layout(int* count) {
  *count = int(std::size(gf::kFields));
  return gf::kFields;
}

// y[m] = W x[m], for tests of one matrix: x [rows][cols], y [rows][round_up(w.rows, 32)].
void gf_linear(const Linear* w, const float* x, int rows, float* y, const gf::Tuning* tuning) {
  Activations a;
  a.resize(w->format == gf::kBf16 ? gf::Kind::kBf16 : gf::Kind::kInt8, rows, w->cols);
  for (int m = 0; m < rows; m++) a.put_row(m, x + size_t(m) * w->cols, w->cols);
  gf::multiply(*w, 0, w->tiles(), a, 0, rows, y, w->tiles() * gf::kLanes, w->q, *tuning);
}
}
