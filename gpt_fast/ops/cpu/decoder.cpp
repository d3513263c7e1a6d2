// The C interface that decoder.py calls through ctypes.
#include "decoder.h"

using gf::Activations;
using gf::Decoder;
using gf::Linear;
using gf::Pool;

extern "C" {

Pool* gf_pool_create(int threads, int spins) { return new Pool(threads, spins); }
void gf_pool_destroy(Pool* pool) { delete pool; }

Decoder* gf_decoder_create(const gf::ModelWeights* model, Pool* pool) { return new Decoder(*model, *pool); }
void gf_decoder_destroy(Decoder* decoder) { delete decoder; }
int gf_decoder_start(Decoder* decoder, const gf::StepInput* input) { return decoder->start(*input); }
int gf_decoder_follow(Decoder* decoder, const gf::StepInput* input) { return decoder->follow(*input); }
int gf_decoder_finish(Decoder* decoder, uint64_t count) { return decoder->finish(count); }

// y[m] = W x[m], for tests of one matrix: x [rows][cols], y [rows][round_up(w.rows, 32)].
void gf_linear(const Linear* w, const float* x, int rows, float* y) {
  Activations a;
  a.resize(w->format == gf::kBf16 ? gf::Kind::kBf16 : gf::Kind::kInt8, rows, w->cols);
  for (int m = 0; m < rows; m++) a.put_row(m, x + size_t(m) * w->cols, w->cols);
  gf::multiply(*w, 0, w->tiles(), a, 0, rows, y, w->tiles() * gf::kLanes, w->q);
}
}
