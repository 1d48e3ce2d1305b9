#pragma once

/// compresskv: shrinks the KV cache of large language models inside any C++ engine.
///
/// This header is the table of contents of the online part; each header below also compiles alone. Data flows
/// one way: view -> kernel -> score -> select -> compact, budgets beside it.
///
/// Files (rankings, layer errors, query statistics): compresskv/io/calibration_files.hpp. Calibration:
/// compresskv/calibrate/.

#include "compresskv/core/version.hpp"

// What a model and a budget are
#include "compresskv/core/budget.hpp"
#include "compresskv/core/head_ranking.hpp"
#include "compresskv/core/head_scores.hpp"
#include "compresskv/core/layer_errors.hpp"
#include "compresskv/core/made_with.hpp"
#include "compresskv/core/output_weights.hpp"
#include "compresskv/core/protection.hpp"
#include "compresskv/core/query_statistics.hpp"
#include "compresskv/core/shape.hpp"
#include "compresskv/core/stretch.hpp"

// The engine's memory, and what shows the window's attention
#include "compresskv/view/attention_matrix.hpp"
#include "compresskv/view/int8_kv.hpp"
#include "compresskv/view/kv_view.hpp"
#include "compresskv/view/observation.hpp"
#include "compresskv/view/paged_kv.hpp"
#include "compresskv/view/query_window.hpp"
#include "compresskv/view/recent_queries.hpp"
#include "compresskv/view/strided_kv.hpp"

// Methods
#include "compresskv/budget/cake.hpp"
#include "compresskv/budget/error_aware.hpp"
#include "compresskv/budget/pyramid.hpp"
#include "compresskv/budget/uniform.hpp"
#include "compresskv/budget/whole_heads.hpp"
#include "compresskv/score/blend.hpp"
#include "compresskv/score/blend_carried.hpp"
#include "compresskv/score/cake.hpp"
#include "compresskv/score/carried.hpp"
#include "compresskv/score/chunk_kv.hpp"
#include "compresskv/score/critical_kv.hpp"
#include "compresskv/score/cur.hpp"
#include "compresskv/score/duo_attention.hpp"
#include "compresskv/score/expected_attention.hpp"
#include "compresskv/score/grouped_retrieval.hpp"
#include "compresskv/score/h2o.hpp"
#include "compresskv/score/head_mean.hpp"
#include "compresskv/score/key_diff.hpp"
#include "compresskv/score/knorm.hpp"
#include "compresskv/score/kv_zip.hpp"
#include "compresskv/score/kv_zip_plus.hpp"
#include "compresskv/score/lag_kv.hpp"
#include "compresskv/score/model_wide.hpp"
#include "compresskv/score/q_filter.hpp"
#include "compresskv/score/r_kv.hpp"
#include "compresskv/score/random.hpp"
#include "compresskv/score/semantic_retrieval.hpp"
#include "compresskv/score/snap_kv.hpp"
#include "compresskv/score/streaming_llm.hpp"
#include "compresskv/score/tova.hpp"
#include "compresskv/score/tri_attention.hpp"
#include "compresskv/select/adaptive.hpp"
#include "compresskv/select/grouped_top_k.hpp"
#include "compresskv/select/shared_top_k.hpp"
#include "compresskv/select/whole_model.hpp"

// The calls that an engine makes
#include "compresskv/batch.hpp"
#include "compresskv/compressor.hpp"
#include "compresskv/plan.hpp"

// Attention over a cache, full or compressed
#include "compresskv/kernel/decode_attention.hpp"
