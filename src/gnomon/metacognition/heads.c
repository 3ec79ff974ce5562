/* The metacognitive heads for a few rows: what MetacogHeads.forward computes, without per-layer records.

   Legend: N rows, L used layers, A all layers, C hidden size, W width, P proj_dim, K plans, S sites.
   metacognition/heads.py is the definition; tests/metacognition/test_native.py holds this file to it. */

#include "matrix.h"

typedef struct {
  int32_t all, layers, hidden, width, proj, plans, attention;
  const int32_t *index;                              /* [L] which of the A taps are used */
  const float *mean, *inverse;                       /* [S, L, C]: standardisation, 1 / scale */
  const float *inp, *inp_bias, *layer, *site, *gain, *used; /* packed [C -> W]; [W]; [L, W]; [S, W]; [S, W]; [W] */
  const float *out, *out_bias, *norm, *norm_bias;    /* packed [W -> P]; [P] each */
  const float *query, *prior;                        /* [P], [L] */
  const float *hidden_w[4], *hidden_b[4];            /* packed [P -> P], [P]: plan, budget, confidence, values */
  const float *last_w[4], *last_b[4];                /* packed [P -> K, 1, 1 or 2K] and their biases; values: NULL = none */
} Heads;

/* GELU of n numbers in place. erf by Abramowitz and Stegun 7.1.26 (absolute error 1.5e-7), sixteen at a time: erff alone
   took longer than the products. `room`: x holds n rounded up to KB numbers. */
static void gelu(float *x, int n) {
  for (int i = 0; i < n; i += KB) {
    const vkb v = *(vkb *)(x + i), z = v * 0.70710678118654752f;
    const vkb size = (vkb)((ikb)z & 0x7fffffff), t = 1.0f / (1.0f + 0.3275911f * size);
    vkb p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = (p * t + 0.254829592f) * t;
    const vkb erf = 1.0f - p * exp_block(-(z * z));
    const vkb signed_erf = (vkb)((ikb)erf | ((ikb)z & (int32_t)0x80000000));
    *(vkb *)(x + i) = 0.5f * v * (1.0f + signed_erf);
  }
}

/* taps [N, A, C], site [N], log_used [N] = log1p(tokens) -> plan [N, K], budget [N], confidence [N], g [N, P],
   values [N, 2K] where the heads give them */
int gn_heads(const Heads *h, int rows, const float *taps, const int32_t *site, const float *log_used, float *plan,
             float *budget, float *confidence, float *g, float *values) {
  const int L = h->layers, C = h->hidden, W = h->width, P = h->proj;
  float *room = malloc(sizeof(float) * ((size_t)L * (C + W + P + 1) + P + 2 * h->plans + NR + 2 * KB));
  if (!room) return 0;
  float *x = room, *u = x + L * C, *z = u + L * W, *alpha = z + L * P, *a = alpha + L, *b = a + P;
  for (int n = 0; n < rows; n++) {
    const int s = site[n];
    for (int l = 0; l < L; l++) {
      const float *tap = taps + ((int64_t)n * h->all + h->index[l]) * C;
      const float *mean = h->mean + ((int64_t)s * L + l) * C, *inverse = h->inverse + ((int64_t)s * L + l) * C;
      for (int c = 0; c < C; c++) {
        const float v = (tap[c] - mean[c]) * inverse[c];
        x[l * C + c] = v < -8.0f ? -8.0f : v > 8.0f ? 8.0f : v;
      }
    }
    matmul(x, C, L, h->inp, W, C, u, W);
    for (int l = 0; l < L; l++)
      for (int i = 0; i < W; i++) {
        const float v = (u[l * W + i] + h->inp_bias[i]) * (1.0f + h->gain[s * W + i]) + h->layer[l * W + i] +
                        h->site[s * W + i] + log_used[n] * h->used[i];
        u[l * W + i] = v;
      }
    gelu(u, L * W); /* runs into z, which comes next and is written later */
    matmul(u, W, L, h->out, P, W, z, P);
    for (int l = 0; l < L; l++) { /* LayerNorm */
      float *row = z + l * P, mean = 0, square = 0;
      for (int i = 0; i < P; i++) mean += row[i] += h->out_bias[i];
      mean /= P;
      for (int i = 0; i < P; i++) square += (row[i] - mean) * (row[i] - mean);
      const float scale = 1.0f / sqrtf(square / P + 1e-5f);
      for (int i = 0; i < P; i++) row[i] = (row[i] - mean) * scale * h->norm[i] + h->norm_bias[i];
    }
    float top = -INFINITY, sum = 0, *to = g + (int64_t)n * P;
    for (int l = 0; l < L; l++) {
      float score = 0;
      if (h->attention) {
        for (int i = 0; i < P; i++) score += z[l * P + i] * h->query[i];
        score = score / sqrtf((float)P) + h->prior[l];
      }
      alpha[l] = score;
      top = score > top ? score : top;
    }
    for (int l = 0; l < L; l++) sum += alpha[l] = expf(alpha[l] - top);
    for (int i = 0; i < P; i++) to[i] = 0;
    for (int l = 0; l < L; l++)
      for (int i = 0; i < P; i++) to[i] += alpha[l] / sum * z[l * P + i];
    float *results[4] = {plan + (int64_t)n * h->plans, budget + n, confidence + n, values + (int64_t)n * 2 * h->plans};
    const int sizes[4] = {h->plans, 1, 1, 2 * h->plans};
    for (int k = 0; k < 4 && h->last_w[k]; k++) {
      float *result = results[k];
      const int outputs = sizes[k];
      matmul(to, P, 1, h->hidden_w[k], P, P, a, P);
      for (int i = 0; i < P; i++) a[i] += h->hidden_b[k][i];
      gelu(a, P); /* runs into b, the same */
      matmul(a, P, 1, h->last_w[k], outputs, P, b, outputs);
      for (int i = 0; i < outputs; i++) result[i] = b[i] + h->last_b[k][i];
    }
  }
  free(room);
  return 1;
}

/* states [N, C]; root packed [C -> C], centres [M, C] in its coordinates -> distance to the nearest centre [N] */
int gn_distance(int rows, int hidden, int centres, const float *states, const float *root, const float *centre,
                float *distance) {
  float *y = malloc(sizeof(float) * (size_t)rows * hidden);
  if (!y) return 0;
  matmul(states, hidden, rows, root, hidden, hidden, y, hidden);
  for (int n = 0; n < rows; n++) {
    float best = INFINITY;
    for (int m = 0; m < centres; m++) {
      float sum = 0;
      for (int c = 0; c < hidden; c++) {
        const float gap = y[(int64_t)n * hidden + c] - centre[(int64_t)m * hidden + c];
        sum += gap * gap;
      }
      best = sum < best || sum != sum ? sum : best;
    }
    distance[n] = sqrtf(best);
  }
  free(y);
  return 1;
}
