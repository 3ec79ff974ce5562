/* What a metacognitive layer does to a token inside a thought, behind a block: side adapters and a gate.
   model/steering.py is the definition. */

#ifndef GN_STEER
#define GN_STEER
#include "matrix.h"

typedef struct {
  const float *down, *up, *weight; /* [r, C], [r, C], [C]; down NULL: no adapter at this block */
  float bias;
} Adapter;

typedef struct { /* one pass */
  int32_t gate_layer, rank; /* gate_layer -1: no gate */
  const Adapter *adapters;  /* [L] */
  const float *vectors;     /* [W, C] */
  const int32_t *at;        /* one a token: its vector, -1 where nothing is done */
} Steer;

static int steers(const Steer *s, int layer) { return s && (layer == s->gate_layer || s->adapters[layer].down); }

static float dot(const float *a, const float *b, int n) {
  float sum = 0;
  for (int i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

/* x [n, C] of one token behind `layer`, in place */
static void steer_token(const Steer *s, int layer, int token, float *x, int n, int C) {
  const int row = s->at[token];
  if (row < 0) return;
  const Adapter *a = &s->adapters[layer];
  if (a->down) {
    float h[C], mean[C];
    for (int c = 0; c < C; c++) mean[c] = x[c];
    for (int j = 1; j < n; j++)
      for (int c = 0; c < C; c++) mean[c] += x[j * C + c];
    if (n > 1)
      for (int c = 0; c < C; c++) mean[c] *= 1.0f / n;
    const float scale = 1.0f / sqrtf(dot(mean, mean, C) / C + 1e-6f);
    for (int c = 0; c < C; c++) h[c] = mean[c] * scale;
    const float open = 1.2f / (1.0f + expf(-(dot(h, a->weight, C) + a->bias))) - 0.1f;
    const float gate = open < 0 ? 0 : open > 1 ? 1 : open;
    if (gate > 0) {
      for (int c = 0; c < C; c++) mean[c] = 0;
      for (int r = 0; r < s->rank; r++) {
        const float low = dot(h, a->down + (int64_t)r * C, C);
        const float *up = a->up + (int64_t)r * C;
        for (int c = 0; c < C; c++) mean[c] += low * up[c];
      }
      for (int j = 0; j < n; j++)
        for (int c = 0; c < C; c++) x[j * C + c] += gate * mean[c];
    }
  }
  if (layer == s->gate_layer) {
    const float *vector = s->vectors + (int64_t)row * C;
    for (int j = 0; j < n; j++)
      for (int c = 0; c < C; c++) x[j * C + c] *= vector[c];
  }
}
#endif
