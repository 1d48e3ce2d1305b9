#include <compresskv/compresskv.h>
#include <stdio.h>

int main(void) {
  const ckv_model model = {.layers = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 16, .kv_row_bytes = 0};
  ckv_settings settings;
  ckv_plan* plan = NULL;
  ckv_sequence* sequence = NULL;
  size_t rows = 0;
  ckv_settings_init(&settings);
  settings.budget_ratio = 0.5;
  if (ckv_plan_create(&model, "snapkv", &settings, &plan) != CKV_OK ||
      ckv_sequence_create(plan, &sequence) != CKV_OK || ckv_begin(sequence, 100, NULL) != CKV_OK ||
      ckv_capacity(sequence, 1, &rows) != CKV_OK) {
    puts(ckv_last_error());
    return 1;
  }
  ckv_sequence_free(sequence);
  ckv_plan_free(plan);
  printf("%zu rows of 100\n", rows);
  return 0;
}
