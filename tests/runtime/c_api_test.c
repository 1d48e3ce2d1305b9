/* The library from C: every method over one cache, wrong calls by their texts. */

#include <compresskv/compresskv.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
  layers = 3,
  query_heads = 4,
  kv_heads = 2,
  head_dim = 32,
  tokens = 100,
  window = 8,
  budget = 24,
  repeated = 12
};
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

static const char* const statistics_file = "c_api_test_statistics.bin";

/* Adds the `bytes` lowest bytes of a number, as the file of query statistics has them. */
static void add_bytes(FILE* file, uint64_t number, unsigned bytes, uint64_t* hash) {
  for (unsigned i = 0; i < bytes; ++i) {
    const unsigned char byte = (unsigned char)(number >> (8U * i) & 0xFFU);
    *hash = (*hash ^ byte) * 0x100000001b3U;
    CHECK(fputc(byte, file) == byte);
  }
}

static void add_float(FILE* file, float number, uint64_t* hash) {
  uint32_t bits;
  memcpy(&bits, &number, sizeof(bits));
  add_bytes(file, bits, 4, hash);
}

/* Query statistics by the form that is written down: of heads whose queries are all alike. */
static void write_statistics(void) {
  const uint32_t numbers[] = {1, layers, query_heads, head_dim, head_dim, 0, 0};
  const double rotation[] = {10000.0, 1.0};
  const char* const magic = "ckvqstat";
  uint64_t hash = 0xcbf29ce484222325U;
  uint64_t unused = 0;
  FILE* const file = fopen(statistics_file, "wb");
  CHECK(file != NULL);
  if (file == NULL) return;
  for (size_t i = 0; i < 8; ++i) add_bytes(file, (unsigned char)magic[i], 1, &hash);
  for (size_t i = 0; i < sizeof(numbers) / sizeof(*numbers); ++i) add_bytes(file, numbers[i], 4, &hash);
  for (size_t i = 0; i < 2; ++i) {
    uint64_t bits;
    memcpy(&bits, &rotation[i], sizeof(bits));
    add_bytes(file, bits, 8, &hash);
  }
  for (size_t h = 0; h < (size_t)layers * query_heads; ++h) {
    float mean[head_dim];
    add_bytes(file, 1, 8, &hash);
    for (size_t e = 0; e < head_dim; ++e) {
      mean[e] = next_number();
      add_float(file, mean[e], &hash);
    }
    for (size_t j = 0; j < head_dim / 2; ++j) {
      add_float(file, sqrtf(mean[j] * mean[j] + mean[j + head_dim / 2] * mean[j + head_dim / 2]), &hash);
    }
    for (size_t i = 0; i < (size_t)head_dim * (head_dim + 1) / 2; ++i) add_float(file, 0.0F, &hash);
  }
  add_bytes(file, hash, 8, &unused);
  CHECK(fclose(file) == 0);
}

enum { saved_room = 4096 };

/* Two sequences remember the same. */
static void check_same(const ckv_sequence* a, const ckv_sequence* b) {
  for (size_t l = 0; l < layers; ++l) {
    size_t numbers[2] = {0, 1};
    CHECK(ckv_next_position(a, l, &numbers[0]) == CKV_OK && ckv_next_position(b, l, &numbers[1]) == CKV_OK);
    CHECK(numbers[0] == numbers[1]);
    CHECK(ckv_capacity(a, l, &numbers[0]) == CKV_OK && ckv_capacity(b, l, &numbers[1]) == CKV_OK);
    CHECK(numbers[0] == numbers[1]);
    for (size_t h = 0; h < kv_heads; ++h) {
      uint32_t positions[2][tokens];
      CHECK(ckv_positions_kept(a, l, h, positions[0], tokens, &numbers[0]) == CKV_OK);
      CHECK(ckv_positions_kept(b, l, h, positions[1], tokens, &numbers[1]) == CKV_OK);
      CHECK(numbers[0] == numbers[1] && numbers[0] <= tokens);
      CHECK(memcmp(positions[0], positions[1], numbers[0] * sizeof(uint32_t)) == 0);
    }
  }
}

/* Saved, loaded by a sequence of another plan that is made the same way, and saved again. */
static void save_and_load(const ckv_sequence* sequence, const char* method, const ckv_settings* settings) {
  static unsigned char bytes[saved_room];
  static unsigned char again[saved_room];
  ckv_plan* plan = NULL;
  ckv_sequence* loaded = NULL;
  size_t size = 0;
  size_t asked = 0;
  CHECK(ckv_plan_create(&model, method, settings, &plan) == CKV_OK);
  CHECK(ckv_sequence_create(plan, &loaded) == CKV_OK);
  CHECK(ckv_save(sequence, NULL, NULL, 0, &asked) == CKV_OK && asked > 0 && asked < saved_room);
  memset(bytes, 0xAB, sizeof(bytes));
  CHECK(ckv_save(sequence, NULL, bytes, saved_room, &size) == CKV_OK && size == asked && bytes[size] == 0xAB);
  CHECK(ckv_load(loaded, NULL, bytes, size) == CKV_OK);
  check_same(sequence, loaded);
  CHECK(ckv_save(loaded, NULL, again, size, &asked) == CKV_OK && asked == size);
  CHECK(memcmp(bytes, again, size) == 0);
  ckv_sequence_free(loaded);
  ckv_plan_free(plan);
}

/* The same output projection in all layers. */
enum { hidden = 12 };
static float outputs[hidden * query_heads * head_dim];
static const void* output_weights[layers];
static float hidden_norms[repeated];
static void fill_outputs(void) {
  for (size_t i = 0; i < sizeof(outputs) / sizeof(*outputs); ++i) outputs[i] = next_number();
  for (size_t i = 0; i < repeated; ++i) hidden_norms[i] = 1.0F + (float)(i % 3);
  for (size_t l = 0; l < layers; ++l) output_weights[l] = outputs;
}

static const char* const surrogate_file = "c_api_test_surrogate.bin";

enum { hidden_size = 8 };

/* What goes into the attention of every layer. */
static float hidden_states[tokens * hidden_size];

/* A surrogate by the form that is written down. */
static void write_surrogate(void) {
  const uint32_t numbers[] = {1, layers, kv_heads, hidden_size};
  const char* const magic = "ckvsurro";
  uint64_t hash = 0xcbf29ce484222325U;
  uint64_t unused = 0;
  FILE* const file = fopen(surrogate_file, "wb");
  CHECK(file != NULL);
  if (file == NULL) return;
  for (size_t i = 0; i < 8; ++i) add_bytes(file, (unsigned char)magic[i], 1, &hash);
  for (size_t i = 0; i < sizeof(numbers) / sizeof(*numbers); ++i) add_bytes(file, numbers[i], 4, &hash);
  for (size_t i = 0; i < (size_t)layers * kv_heads * (hidden_size + 1); ++i)
    add_float(file, next_number(), &hash);
  add_bytes(file, hash, 8, &unused);
  CHECK(fclose(file) == 0);
  for (size_t i = 0; i < (size_t)tokens * hidden_size; ++i) hidden_states[i] = next_number();
}

static ckv_observation states_of(size_t count) {
  ckv_observation shown;
  ckv_observation_init(&shown);
  shown.shown = CKV_SHOWS_HIDDEN_STATES;
  shown.element = CKV_F32;
  shown.data = hidden_states;
  shown.tokens = count;
  shown.hidden_size = hidden_size;
  return shown;
}

static void run_method(const char* method) {
  static float original[layers * layer_floats];
  uint32_t ranking[layers * query_heads];
  double scores[layers * query_heads];
  double kv_scores[layers * kv_heads];
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
  for (uint32_t i = 0; i < layers * kv_heads; ++i) kv_scores[i] = (double)(i % 3);
  ckv_settings_init(&settings);
  CHECK(settings.head_sinks == 128 && settings.head_recent == 256);
  settings.kv_scores = kv_scores;
  settings.budget = CKV_BUDGET_ROWS;
  settings.budget_amount = budget;
  settings.window = window;
  settings.ranking = ranking;
  settings.ranked_heads = query_heads;
  settings.scores = scores;
  settings.query_statistics = statistics_file;
  settings.output_weights = output_weights;
  settings.output_element = CKV_F32;
  settings.hidden = hidden;
  settings.surrogate = surrogate_file;
  settings.model_heads = 4;
  CHECK(ckv_plan_create(&model, method, &settings, &plan) == CKV_OK);
  CHECK(ckv_sequence_create(plan, &sequence) == CKV_OK);
  if (sequence == NULL) return;
  const int repeats = ckv_plan_repeats(plan);
  const size_t prompt = repeats ? tokens - repeated : tokens;
  CHECK(repeats == (strcmp(method, "kvzip") == 0 || strcmp(method, "kvzip-plus") == 0));
  const int by_states = ckv_plan_needs_hidden_states(plan);
  CHECK(by_states == (strcmp(method, "kvzap") == 0));
  ckv_plan_free(plan); /* the sequence goes on */
  CHECK(ckv_begin(sequence, prompt, NULL) == CKV_OK);
  if (strcmp(method, "kvzip-heads") == 0) { /* layer 1 has the first of the best heads, which may keep more */
    size_t rows_of_best = 0;
    CHECK(ckv_capacity(sequence, 1, &rows_of_best) == CKV_OK && rows_of_best > budget);
  }
  for (size_t l = 0; l < layers; ++l) {
    ckv_observation shown = by_states ? states_of(tokens) : queries_of(l, repeats ? repeated : tokens);
    if (repeats) { /* the last rows are those of tokens that repeat the others */
      CHECK_FAILS(ckv_arrive(sequence, l, view_of, NULL, &shown, &changed, &count), CKV_BAD_ARGUMENT,
                  "call observe()");
      if (strcmp(method, "kvzip-plus") == 0) {
        CHECK_FAILS(ckv_observe(sequence, l, view_of, NULL, 0, prompt, &shown), CKV_BAD_ARGUMENT,
                    "was shown no hidden_norms");
        shown.hidden_norms = hidden_norms;
      }
      CHECK(ckv_observe(sequence, l, view_of, NULL, 0, prompt, &shown) == CKV_OK);
      for (size_t h = 0; h < kv_heads; ++h) rows[l][h] = prompt; /* taken back */
    } else {
      CHECK_FAILS(ckv_observe(sequence, l, view_of, NULL, 0, prompt, &shown), CKV_BAD_ARGUMENT,
                  "does not ask for the context to be repeated");
      CHECK(ckv_arrive(sequence, l, view_of, NULL, &shown, &changed, &count) == CKV_OK);
      shorten(sequence, changed, count, original);
    }
  }
  CHECK(ckv_finish(sequence, view_of, NULL, &changed, &count) == CKV_OK);
  CHECK((count == layers) == (repeats || strcmp(method, "model-wide") == 0 || strcmp(method, "blend") == 0));
  shorten(sequence, changed, count, original);
  for (size_t l = 0; l < layers; ++l) {
    size_t position = 0;
    size_t held = 0;
    CHECK(ckv_next_position(sequence, l, &position) == CKV_OK && position == prompt);
    CHECK(ckv_held_rows(sequence, prompt + 3, l, 0, &held) == CKV_OK && held == rows[l][0] + 3);
    for (size_t h = 0; h < kv_heads; ++h) total += rows[l][h];
  }
  CHECK(total == (strcmp(method, "full") == 0 ? (size_t)(layers * kv_heads * tokens)
                                              : (size_t)(layers * kv_heads * budget)));
  save_and_load(sequence, method, &settings);
  ckv_sequence_free(sequence);
}

/* The same prompt in other elements and layouts keeps the same rows: all numbers are exact in 8 bits. */
static float exact(size_t i) { return (float)((i * 37U + i / 7U) % 15U) - 7.0F; }

enum { block_rows = 4, blocks = tokens / block_rows };

static uint16_t half_of(float x) { /* whole numbers from -7 to 7 */
  uint16_t sign = x < 0.0F ? 0x8000U : 0U;
  float size = x < 0.0F ? -x : x;
  unsigned exponent = 15U;
  if (size == 0.0F) return sign;
  while (size >= 2.0F) {
    size *= 0.5F;
    ++exponent;
  }
  return (uint16_t)(sign | exponent << 10U | (unsigned)((size - 1.0F) * 1024.0F));
}
static uint16_t bfloat16_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return (uint16_t)(bits >> 16U);
}

typedef struct stored {
  ckv_element element;
  int paged;
  int transposed;
  void* keys;
  void* values;
  float* scales;
  float* zeros;
  int32_t* table;
  int32_t* references;
  size_t rows;
} stored;

/* Where an element of a row lies in a cache of one layer. */
static size_t place(const stored* s, size_t head, size_t row, size_t e) {
  if (s->paged) {
    const size_t block = (size_t)s->table[row / block_rows];
    return ((block * block_rows + row % block_rows) * kv_heads + head) * head_dim + e;
  }
  if (s->transposed) return (head * head_dim + e) * tokens + row;
  return (head * tokens + row) * head_dim + e;
}
static void put(const stored* s, void* memory, size_t at, float x) {
  if (s->element == CKV_F32) ((float*)memory)[at] = x;
  if (s->element == CKV_F16) ((uint16_t*)memory)[at] = half_of(x);
  if (s->element == CKV_BF16) ((uint16_t*)memory)[at] = bfloat16_of(x);
  if (s->element == CKV_INT8) ((int8_t*)memory)[at] = (int8_t)x;
}

static ckv_status view_of_stored(void* context, size_t layer, ckv_kv* kv) {
  const stored* s = &((const stored*)context)[layer];
  kv->keys.element = s->element;
  kv->keys.data = s->keys;
  kv->keys.head_stride = s->paged ? head_dim : head_floats;
  kv->keys.row_stride = s->paged ? kv_heads * head_dim : head_dim;
  if (s->transposed) {
    kv->keys.row_stride = 1;
    kv->keys.chunk = 1;
    kv->keys.chunk_stride = tokens;
  }
  kv->values = kv->keys;
  kv->values.data = s->values;
  if (s->element == CKV_INT8) {
    kv->keys.scales = s->scales;
    kv->keys.zeros = s->zeros;
    kv->values.scales = s->scales + kv_heads * tokens;
    kv->values.zeros = s->zeros + kv_heads * tokens;
  }
  kv->rows = s->rows;
  if (s->paged) {
    kv->table = s->table;
    kv->table_size = blocks;
    kv->block_rows = block_rows;
    kv->pool_blocks = blocks;
    kv->references = s->references;
  } else {
    kv->allocated_rows = tokens;
  }
  return CKV_OK;
}

static void store(stored* s, ckv_element element, int paged, int transposed, size_t layer) {
  s->element = element;
  s->paged = paged;
  s->transposed = transposed;
  s->keys = malloc(layer_floats * sizeof(float));
  s->values = malloc(layer_floats * sizeof(float));
  s->scales = malloc(2 * kv_heads * tokens * sizeof(float));
  s->zeros = malloc(2 * kv_heads * tokens * sizeof(float));
  s->table = malloc(blocks * sizeof(int32_t));
  s->references = malloc(blocks * sizeof(int32_t));
  s->rows = tokens;
  for (size_t i = 0; i < 2 * kv_heads * tokens; ++i) {
    s->scales[i] = 1.0F;
    s->zeros[i] = 0.0F;
  }
  for (size_t i = 0; i < blocks; ++i) {
    s->table[i] = (int32_t)(i * 7U % blocks);
    s->references[i] = 1;
  }
  for (size_t h = 0; h < kv_heads; ++h) {
    for (size_t r = 0; r < tokens; ++r) {
      for (size_t e = 0; e < head_dim; ++e) {
        const size_t i = ((layer * kv_heads + h) * tokens + r) * head_dim + e;
        put(s, s->keys, place(s, h, r, e), exact(i));
        put(s, s->values, place(s, h, r, e), exact(3 * i + 1));
      }
    }
  }
}
static void drop(stored* s) {
  free(s->keys);
  free(s->values);
  free(s->scales);
  free(s->zeros);
  free(s->table);
  free(s->references);
}

/* `method` shares its rows among the KV heads. Keeps what is found in `positions` of each layer. */
static void run_stored(const char* method, ckv_element element, int paged, int transposed,
                       uint32_t (*positions)[tokens]) {
  static float exact_queries[query_heads * window * head_dim];
  stored caches[layers];
  double scores[layers * query_heads];
  ckv_settings settings;
  ckv_plan* plan = NULL;
  ckv_sequence* sequence = NULL;
  ckv_observation shown;
  const size_t* changed = NULL;
  size_t count = 0;

  for (size_t i = 0; i < layers * query_heads; ++i) scores[i] = 1.0 + (double)(i % 5);
  for (size_t i = 0; i < sizeof(exact_queries) / sizeof(*exact_queries); ++i)
    exact_queries[i] = exact(5 * i + 2) / 8.0F;
  for (size_t l = 0; l < layers; ++l) store(&caches[l], element, paged, transposed, l);
  ckv_settings_init(&settings);
  settings.budget = CKV_BUDGET_ROWS;
  settings.budget_amount = budget;
  settings.window = window;
  settings.scores = scores;
  ckv_observation_init(&shown);
  shown.element = CKV_F32;
  shown.data = exact_queries;
  shown.queries = window;
  CHECK(ckv_plan_create(&model, method, &settings, &plan) == CKV_OK);
  CHECK(ckv_sequence_create(plan, &sequence) == CKV_OK);
  CHECK(ckv_begin(sequence, tokens, NULL) == CKV_OK);
  if (paged) { /* a block that another sequence uses is not written */
    for (size_t i = 0; i < blocks; ++i) caches[0].references[i] = 2;
    CHECK_FAILS(ckv_arrive(sequence, 0, view_of_stored, caches, &shown, &changed, &count), CKV_BAD_ARGUMENT,
                "block");
    CHECK(changed == NULL && count == 0);
    for (size_t i = 0; i < blocks; ++i) caches[0].references[i] = 1;
  }
  for (size_t l = 0; l < layers; ++l) {
    CHECK(ckv_arrive(sequence, l, view_of_stored, caches, &shown, &changed, &count) == CKV_OK);
    for (size_t i = 0; i < count; ++i) {
      size_t kept = 0;
      stored* s = &caches[changed[i]];
      CHECK(ckv_positions_kept(sequence, changed[i], 0, positions[changed[i]], tokens, &kept) == CKV_OK);
      s->rows = kept;
      for (size_t h = 0; h < kv_heads; ++h) {
        for (size_t r = 0; r < kept; ++r) {
          const size_t at = place(s, h, r, 3);
          const size_t from =
              ((changed[i] * kv_heads + h) * tokens + positions[changed[i]][r]) * head_dim + 3;
          unsigned char moved[sizeof(float)] = {0};
          const size_t bytes = element == CKV_F32 ? 4 : element == CKV_INT8 ? 1 : 2;
          put(s, moved, 0, exact(3 * from + 1));
          CHECK(memcmp(moved, (const unsigned char*)s->values + at * bytes, bytes) == 0);
        }
      }
    }
  }
  for (size_t l = 0; l < layers; ++l) CHECK(caches[l].rows == budget);
  for (size_t l = 0; l < layers; ++l) drop(&caches[l]);
  ckv_sequence_free(sequence);
  ckv_plan_free(plan);
}

static void elements_and_layouts(void) {
  static uint32_t expected[layers][tokens];
  static uint32_t found[layers][tokens];
  static const char* const shared[] = {"compresskv", "carried"};
  static const ckv_element elements[] = {CKV_F32, CKV_F16, CKV_BF16, CKV_INT8};
  for (size_t m = 0; m < 2; ++m) {
    run_stored(shared[m], CKV_F32, 0, 0, expected);
    for (size_t e = 0; e < 4; ++e) {
      for (int layout = 0; layout < 3; ++layout) {
        if (elements[e] == CKV_INT8 && layout > 0) continue; /* neither paged nor transposed */
        memset(found, 0, sizeof(found));
        run_stored(shared[m], elements[e], layout == 1, layout == 2, found);
        for (size_t l = 0; l < layers; ++l)
          CHECK(memcmp(found[l], expected[l], budget * sizeof(uint32_t)) == 0);
      }
    }
  }
}

/* Structs of programs that know less or more than the library. */
static void struct_sizes(void) {
  struct {
    ckv_settings settings;
    unsigned char behind[64];
  } larger;
  ckv_plan* plan = NULL;
  ckv_observation shown;
  memset(&larger, 0xAB, sizeof(larger));
  ckv_settings_init_sized(&larger.settings, offsetof(ckv_settings, ranking));
  CHECK(larger.settings.struct_size == offsetof(ckv_settings, ranking));
  CHECK(*((unsigned char*)&larger.settings + offsetof(ckv_settings, ranking)) == 0xAB);
  CHECK(larger.behind[0] == 0xAB);
  CHECK(ckv_plan_create(&model, "snapkv", &larger.settings, &plan) == CKV_OK);
  ckv_plan_free(plan);
  ckv_settings_init_sized(&larger.settings, sizeof(larger));
  CHECK(larger.settings.struct_size == sizeof(larger) && larger.behind[63] == 0);
  CHECK(ckv_plan_create(&model, "snapkv", &larger.settings, &plan) == CKV_OK);
  ckv_plan_free(plan);
  larger.behind[1] = 1;
  CHECK_FAILS(ckv_plan_create(&model, "snapkv", &larger.settings, &plan), CKV_BAD_ARGUMENT,
              "is set, this library");
  ckv_observation_init_sized(&shown, sizeof(shown));
  CHECK(shown.struct_size == sizeof(shown) && shown.data == NULL);
  ckv_settings_init_sized(NULL, 8);
  CHECK(ckv_plan_window(NULL) == 0 && ckv_plan_needs_attention(NULL) == 0 &&
        ckv_plan_reaches_back(NULL) == 0 && ckv_plan_repeats(NULL) == 0 &&
        ckv_plan_needs_hidden_states(NULL) == 0);
  CHECK(ckv_memory_bytes(NULL) == 0);
}

static ckv_status odd_view(void* context, size_t layer, ckv_kv* kv) {
  (void)view_of(NULL, layer, kv);
  if (*(const int*)context == 1) kv->keys.data = (unsigned char*)kv->keys.data + 2;
  if (*(const int*)context == 2) kv->block_rows = 16;
  if (*(const int*)context == 3) kv->values.element = (ckv_element)6;
  return CKV_OK;
}

/* Every row above the threshold stays, whatever is left of the budget. */
static void threshold(void) {
  ckv_settings settings;
  ckv_plan* plan = NULL;
  ckv_sequence* sequence = NULL;
  const size_t* changed = NULL;
  size_t count = 0;
  size_t kept[2] = {0, 0};
  for (int high = 0; high < 2; ++high) {
    fill();
    ckv_settings_init(&settings);
    settings.window = window;
    settings.surrogate = surrogate_file;
    settings.score_threshold = high ? 1e6F : 0.0F;
    CHECK(ckv_plan_create(&model, "kvzap", &settings, &plan) == CKV_OK);
    CHECK(ckv_sequence_create(plan, &sequence) == CKV_OK);
    ckv_plan_free(plan);
    if (sequence == NULL) return;
    CHECK(ckv_begin(sequence, tokens, NULL) == CKV_OK);
    ckv_observation shown = queries_of(0, tokens);
    CHECK_FAILS(ckv_arrive(sequence, 0, view_of, NULL, &shown, &changed, &count), CKV_BAD_ARGUMENT,
                "give HiddenStates");
    shown = states_of(tokens);
    shown.hidden_size = hidden_size - 1;
    CHECK_FAILS(ckv_arrive(sequence, 0, view_of, NULL, &shown, &changed, &count), CKV_BAD_ARGUMENT,
                "hidden states have 7 elements, the surrogate's have 8");
    shown.hidden_size = hidden_size;
    CHECK(ckv_arrive(sequence, 0, view_of, NULL, &shown, &changed, &count) == CKV_OK);
    CHECK(ckv_rows_kept(sequence, 0, 1, &kept[high]) == CKV_OK);
    ckv_sequence_free(sequence);
  }
  CHECK(kept[0] > window && kept[0] < tokens);
  CHECK(kept[1] == window + settings.sinks);
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
  CHECK_FAILS(ckv_plan_create(&model, "q-filter", &settings, &plan), CKV_BAD_ARGUMENT,
              "needs query statistics");
  CHECK_FAILS(ckv_plan_create(&model, "kvzap", &settings, &plan), CKV_BAD_ARGUMENT, "needs a surrogate");
  settings.surrogate = "no such surrogate";
  CHECK_FAILS(ckv_plan_create(&model, "kvzap", &settings, &plan), CKV_FAILED, "no such file: check the path");
  settings.surrogate = NULL;
  settings.query_statistics = "no such file";
  CHECK_FAILS(ckv_plan_create(&model, "q-filter", &settings, &plan), CKV_FAILED,
              "no such file: check the path");
  ckv_settings_init(&settings);
  settings.lambda = 2.0F;
  CHECK(ckv_plan_create(&model, "snapkv", &settings, &plan) == CKV_OK); /* it has none */
  ckv_plan_free(plan);
  CHECK_FAILS(ckv_plan_create(&model, "rkv", &settings, &plan), CKV_BAD_ARGUMENT, "lambda is 2");
  settings.lambda = 0.1F;
  settings.threshold = 1.0F;
  CHECK_FAILS(ckv_plan_create(&model, "rkv", &settings, &plan), CKV_BAD_ARGUMENT, "threshold is 1");
  /* A program that does not know them has the library's. */
  settings.struct_size = offsetof(ckv_settings, lambda);
  CHECK(ckv_plan_create(&model, "rkv", &settings, &plan) == CKV_OK);
  ckv_plan_free(plan);
  ckv_settings_init(&settings);
  CHECK_FAILS(ckv_plan_create(&model, "kvzip-plus", &settings, &plan), CKV_BAD_ARGUMENT,
              "needs output weights");
  settings.output_weights = output_weights;
  CHECK_FAILS(ckv_plan_create(&model, "kvzip-plus", &settings, &plan), CKV_BAD_ARGUMENT,
              "layers of 0 rows of");
  settings.hidden = hidden;
  settings.output_element = CKV_Q8_0;
  CHECK_FAILS(ckv_plan_create(&model, "kvzip-plus", &settings, &plan), CKV_BAD_ARGUMENT,
              "output_element is 3");
  settings.output_element = CKV_F32;
  output_weights[1] = NULL;
  CHECK_FAILS(ckv_plan_create(&model, "kvzip-plus", &settings, &plan), CKV_BAD_ARGUMENT,
              "output weights of layer 1 are null");
  output_weights[1] = outputs;
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
  settings.struct_size = (size_t)1 << 40;
  CHECK_FAILS(ckv_plan_create(&model, "snapkv", &settings, &plan), CKV_BAD_ARGUMENT,
              "struct_size is 1099511627776");
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
  context = 1;
  CHECK_FAILS(ckv_arrive(sequence, 0, odd_view, &context, &shown, &changed, &count), CKV_BAD_ARGUMENT,
              "keys do not lie at a multiple of 4 bytes");
  context = 2;
  CHECK_FAILS(ckv_arrive(sequence, 0, odd_view, &context, &shown, &changed, &count), CKV_BAD_ARGUMENT,
              "table is NULL");
  context = 3;
  CHECK_FAILS(ckv_arrive(sequence, 0, odd_view, &context, &shown, &changed, &count), CKV_BAD_ARGUMENT,
              "element is 6");
  CHECK_FAILS(ckv_arrive(NULL, 0, view_of, NULL, &shown, &changed, &count), CKV_BAD_ARGUMENT,
              "sequence is NULL");
  CHECK_FAILS(ckv_arrive(sequence, 0, NULL, NULL, &shown, &changed, &count), CKV_BAD_ARGUMENT,
              "views, changed");
  CHECK_FAILS(ckv_observe(sequence, 0, NULL, NULL, 0, 8, &shown), CKV_BAD_ARGUMENT, "views is NULL");
  CHECK_FAILS(ckv_rows_kept(sequence, 0, 999, &number), CKV_BAD_ARGUMENT, "kv_head is 999");
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

/* A turn that appends `appended` rows to every layer, of numbers of its own. */
static void next_turn(ckv_sequence* sequence, size_t appended) {
  const size_t* changed = NULL;
  size_t count = 0;
  for (size_t l = 0; l < layers; ++l) {
    for (size_t h = 0; h < kv_heads; ++h) {
      const size_t first = l * layer_floats + h * head_floats + rows[l][h] * head_dim;
      for (size_t i = first; i < first + appended * head_dim; ++i) {
        keys[i] = exact(i) / 8.0F;
        values[i] = exact(3 * i);
      }
      rows[l][h] += appended;
    }
  }
  CHECK(ckv_begin_turn(sequence, tokens + appended, NULL) == CKV_OK);
  for (size_t l = 0; l < layers; ++l) {
    const ckv_observation shown = queries_of(l, window);
    CHECK(ckv_arrive(sequence, l, view_of, NULL, &shown, &changed, &count) == CKV_OK);
    for (size_t h = 0; h < kv_heads; ++h) CHECK(ckv_rows_kept(sequence, l, h, &rows[l][h]) == CKV_OK);
  }
}

/* A sequence goes on as if it had not been saved; and what is refused. */
static void saving(void) {
  static unsigned char bytes[saved_room];
  static unsigned char damaged[saved_room];
  static float left[2][layers * layer_floats];
  static size_t left_rows[layers][kv_heads];
  const ckv_made_with made = {"pool 5", "sha256:1234"};
  const ckv_made_with other = {"pool 7", "sha256:1234"};
  const ckv_made_with none = {NULL, NULL};
  ckv_settings settings;
  ckv_plan* plan = NULL;
  ckv_plan* other_plan = NULL;
  ckv_sequence* sequence = NULL;
  ckv_sequence* loaded = NULL;
  ckv_sequence* other_method = NULL;
  const size_t* changed = NULL;
  size_t count = 0;
  size_t size = 99;

  fill();
  ckv_settings_init(&settings);
  settings.budget = CKV_BUDGET_ROWS;
  settings.budget_amount = budget;
  CHECK(ckv_plan_create(&model, "adakv", &settings, &plan) == CKV_OK);
  CHECK(ckv_plan_create(&model, "knorm", &settings, &other_plan) == CKV_OK);
  CHECK(ckv_sequence_create(plan, &sequence) == CKV_OK);
  CHECK(ckv_sequence_create(plan, &loaded) == CKV_OK);
  CHECK(ckv_sequence_create(other_plan, &other_method) == CKV_OK);
  CHECK_FAILS(ckv_save(sequence, &made, NULL, 0, &size), CKV_BAD_ARGUMENT, "begin() was not called");
  CHECK(size == 0);
  CHECK(ckv_begin(sequence, tokens, NULL) == CKV_OK);
  for (size_t l = 0; l < layers; ++l) {
    const ckv_observation shown = queries_of(l, window);
    CHECK(ckv_arrive(sequence, l, view_of, NULL, &shown, &changed, &count) == CKV_OK);
    for (size_t h = 0; h < kv_heads; ++h) CHECK(ckv_rows_kept(sequence, l, h, &rows[l][h]) == CKV_OK);
  }

  CHECK_FAILS(ckv_save(NULL, &made, bytes, saved_room, &size), CKV_BAD_ARGUMENT, "sequence is NULL");
  CHECK_FAILS(ckv_save(sequence, &made, bytes, saved_room, NULL), CKV_BAD_ARGUMENT, "size is NULL");
  CHECK_FAILS(ckv_save(sequence, &made, NULL, 8, &size), CKV_BAD_ARGUMENT, "bytes is NULL, capacity is 8");
  memset(bytes, 0xAB, sizeof(bytes));
  CHECK_FAILS(ckv_save(sequence, &made, bytes, 40, &size), CKV_BAD_ARGUMENT, "capacity is 40, the saved");
  CHECK(bytes[0] == 0xAB && size > 40);
  CHECK(ckv_save(sequence, &made, bytes, size, &size) == CKV_OK);

  CHECK(ckv_begin(loaded, 30, NULL) == CKV_OK);
  CHECK_FAILS(ckv_load(NULL, &made, bytes, size), CKV_BAD_ARGUMENT, "sequence is NULL");
  CHECK_FAILS(ckv_load(loaded, &made, NULL, 8), CKV_BAD_ARGUMENT, "bytes is NULL, size is 8");
  CHECK_FAILS(ckv_load(loaded, &made, NULL, 0), CKV_FAILED, "was cut off");
  CHECK_FAILS(ckv_load(loaded, &other, bytes, size), CKV_BAD_ARGUMENT,
              "method is 'adakv, pool 5', this plan's is 'adakv, pool 7'");
  CHECK_FAILS(ckv_load(loaded, &none, bytes, size), CKV_BAD_ARGUMENT, "method is 'adakv, pool 5'");
  CHECK_FAILS(ckv_load(other_method, &made, bytes, size), CKV_BAD_ARGUMENT, "this plan's is 'knorm, pool 5'");
  for (size_t i = 0; i < size; ++i) {
    CHECK(ckv_load(loaded, &made, bytes, i) == CKV_FAILED);
    memcpy(damaged, bytes, size);
    damaged[i] ^= 0x10U;
    CHECK(ckv_load(loaded, &made, damaged, size) == CKV_FAILED);
  }
  memcpy(damaged, bytes, size);
  CHECK_FAILS(ckv_load(loaded, &made, damaged, size + 3), CKV_FAILED, "has 3 bytes behind its end");
  CHECK(ckv_held_rows(loaded, 31, 0, 0, &count) == CKV_OK && count == 31); /* as it was */

  memcpy(left[0], keys, sizeof(keys));
  memcpy(left[1], values, sizeof(values));
  memcpy(left_rows, rows, sizeof(rows));
  CHECK(ckv_load(loaded, &made, bytes, size) == CKV_OK);
  check_same(sequence, loaded);
  next_turn(sequence, 17);
  memcpy(damaged, rows, sizeof(rows));
  memcpy(keys, left[0], sizeof(keys));
  memcpy(values, left[1], sizeof(values));
  memcpy(rows, left_rows, sizeof(rows));
  next_turn(loaded, 17);
  CHECK(memcmp(damaged, rows, sizeof(rows)) == 0);
  check_same(sequence, loaded);
  ckv_sequence_free(other_method);
  ckv_sequence_free(loaded);
  ckv_sequence_free(sequence);
  ckv_plan_free(other_plan);
  ckv_plan_free(plan);
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
                                        "lagkv",
                                        "cur",
                                        "chunkkv",
                                        "criticalkv",
                                        "streaming",
                                        "random",
                                        "carried",
                                        "model-wide",
                                        "blend",
                                        "blend-carried",
                                        "kvzip",
                                        "kvzip-plus",
                                        "expected-attention",
                                        "expected-attention-adaptive",
                                        "q-filter",
                                        "triattention",
                                        "rkv",
                                        "duoattention",
                                        "kvzip-heads",
                                        "kvzap"};
  write_statistics();
  fill_outputs();
  write_surrogate();
  for (size_t i = 0; i < sizeof(methods) / sizeof(*methods); ++i) {
    const int before = failures;
    run_method(methods[i]);
    if (failures > before) fprintf(stderr, "method %s\n", methods[i]);
  }
  elements_and_layouts();
  threshold();
  struct_sizes();
  wrong_calls();
  saving();
  CHECK(remove(statistics_file) == 0);
  CHECK(remove(surrogate_file) == 0);
  if (failures == 0) puts("the C API does what compresskv.h says");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
