/* One token per row from logits: greedy, or by the inverse of the cumulative distribution at a temperature.

   decoding/sampling.py is the definition (its torch path also knows top-k and top-p); a row depends on itself alone. */

#include "matrix.h"

/* logits [R, V] + masks[phase[r]] [V] (masks NULL: none), temperature [R] (0 = greedy), u [R] in [0, 1)
   -> ids [R], logprobs [R] at that temperature (greedy: 1). Returns 0 when memory ran out. */
int gn_sample(const float *logits, int rows, int vocab, const float *masks, const int32_t *phase,
              const float *temperature, const double *u, int64_t *ids, float *logprobs) {
  const int blocks = (vocab + KB - 1) / KB;
  float *z = malloc(sizeof(float) * (size_t)blocks * KB);
  if (!z) return 0;
  for (int r = 0; r < rows; r++) {
    const float *row = logits + (int64_t)r * vocab, *mask = masks ? masks + (int64_t)phase[r] * vocab : NULL;
    const float scale = temperature[r] > 0 ? 1.0f / temperature[r] : 1.0f;
    for (int v = 0; v < vocab; v++) z[v] = (mask ? row[v] + mask[v] : row[v]) * scale;
    for (int v = vocab; v < blocks * KB; v++) z[v] = -INFINITY;
    float top = -INFINITY;
    for (int v = 0; v < vocab; v++) top = z[v] > top ? z[v] : top;
    int best = 0;
    while (best < vocab - 1 && z[best] < top) best++;
    double total = 0;
    for (int b = 0; b < blocks; b++) {
      const vkb e = exp_block(*(vkb *)(z + b * KB) - top);
      *(vkb *)(z + b * KB) = e;
      float sum = 0;
      for (int i = 0; i < KB; i++) sum += e[i];
      total += sum;
    }
    int id = best;
    if (temperature[r] > 0) {
      const double target = u[r] * total;
      double passed = 0;
      int b = 0;
      for (; b < blocks - 1; b++) {
        float sum = 0;
        for (int i = 0; i < KB; i++) sum += z[b * KB + i];
        if (passed + sum > target) break;
        passed += sum;
      }
      int at = b * KB, last = best; /* `last`: the newest token that can be drawn, should rounding run past the end */
      for (; at < vocab; at++) {
        if (z[at] > 0) last = at;
        passed += z[at];
        if (passed > target && z[at] > 0) break;
      }
      id = at < vocab ? at : last;
    }
    const float chosen = (mask ? row[id] + mask[id] : row[id]) * scale;
    ids[r] = id;
    logprobs[r] = chosen - top - (float)log(total);
  }
  free(z);
  return 1;
}
