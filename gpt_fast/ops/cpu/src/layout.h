// Where the fields of the structures that Python fills in lie: a test compares them with structs.py's twins.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear.h"
#include "model.h"
#include "screen.h"
#include "step.h"
#include "tuning.h"

namespace gf {

struct Field {
  const char* structure;
  const char* name;  // empty: the structure as a whole
  int32_t offset, size;
};

#define GF_WHOLE(S) {#S, "", 0, sizeof(S)}
#define GF_FIELD(S, name) {#S, #name, offsetof(S, name), sizeof(S::name)}

inline constexpr Field kFields[] = {
    GF_WHOLE(Linear),
    GF_FIELD(Linear, format),
    GF_FIELD(Linear, rows),
    GF_FIELD(Linear, cols),
    GF_FIELD(Linear, group),
    GF_FIELD(Linear, q),
    GF_FIELD(Linear, scale),
    GF_FIELD(Linear, bias),
    GF_WHOLE(Screen),
    GF_FIELD(Screen, weights),
    GF_FIELD(Screen, outliers),
    GF_FIELD(Screen, outlier_error),
    GF_FIELD(Screen, error_scale),
    GF_FIELD(Screen, error_norm),
    GF_FIELD(Screen, weight_norm),
    GF_FIELD(Screen, outlier_count),
    GF_FIELD(Screen, max_rows),
    GF_FIELD(Screen, outlier_rounding),
    GF_WHOLE(LayerWeights),
    GF_FIELD(LayerWeights, qkv),
    GF_FIELD(LayerWeights, out),
    GF_FIELD(LayerWeights, gate_up),
    GF_FIELD(LayerWeights, down),
    GF_FIELD(LayerWeights, attention_norm),
    GF_FIELD(LayerWeights, ffn_norm),
    GF_FIELD(LayerWeights, q_norm),
    GF_FIELD(LayerWeights, k_norm),
    GF_FIELD(LayerWeights, window),
    GF_WHOLE(ModelWeights),
    GF_FIELD(ModelWeights, n_layer),
    GF_FIELD(ModelWeights, dim),
    GF_FIELD(ModelWeights, n_head),
    GF_FIELD(ModelWeights, n_kv_head),
    GF_FIELD(ModelWeights, head_dim),
    GF_FIELD(ModelWeights, ffn_dim),
    GF_FIELD(ModelWeights, vocab),
    GF_FIELD(ModelWeights, rotary_dim),
    GF_FIELD(ModelWeights, embedding_type),
    GF_FIELD(ModelWeights, embedding_group),
    GF_FIELD(ModelWeights, vocab_first),
    GF_FIELD(ModelWeights, norm_eps),
    GF_FIELD(ModelWeights, embedding),
    GF_FIELD(ModelWeights, embedding_scale),
    GF_FIELD(ModelWeights, rope),
    GF_FIELD(ModelWeights, norm),
    GF_FIELD(ModelWeights, head),
    GF_FIELD(ModelWeights, layers),
    GF_WHOLE(Fetch),
    GF_FIELD(Fetch, hint),
    GF_FIELD(Fetch, distance),
    GF_WHOLE(Tuning),
    GF_FIELD(Tuning, one_row),
    GF_FIELD(Tuning, few_rows),
    GF_FIELD(Tuning, both_tiles),
    GF_FIELD(Tuning, row_block),
    GF_FIELD(Tuning, chunks_each),
    GF_WHOLE(StepInput),
    GF_FIELD(StepInput, rows),
    GF_FIELD(StepInput, row_tokens),
    GF_FIELD(StepInput, length),
    GF_FIELD(StepInput, positions),
    GF_FIELD(StepInput, slots),
    GF_FIELD(StepInput, cache_type),
    GF_FIELD(StepInput, tokens),
    GF_FIELD(StepInput, position),
    GF_FIELD(StepInput, slot),
    GF_FIELD(StepInput, select),
    GF_FIELD(StepInput, k),
    GF_FIELD(StepInput, v),
    GF_FIELD(StepInput, k_scale),
    GF_FIELD(StepInput, v_scale),
    GF_FIELD(StepInput, logits),
    GF_FIELD(StepInput, best),
};

#undef GF_WHOLE
#undef GF_FIELD

}  // namespace gf
