/* The library from C: every method over one cache, wrong calls by their texts. */

#include <compresskv/compresskv.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { layers = 3, query_heads = 4, kv_heads = 2, head_dim = 32, tokens = 100, window = 8, budget = 24 };
enum { head_floats = tokens * head_dim, layer_floats = kv_heads * head_floats };

static float keys[layers * layer_floats];
static float values[layers * layer_floats];
static float queries[layers * query_heads * tokens * head_dim];
static size_t rows[layers][kv_heads];
static int failures = 0;

static void check(int holds, const char* what, int line) {
  if (!holds) {
    ++failures;
    fprintf(stderr, "line %d: %s; last error: %s\n", line, what, ckv_last_error());
  }
}
#define CHECK(holds) check((holds) ? 1 : 0, #holds, __LINE__)
#define CHECK_FAILS(call, status, part)            \
  do {                                             \
    CHECK((call) == (status));                     \
    CHECK(strstr(ckv_last_error(), part) != NULL); \
  } while (0)

static float next_number(void) {
  static unsigned state = 1;
  state = state * 1664525U + 1013904223U;
  return (float)(state >> 8U) / 8388608.0F - 1.0F;
}

static void fill(void) {
  for (size_t i = 0; i < sizeof(keys) / sizeof(*keys); ++i) {
    keys[i] = next_number();
    values[i] = next_number();
  }
  for (size_t i = 0; i < sizeof(queries) / sizeof(*queries); ++i) queries[i] = 4.0F * next_number();
  for (size_t l = 0; l < layers; ++l) {
    for (size_t h = 0; h < kv_heads; ++h) rows[l][h] = tokens;
  }
}

static ckv_status view_of(void* context, size_t layer, ckv_kv* kv) {
  if (context != NULL) return CKV_FAILED;
  kv->keys.element = CKV_F32;
  kv->keys.data = keys + layer * layer_floats;
  kv->keys.head_stride = head_floats;
  kv->keys.row_stride = head_dim;
  kv->values = kv->keys;
  kv->values.data = values + layer * layer_floats;
  kv->allocated_rows = tokens;
  kv->head_rows = rows[layer];
  return CKV_OK;
}

static ckv_observation queries_of(size_t layer, size_t count) {
  ckv_observation shown;
  ckv_observation_init(&shown);
  shown.shown = CKV_SHOWS_QUERIES;
  shown.element = CKV_F32;
  shown.data = queries + layer * query_heads * tokens * head_dim;
  shown.queries = count;
  return shown;
}

/* Shortens the layers that a call has shrunk; their values are those of the positions kept. */
static void shorten(const ckv_sequence* sequence, const size_t* changed, size_t count,
                    const float* original) {
  for (size_t i = 0; i < count; ++i) {
    const size_t l = changed[i];
    for (size_t h = 0; h < kv_heads; ++h) {
      uint32_t positions[tokens];
      size_t kept = 0;
      CHECK(ckv_rows_kept(sequence, l, h, &rows[l][h]) == CKV_OK);
      CHECK(ckv_positions_kept(sequence, l, h, positions, tokens, &kept) == CKV_OK);
      CHECK(kept == rows[l][h] && kept <= tokens);
      for (size_t r = 0; r < kept; ++r) {
        CHECK(r == 0 || positions[r] > positions[r - 1]);
        CHECK(memcmp(values + l * layer_floats + h * head_floats + r * head_dim,
                     original + l * layer_floats + h * head_floats + positions[r] * head_dim,
                     head_dim * sizeof(float)) == 0);
      }
    }
  }
}

static const ckv_model model = {layers, query_heads, kv_heads, head_dim, 0};

static void run_method(const char* method) {
  static float original[layers * layer_floats];
  uint32_t ranking[layers * query_heads];
  double scores[layers * query_heads];
  ckv_settings settings;
  ckv_plan* plan = NULL;
  ckv_sequence* sequence = NULL;
  const size_t* changed = NULL;
  size_t count = 0;
  size_t total = 0;

  fill();
  memcpy(original, values, sizeof(values));
  for (uint32_t i = 0; i < layers * query_heads; ++i) {
    ranking[i] = i % query_heads;
    scores[i] = 1.0 + (double)(i % 5);
  }
  ckv_settings_init(&settings);
  settings.budget = CKV_BUDGET_ROWS;
  settings.budget_amount = budget;
  settings.window = window;
  settings.ranking = ranking;
  settings.ranked_heads = query_heads;
  settings.scores = scores;
  settings.model_heads = 4;
  CHECK(ckv_plan_create(&model, method, &settings, &plan) == CKV_OK);
  CHECK(ckv_sequence_create(plan, &sequence) == CKV_OK);
  if (sequence == NULL) return;
  ckv_plan_free(plan); /* the sequence goes on */
  CHECK(ckv_begin(sequence, tokens, NULL) == CKV_OK);
  for (size_t l = 0; l < layers; ++l) {
    const ckv_observation shown = queries_of(l, tokens);
    CHECK(ckv_arrive(sequence, l, view_of, NULL, &shown, &changed, &count) == CKV_OK);
    shorten(sequence, changed, count, original);
  }
  CHECK(ckv_finish(sequence, view_of, NULL, &changed, &count) == CKV_OK);
  CHECK((count == layers) == (strcmp(method, "model-wide") == 0));
  shorten(sequence, changed, count, original);
  for (size_t l = 0; l < layers; ++l) {
    size_t position = 0;
    size_t held = 0;
    CHECK(ckv_next_position(sequence, l, &position) == CKV_OK && position == tokens);
    CHECK(ckv_held_rows(sequence, tokens + 3, l, 0, &held) == CKV_OK && held == rows[l][0] + 3);
    for (size_t h = 0; h < kv_heads; ++h) total += rows[l][h];
  }
  CHECK(total == (strcmp(method, "full") == 0 ? (size_t)(layers * kv_heads * tokens)
                                              : (size_t)(layers * kv_heads * budget)));
  ckv_sequence_free(sequence);
}

static void wrong_calls(void) {
  ckv_settings settings;
  ckv_plan* plan = NULL;
  ckv_sequence* sequence = NULL;
  ckv_sequence* copy = NULL;
  const size_t* changed = NULL;
  size_t count = 0;
  size_t number = 0;
  ckv_observation shown = queries_of(0, window);
  int context = 0;

  fill();
  ckv_settings_init(&settings);
  CHECK_FAILS(ckv_plan_create(&model, "snapvk", &settings, &plan), CKV_BAD_ARGUMENT,
              "must be one of full, compresskv");
  CHECK(plan == NULL);
  CHECK_FAILS(ckv_plan_create(&model, "compresskv", &settings, &plan), CKV_BAD_ARGUMENT,
              "needs a head ranking");
  CHECK_FAILS(ckv_plan_create(NULL, "snapkv", &settings, &plan), CKV_BAD_ARGUMENT, "model is NULL");
  CHECK_FAILS(ckv_plan_create(&model, "snapkv", NULL, &plan), CKV_BAD_ARGUMENT, "ckv_settings is NULL");
  settings.budget_ratio = 2.0;
  CHECK_FAILS(ckv_plan_create(&model, "snapkv", &settings, &plan), CKV_BAD_ARGUMENT, "budget ratio is 2");
  settings.budget_ratio = 0.25;
  settings.struct_size = 0;
  CHECK_FAILS(ckv_plan_create(&model, "snapkv", &settings, &plan), CKV_BAD_ARGUMENT, "struct_size is 0");
  /* A program built when the struct ended after the budget: the rest has its defaults. */
  settings.struct_size = offsetof(ckv_settings, ranking);
  settings.window = 0;
  CHECK(ckv_plan_create(&model, "snapkv", &settings, &plan) == CKV_OK);
  CHECK(ckv_plan_window(plan) == window && ckv_plan_needs_attention(plan) == 1 &&
        ckv_plan_reaches_back(plan) == 0);

  CHECK(ckv_sequence_create(plan, &sequence) == CKV_OK);
  CHECK_FAILS(ckv_arrive(sequence, 0, view_of, NULL, &shown, &changed, &count), CKV_BAD_ARGUMENT,
              "begin() was not called");
  CHECK_FAILS(ckv_begin(sequence, 0, NULL), CKV_BAD_ARGUMENT, "prompt_tokens is 0");
  CHECK(ckv_begin(sequence, tokens, NULL) == CKV_OK);
  CHECK_FAILS(ckv_arrive(sequence, 0, view_of, NULL, NULL, &changed, &count), CKV_BAD_ARGUMENT,
              "needs the window's attention");
  CHECK_FAILS(ckv_arrive(sequence, 7, view_of, NULL, &shown, &changed, &count), CKV_BAD_ARGUMENT,
              "layer is 7");
  CHECK_FAILS(ckv_arrive(sequence, 0, view_of, &context, &shown, &changed, &count), CKV_FAILED, "views()");
  rows[0][1] = tokens - 1;
  CHECK_FAILS(ckv_arrive(sequence, 0, view_of, NULL, &shown, &changed, &count), CKV_BAD_ARGUMENT,
              "KV head 1");
  rows[0][1] = tokens;
  keys[5] = NAN;
  CHECK_FAILS(ckv_arrive(sequence, 0, view_of, NULL, &shown, &changed, &count), CKV_BAD_SCORE, "NaN");
  keys[5] = 0.0F;
  CHECK(ckv_sequence_copy(sequence, &copy) == CKV_OK);
  CHECK(ckv_arrive(sequence, 0, view_of, NULL, &shown, &changed, &count) == CKV_OK && count == 1 &&
        changed[0] == 0);
  CHECK(ckv_rows_kept(sequence, 0, 0, &number) == CKV_OK && number == tokens / 4);
  CHECK(ckv_capacity(sequence, 0, &number) == CKV_OK && number == tokens / 4);
  CHECK(ckv_rows_kept(copy, 0, 0, &number) == CKV_OK && number == tokens);
  CHECK_FAILS(ckv_truncate(sequence, 0), CKV_BAD_ARGUMENT, "truncate position is 0");
  CHECK(ckv_truncate(copy, 50) == CKV_OK && ckv_held_rows(copy, 50, 0, 0, &number) == CKV_OK && number == 50);
  CHECK_FAILS(ckv_begin_turn(sequence, 3, NULL), CKV_BAD_ARGUMENT, "total_tokens is 3");
  CHECK(ckv_memory_bytes(sequence) > 0);
  ckv_sequence_free(copy);
  ckv_sequence_free(sequence);
  ckv_sequence_free(NULL);
  ckv_plan_free(plan);
  ckv_plan_free(NULL);
}

int main(void) {
  static const char* const methods[] = {"full",
                                        "compresskv",
                                        "compresskv-grouped",
                                        "compresskv-adaptive",
                                        "snapkv",
                                        "pyramidkv",
                                        "adakv",
                                        "cake",
                                        "h2o",
                                        "tova",
                                        "knorm",
                                        "keydiff",
                                        "streaming",
                                        "random",
                                        "carried",
                                        "model-wide"};
  for (size_t i = 0; i < sizeof(methods) / sizeof(*methods); ++i) {
    const int before = failures;
    run_method(methods[i]);
    if (failures > before) fprintf(stderr, "method %s\n", methods[i]);
  }
  wrong_calls();
  if (failures == 0) puts("the C API does what compresskv.h says");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
