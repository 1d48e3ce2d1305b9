/* The library for C: create a plan, begin a sequence, let its layers arrive, finish. Link
 * compresskv::runtime.
 *
 *     ckv_plan* plan = NULL;
 *     ckv_settings settings;
 *     ckv_settings_init(&settings);
 *     settings.budget = CKV_BUDGET_RATIO;
 *     settings.budget_ratio = 0.12;
 *     if (ckv_plan_create(&model, "snapkv", &settings, &plan) != CKV_OK) { puts(ckv_last_error()); }
 *
 * Every function that can fail returns a status, and ckv_last_error() says what went wrong. No exception
 * leaves it. A call that fails has changed nothing: the caches of all layers and the sequence are as they
 * were.
 *
 * Structs that may grow begin with struct_size, the size that the program knows: their _init functions set it
 * and the defaults, and fields that a program does not know keep what the library did before them. A field
 * that the library does not know, and that is set, is an error. Strides count elements, or blocks where the
 * element comes in blocks.
 *
 * A plan is shared by all threads; a sequence belongs to one thread at a time. */
#ifndef COMPRESSKV_H
#define COMPRESSKV_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum ckv_status {
  CKV_OK = 0,
  CKV_BAD_ARGUMENT = 1, /* a value outside its bounds, or things that do not fit each other */
  CKV_BAD_SCORE = 2,    /* keys, queries or attention hold NaN or infinite values */
  CKV_NO_MEMORY = 3,
  CKV_FAILED = 4 /* anything else */
} ckv_status;

/* What went wrong in the last call of this thread that failed: argument, value, bound, what to do. Never
 * NULL; valid until the thread's next call that fails. */
const char* ckv_last_error(void);

/* ---- plans ------------------------------------------------------------------------------------------ */

typedef struct ckv_model {
  size_t layers;
  size_t query_heads;
  size_t kv_heads; /* divides query_heads */
  size_t head_dim; /* elements of one key or value row */
  size_t
      kv_row_bytes; /* bytes of one K and one V row of one KV head; 0: not given (budgets in bytes need it) */
} ckv_model;

typedef enum ckv_budget {
  CKV_BUDGET_RATIO = 0, /* budget_ratio: share of the prompt that is kept, in (0, 1] */
  CKV_BUDGET_ROWS = 1,  /* budget_amount: mean rows a layer */
  CKV_BUDGET_BYTES = 2  /* budget_amount: bytes of all layers */
} ckv_budget;

typedef enum ckv_pool {
  CKV_POOL_AVERAGE = 0,
  CKV_POOL_MAX = 1,
  CKV_POOL_TRAILING = 2, /* average of a token and those before it */
  CKV_POOL_OF_METHOD = 3 /* the method's own */
} ckv_pool;

typedef enum ckv_element {
  CKV_F32 = 0,
  CKV_F16 = 1,
  CKV_BF16 = 2,
  CKV_Q8_0 = 3, /* ggml's blocks of 32 */
  CKV_Q4_0 = 4,
  CKV_INT8 = 5 /* with a scale and a zero point a row: element = scale * (quant - zero); rows side by side */
} ckv_element;

/* What a method is made from. Options that a method does not have are ignored. Arrays are copied. */
typedef struct ckv_settings {
  size_t struct_size; /* set by ckv_settings_init */
  ckv_budget budget;
  double budget_ratio;
  size_t budget_amount;
  const uint32_t* ranking; /* [layer][ranked_heads], query heads, best first; NULL: none */
  size_t ranked_heads;
  const double*
      scores; /* [layer][query_head], raw head scores; NULL: none. Where no ranking is given they give one */
  const double* layer_errors; /* [layer], for error-aware budgets; NULL: every layer the same */
  size_t min_rows;            /* of error-aware budgets; 0: the library's choice */
  size_t heads_per_layer;
  size_t window; /* 0: the method's own */
  ckv_pool pool;
  size_t pool_width;  /* 0: the method's own */
  uint64_t seed;      /* of random */
  float decay;        /* of carried and blend-carried */
  size_t hold_layers; /* of carried and blend-carried */
  size_t model_heads; /* of model-wide and blend */
  int equal_weights;  /* of carried and model-wide */
  size_t sinks;       /* of both blends, lagkv, cur, kvzip, kvzip-plus and kvzap: first positions that stay */
  double model_share; /* of both blends: share of the rows that the whole model chooses, 0 to 1 */
  size_t lag;         /* of lagkv: rows of a stretch */
  size_t block;       /* of cur: rows that lengths are shared out among */
  size_t chunk;       /* of chunkkv: positions of a chunk */
  const char* query_statistics; /* path of the file that calibration wrote, for expected-attention, q-filter
                                   and triattention, read by ckv_plan_create; NULL: none */
  /* Of criticalkv and kvzip-plus: the model's output projections, [layer], each [hidden][query_head][dim] of
   * output_element, which is CKV_F32, CKV_F16 or CKV_BF16; NULL: none. The list is copied, the weights are
   * not: they outlive plan and sequences. */
  const void* const* output_weights;
  ckv_element output_element;
  size_t hidden; /* elements of the hidden state */
  const double* kv_scores; /* [layer][kv_head], scores of KV heads, for kvzip-heads; NULL: none */
  size_t head_sinks;       /* of duoattention and kvzip-heads: first and most recent tokens of heads that do */
  size_t head_recent;      /* not keep all */
  const char* surrogate; /* path of the file that calibration wrote, for kvzap; NULL: none */
  float score_threshold; /* of kvzap: lowest score of a row that stays, the budget being what a KV head
                            keeps at most, and the method's own window 128; -INFINITY, the default: the budget
                            alone */
  float lambda;                 /* of rkv: weight of attention, 0 to 1; the rest is that of redundancy */
  float threshold;              /* of rkv: cosine above which keys are alike, 0 to below 1 */
} ckv_settings;

/* The defaults: everything is kept. Writes `struct_size` bytes, which is the size that the program knows;
 * other languages call this one. */
void ckv_settings_init_sized(ckv_settings* settings, size_t struct_size);
static inline void ckv_settings_init(ckv_settings* settings) {
  ckv_settings_init_sized(settings, sizeof *settings);
}

typedef struct ckv_plan ckv_plan;

/* `method` is a name of the library's table: full, compresskv, snapkv, ...; a wrong one lists them all. On
 * failure *plan is NULL. */
ckv_status ckv_plan_create(const ckv_model* model, const char* method, const ckv_settings* settings,
                           ckv_plan** plan);
/* NULL is allowed. Sequences made from the plan go on. */
void ckv_plan_free(ckv_plan* plan);
/* Queries of each layer that observe and whose rows are always kept. */
size_t ckv_plan_window(const ckv_plan* plan);
/* Whether ckv_arrive needs an observation (of rkv: queries), and whether it may shrink layers before the one
 * that arrives. */
int ckv_plan_needs_attention(const ckv_plan* plan);
int ckv_plan_reaches_back(const ckv_plan* plan);
/* Whether the engine feeds the context once more (kvzip, kvzip-plus): ckv_observe in place of ckv_arrive. */
int ckv_plan_repeats(const ckv_plan* plan);
/* Whether ckv_arrive needs hidden states (kvzap): CKV_SHOWS_HIDDEN_STATES. */
int ckv_plan_needs_hidden_states(const ckv_plan* plan);

/* ---- what a layer holds ----------------------------------------------------------------------------- */

/* Keys or values of a layer:
 *
 *     unit u of row r of KV head h  =  data[h * head_stride + r * row_stride
 *                                           + (u / chunk) * chunk_stride + u % chunk]
 *
 * A row that lies side by side has chunk 0. Transposed, [kv_head][dim][row]: row_stride 1, chunk 1,
 * chunk_stride the rows allocated. */
typedef struct ckv_rows {
  ckv_element element;
  void* data;
  size_t head_stride; /* in paged caches within one block */
  size_t row_stride;
  size_t chunk;
  size_t chunk_stride;
  float* scales; /* of CKV_INT8: [kv_head][allocated_rows], as are zeros */
  float* zeros;
} ckv_rows;

typedef struct ckv_kv {
  size_t struct_size; /* set by the library */
  ckv_rows keys;
  ckv_rows values;
  size_t rows;             /* in use now */
  size_t allocated_rows;   /* rows that the memory has room for; 0: as many as rows */
  const size_t* head_rows; /* [kv_head], rows in use where KV heads differ, in place of `rows`; or NULL */
  /* Paged caches, keys and values of one element type, not CKV_INT8: blocks of block_rows rows, `table` names
   * those of this sequence in row order. NULL: one buffer. */
  const int32_t* table;
  size_t table_size;
  size_t block_rows;
  size_t pool_blocks;
  size_t key_block_stride; /* 0: block after block */
  size_t value_block_stride;
  /* [pool_blocks], how many sequences use a block; NULL: this one alone. A block that others use and that
   * would be written is an error. Beams and shared prefixes need it. */
  const int32_t* references;
} ckv_kv;

/* Fills *kv, in which all is 0 but struct_size, with what layer `layer` holds now. Write no field beyond
 * kv->struct_size. Anything but CKV_OK ends the call that asked, with that status.
 *
 * What *kv points to (head_rows, table, references) must live until the call that asked returns: views
 * of several layers are held at once, so give each layer arrays of its own. The function returns: it neither
 * jumps out, nor ends its thread, nor calls with the same sequence. */
typedef ckv_status (*ckv_views)(void* context, size_t layer, ckv_kv* kv);

typedef enum ckv_shown {
  CKV_SHOWS_QUERIES = 0,   /* data: [query_head][query][dim], after rotary embedding */
  CKV_SHOWS_ATTENTION = 1, /* data: [query_head][query][token], after the softmax */
  CKV_SHOWS_SUMS = 2,      /* data: float, [query_head][token], attention summed over the queries */
  /* data: [token][hidden_size], what goes into the layer's attention, after the norm */
  CKV_SHOWS_HIDDEN_STATES = 3
} ckv_shown;

/* The last queries of a layer, how they attend, or its hidden states; the last belongs to the last row. */
typedef struct ckv_observation {
  size_t struct_size; /* set by ckv_observation_init */
  ckv_shown shown;
  ckv_element element; /* CKV_F32, CKV_F16 or CKV_BF16 */
  const void* data;
  size_t queries;
  size_t tokens;         /* of attention and sums: one column a cached row; of hidden states: how many */
  size_t head_stride;    /* of queries; 0 with query_stride 0: side by side */
  size_t query_stride;   /* of queries */
  float scale;           /* of the logits; 0: 1 / sqrt(head_dim) */
  float soft_cap;        /* c of c * tanh(logit / c); 0: none */
  size_t sliding_window; /* positions that a query sees; 0: all before it */
  const float* sinks;    /* [query_head]; NULL: none */
  /* Of kvzip-plus, to ckv_observe: [queries], length of the hidden state that the layer's attention was given
   * for each query, after the norm before attention; NULL: none. */
  const float* hidden_norms;
  size_t hidden_size;  /* of hidden states: elements of one */
  size_t token_stride; /* of hidden states; 0: side by side */
} ckv_observation;

void ckv_observation_init_sized(ckv_observation* observation, size_t struct_size);
static inline void ckv_observation_init(ckv_observation* observation) {
  ckv_observation_init_sized(observation, sizeof *observation);
}

/* ---- sequences -------------------------------------------------------------------------------------- */

typedef struct ckv_sequence ckv_sequence;

ckv_status ckv_sequence_create(const ckv_plan* plan, ckv_sequence** sequence);
/* A beam: the copy goes on on its own. */
ckv_status ckv_sequence_copy(const ckv_sequence* sequence, ckv_sequence** copy);
void ckv_sequence_free(ckv_sequence* sequence);

/* Tokens that no method may evict. */
typedef struct ckv_protection {
  size_t keep_first;
  size_t keep_last;
  const uint32_t* positions; /* others, ascending; copied */
  size_t count;
} ckv_protection;

/* Starts a sequence whose prompt has so many tokens; `protection` may be NULL. */
ckv_status ckv_begin(ckv_sequence* sequence, size_t prompt_tokens, const ckv_protection* protection);
/* Goes on: a new turn or chunk. `total_tokens` counts all tokens so far, evicted ones too. */
ckv_status ckv_begin_turn(ckv_sequence* sequence, size_t total_tokens, const ckv_protection* protection);
/* Takes back all tokens from `position` on. Shorten each layer to ckv_held_rows. */
ckv_status ckv_truncate(ckv_sequence* sequence, size_t position);

/* Layer `layer` has ended its prefill: it shrinks in place, and where the method reaches back layers before
 * it. *changed names the `*count` layers that were shrunk, until the sequence's next call (none where it
 * fails): shorten each to ckv_rows_kept. `observation` may be NULL where ckv_plan_needs_attention says so. */
ckv_status ckv_arrive(ckv_sequence* sequence, size_t layer, ckv_views views, void* context,
                      const ckv_observation* observation, const size_t** changed, size_t* count);
/* Shows tokens that repeat the context's tokens `first` to `last` - 1, where ckv_plan_repeats says so: after
 * the prefill, for each stretch in order and each layer, before ckv_finish. `views` gives the layer with the
 * rows of the tokens fed behind those of the context, `observation` the queries of the last of them; the
 * engine takes these rows back afterwards. */
ckv_status ckv_observe(ckv_sequence* sequence, size_t layer, ckv_views views, void* context, size_t first,
                       size_t last, const ckv_observation* observation);
/* After the last layer; for most methods *count is 0. */
ckv_status ckv_finish(ckv_sequence* sequence, ckv_views views, void* context, const size_t** changed,
                      size_t* count);

/* What the last compression left of a layer: rows, their true positions (ascending; at most `capacity` are
 * written, *count is how many there are), and the position where the sequence went on. */
ckv_status ckv_rows_kept(const ckv_sequence* sequence, size_t layer, size_t kv_head, size_t* rows);
ckv_status ckv_positions_kept(const ckv_sequence* sequence, size_t layer, size_t kv_head, uint32_t* positions,
                              size_t capacity, size_t* count);
ckv_status ckv_next_position(const ckv_sequence* sequence, size_t layer, size_t* position);
/* Rows that the layer holds when the sequence has `tokens` tokens, those appended since included. */
ckv_status ckv_held_rows(const ckv_sequence* sequence, size_t tokens, size_t layer, size_t kv_head,
                         size_t* rows);
/* Rows that a KV head of the layer may keep, as of the last begin; of duoattention and kvzip-heads the head
 * that may keep most. */
ckv_status ckv_capacity(const ckv_sequence* sequence, size_t layer, size_t* rows);
/* Bytes of scratch and of positions held. */
size_t ckv_memory_bytes(const ckv_sequence* sequence);

/* ---- saving a sequence ------------------------------------------------------------------------------ */

/* What a sequence was compressed with, beside what its plan says itself (model, method's name, window,
 * budget): texts of the program's that are saved with it, and that whoever loads it must give again. NULL:
 * empty. */
typedef struct ckv_made_with {
  const char* settings;    /* the method's other settings */
  const char* calibration; /* digests of what was measured of the model */
} ckv_made_with;

/* Writes what the sequence remembers to `bytes`, between turns; the program saves the rows of its cache
 * beside it, in order. *size is how many bytes it takes. Where `capacity` is below that none is written: with
 * capacity 0 (`bytes` may be NULL) the call only asks, any other is an error. `made` may be NULL. */
ckv_status ckv_save(const ckv_sequence* sequence, const ckv_made_with* made, void* bytes, size_t capacity,
                    size_t* size);
/* Takes up a sequence that was saved, in place of the one at hand: from here on every call gives what it
 * would have given to the sequence that was saved. `bytes` are all that ckv_save wrote, wherever they lie.
 * CKV_BAD_ARGUMENT where it is that of another model, method, window, budget or `made`; CKV_FAILED where its
 * bytes are damaged, cut off or of another version. */
ckv_status ckv_load(ckv_sequence* sequence, const ckv_made_with* made, const void* bytes, size_t size);

#ifdef __cplusplus
}
#endif

#endif
