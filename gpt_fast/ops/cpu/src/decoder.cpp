// The C interface that decoder.py calls through ctypes.
#include "decoder.h"

#include <tuple>

#include "layout.h"
#include "screen_build.h"

using gf::Activations;
using gf::Decoder;
using gf::Linear;
using gf::Pool;
using gf::Screen;

extern "C" {

Pool* gf_pool_create(int threads, int spin_microseconds) { return new Pool(threads, gf::pauses_in(spin_microseconds)); }
void gf_pool_destroy(Pool* pool) { delete pool; }

Decoder* gf_decoder_create(const gf::ModelWeights* model, Pool* pool) { return new Decoder(*model, *pool); }
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
