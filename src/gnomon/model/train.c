/* Training of gnomon's decoder on a CPU: attention inside records, RMSNorm, hyper-connections; forward and backward.

   Legend: N tokens, S segments (records; a token sees its own up to itself), H heads, D head size, C channels, n streams,
   P = 2n + M coefficients a token before the projection, M = n! permutations, Q = 2n + n*n after it (pre, post, comb).
   model/attention.py and model/hyper.py are the definition; tests/model/test_fused.py holds this file to them.

   Scores lie transposed, keys down and NR queries across: sums over keys are then sums of vectors, and such a block is a
   panel of matrix.h as it stands. What a token gets does not depend on how the work is cut. */

#include "matrix.h"

#include <stdatomic.h>

#define EPS 1e-6f
#define TOKENS 16 /* that pass through a hyper-connection together, so that their streams stay in the cache */

/* --- threads: those of torch's OpenMP where it is found, because its waiting threads would hold the cores -------------- */

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
static Parallel parallel;

typedef struct {
  Chunk chunk;
  void *job;
  int chunks;
  atomic_int next;
} Deal;

static void deal_work(void *data) {
  Deal *d = data;
  for (int c; (c = atomic_fetch_add(&d->next, 1)) < d->chunks;) d->chunk(d->job, c);
}

static void deal_run(Chunk chunk, void *job, int chunks, int threads) {
  Deal deal = {chunk, job, chunks, 0};
  if (threads <= 1 || chunks <= 1)
    deal_work(&deal);
  else
    parallel(deal_work, &deal, threads, 0);
}

/* run: GOMP_parallel of the OpenMP library that torch uses */
void gn_use_openmp(Parallel run) { parallel = run, pool_run = deal_run; }

/* Room that a thread keeps; the numbers in it are left over from earlier. NULL without memory. */
static float *room(int64_t floats) {
  static _Thread_local float *held;
  static _Thread_local int64_t size;
  if (floats > size) {
    free(held);
    held = aligned_alloc(64, (size_t)((floats + 15) / 16 * 64));
    size = held ? floats : 0;
  }
  return held;
}

static inline float dot(const float *a, const float *b, int n) {
  float sum = 0;
  for (int i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

/* --- attention -------------------------------------------------------------------------------------------------------- */

typedef struct {
  const float *qkv, *rope, *gain; /* [N, 3, H, D]; [context, 2, D/2]; [H] */
  const int32_t *starts;          /* [S + 1] first token of every segment */
  const int64_t *at;              /* [N] positions */
  float *out, *lse;               /* [N, H, D]; [H, N] log of the sum of exponentials */
  const float *grad;              /* [N, H, D]; NULL forward */
  float *grad_qkv, *grad_gain;    /* like qkv; [S, H] */
  int tokens, heads, size;
  atomic_int failed;
} Attention;

static int padded(int n) { return (n + NR - 1) / NR * NR; }

/* q or k of a token: RMSNorm, rotation, factor. x [D] -> y [D] with stride ys; returns 1 / rms */
static float turned(const float *x, const float *rope, int D, float factor, float *y, int64_t ys) {
  const float inverse = 1.0f / sqrtf(dot(x, x, D) / D + EPS), f = inverse * factor;
  const int half = D / 2;
  for (int i = 0; i < half; i++) {
    y[i * ys] = f * (x[i] * rope[i] - x[half + i] * rope[half + i]);
    y[(half + i) * ys] = f * (x[i] * rope[half + i] + x[half + i] * rope[i]);
  }
  return inverse;
}

/* gradient g [D] of turned(x) -> gradient of x; returns the gradient of the factor */
static float unturned(const float *x, const float *rope, int D, float factor, const float *g, float *gx) {
  const float inverse = 1.0f / sqrtf(dot(x, x, D) / D + EPS);
  const int half = D / 2;
  float along = 0;
  for (int i = 0; i < half; i++) {
    const float a = g[i] * rope[i] + g[half + i] * rope[half + i], b = g[half + i] * rope[i] - g[i] * rope[half + i];
    along += a * x[i] + b * x[half + i];
    gx[i] = a, gx[half + i] = b;
  }
  const float back = along * inverse * inverse / D;
  for (int i = 0; i < D; i++) gx[i] = factor * inverse * (gx[i] - back * x[i]);
  return along * inverse;
}

/* keys 0 .. keys-1 down, NR queries across: scores[j][i] = k_j q_i; those that query first + i may not see: -infinity */
static void scores(const float *K, const float *queries, int D, int keys, int first, float *to) {
  matmul(K, D, keys, queries, NR, D, to, NR);
  for (int j = first + 1; j < keys; j++)
    for (int i = 0; i < NR && first + i < j; i++) to[j * NR + i] = -INFINITY;
}

static void attend(void *job, int chunk) {
  Attention *a = job;
  const int s = chunk / a->heads, h = chunk % a->heads, D = a->size, from = a->starts[s], L = a->starts[s + 1] - from;
  const int64_t row = (int64_t)a->heads * D, wide = 3 * row;
  const float factor = a->gain[h] / sqrtf(D);
  float *K = room((int64_t)2 * L * D + (int64_t)(L + NR) * NR + 3 * (int64_t)D * NR);
  if (!K) {
    a->failed = 1;
    return;
  }
  float *VT = K + (int64_t)L * D, *queries = VT + (int64_t)L * D, *OT = queries + D * NR, *block = OT + D * NR;
  for (int t = 0; t < L; t++) {
    const float *token = a->qkv + (from + t) * wide + (int64_t)h * D;
    turned(token + row, a->rope + a->at[from + t] * D, D, 1.0f, K + (int64_t)t * D, 1);
    for (int d = 0; d < D; d++) VT[(int64_t)d * L + t] = token[2 * row + d];
  }
  for (int first = 0; first < L; first += NR) {
    const int many = L - first < NR ? L - first : NR, keys = first + many;
    memset(queries, 0, sizeof(float) * D * NR);
    for (int i = 0; i < many; i++)
      turned(a->qkv + (from + first + i) * wide + (int64_t)h * D, a->rope + a->at[from + first + i] * D, D, factor,
             queries + i, NR);
    scores(K, queries, D, keys, first, block);
    vkb top[NR / KB], sum[NR / KB];
    for (int b = 0; b < NR / KB; b++) {
      vkb m = *(vkb *)(block + b * KB);
      for (int j = 1; j < keys; j++) {
        const vkb v = *(vkb *)(block + j * NR + b * KB);
        const ikb more = v > m;
        m = (vkb)((more & (ikb)v) | (~more & (ikb)m));
      }
      vkb all = {0};
      for (int j = 0; j < keys; j++) {
        vkb *v = (vkb *)(block + j * NR + b * KB);
        all += *v = exp_block(*v - m);
      }
      top[b] = m, sum[b] = all;
    }
    matmul(VT, L, D, block, NR, keys, OT, NR);
    for (int i = 0; i < many; i++) {
      const float total = ((float *)sum)[i], inverse = 1.0f / total;
      float *to = a->out + (from + first + i) * row + (int64_t)h * D;
      for (int d = 0; d < D; d++) to[d] = OT[d * NR + i] * inverse;
      a->lse[(int64_t)h * a->tokens + from + first + i] = ((float *)top)[i] + logf(total);
    }
  }
}

static void attend_back(void *job, int chunk) {
  Attention *a = job;
  const int s = chunk / a->heads, h = chunk % a->heads, D = a->size, from = a->starts[s], L = a->starts[s + 1] - from;
  const int64_t row = (int64_t)a->heads * D, wide = 3 * row, LD = (int64_t)L * D;
  const float factor = a->gain[h] / sqrtf(D);
  const int64_t small = (int64_t)D * NR, pack = (int64_t)padded(D) * NR;
  float *K = room(6 * LD + 2 * (int64_t)(L + NR) * NR + 4 * small + 2 * pack + 2 * NR + D);
  if (!K) {
    a->failed = 1;
    return;
  }
  float *KT = K + LD, *V = KT + LD, *gK = V + LD, *gV = gK + LD, *extra = gV + LD; /* each [L, D] but KT [D, L] */
  float *block = extra + LD, *gblock = block + (int64_t)(L + NR) * NR; /* [keys, NR] */
  float *queries = gblock + (int64_t)(L + NR) * NR, *gout = queries + small, *gq = gout + small; /* [D, NR] */
  float *rows = gq + small, *packed_q = rows + small, *packed_g = packed_q + pack;
  float *lse = packed_g + pack, *delta = lse + NR, *g = delta + NR;
  for (int t = 0; t < L; t++) {
    const float *token = a->qkv + (from + t) * wide + (int64_t)h * D;
    turned(token + row, a->rope + a->at[from + t] * D, D, 1.0f, K + (int64_t)t * D, 1);
    for (int d = 0; d < D; d++) KT[(int64_t)d * L + t] = K[(int64_t)t * D + d];
    memcpy(V + (int64_t)t * D, token + 2 * row, sizeof(float) * D);
  }
  memset(gK, 0, sizeof(float) * 2 * LD);
  float along = 0;
  for (int first = 0; first < L; first += NR) {
    const int many = L - first < NR ? L - first : NR, keys = first + many;
    memset(queries, 0, sizeof(float) * 2 * small); /* and gout */
    memset(lse, 0, sizeof(float) * 2 * NR);        /* and delta */
    for (int i = 0; i < many; i++) {
      const int64_t t = from + first + i;
      const float *g_out = a->grad + t * row + (int64_t)h * D;
      turned(a->qkv + t * wide + (int64_t)h * D, a->rope + a->at[t] * D, D, factor, queries + i, NR);
      for (int d = 0; d < D; d++) gout[d * NR + i] = g_out[d];
      lse[i] = a->lse[(int64_t)h * a->tokens + t];
      delta[i] = dot(g_out, a->out + t * row + (int64_t)h * D, D);
    }
    scores(K, queries, D, keys, first, block);
    matmul(V, D, keys, gout, NR, D, gblock, NR);
    for (int j = 0; j < keys; j++)
      for (int b = 0; b < NR; b += KB) {
        vkb *p = (vkb *)(block + j * NR + b), *gp = (vkb *)(gblock + j * NR + b);
        *p = exp_block(*p - *(vkb *)(lse + b));
        *gp = *p * (*gp - *(vkb *)(delta + b));
      }
    gn_pack(queries, NR, 1, D, NR, packed_q);
    gn_pack(gout, NR, 1, D, NR, packed_g);
    matmul(block, NR, keys, packed_g, D, NR, extra, D);
    for (int64_t i = 0; i < (int64_t)keys * D; i++) gV[i] += extra[i];
    matmul(gblock, NR, keys, packed_q, D, NR, extra, D);
    for (int64_t i = 0; i < (int64_t)keys * D; i++) gK[i] += extra[i];
    matmul(KT, L, D, gblock, NR, keys, gq, NR);
    for (int i = 0; i < many; i++) {
      const int64_t t = from + first + i, where = t * wide + (int64_t)h * D;
      for (int d = 0; d < D; d++) g[d] = gq[d * NR + i];
      along += unturned(a->qkv + where, a->rope + a->at[t] * D, D, factor, g, a->grad_qkv + where);
    }
  }
  for (int t = 0; t < L; t++) {
    const int64_t where = (from + t) * wide + (int64_t)h * D + row;
    unturned(a->qkv + where, a->rope + a->at[from + t] * D, D, 1.0f, gK + (int64_t)t * D, a->grad_qkv + where);
    memcpy(a->grad_qkv + where + row, gV + (int64_t)t * D, sizeof(float) * D);
  }
  a->grad_gain[(int64_t)s * a->heads + h] = along / sqrtf(D);
}

/* Returns 0 where memory did not suffice. grad NULL: forward, writes out and lse; else backward, writes the gradients. */
int gn_attend(const float *qkv, const float *rope, const float *gain, const int32_t *starts, const int64_t *at,
              float *out, float *lse, const float *grad, float *grad_qkv, float *grad_gain, int segments, int tokens,
              int heads, int size, int threads) {
  Attention a = {qkv, rope, gain, starts, at, out, lse, grad, grad_qkv, grad_gain, tokens, heads, size, 0};
  pool_run(grad ? attend_back : attend, &a, segments * heads, threads);
  return !a.failed;
}

/* --- residual add and RMSNorm ----------------------------------------------------------------------------------------- */

static float normed(const float *x, int C, float *y) {
  const float inverse = 1.0f / sqrtf(dot(x, x, C) / C + EPS);
  for (int i = 0; i < C; i++) y[i] = x[i] * inverse;
  return inverse;
}

/* gradient of normed(x) = y [C] -> gradient of x */
static void unnormed(const float *y, float inverse, const float *gy, int C, float *gx) {
  const float along = dot(gy, y, C) / C;
  for (int i = 0; i < C; i++) gx[i] = inverse * (gy[i] - along * y[i]);
}

typedef struct {
  const float *x, *z, *gsum, *gy;
  float *sum, *y, *inverse, *gx;
  int64_t tokens;
  int channels;
} Norm;

static void norm(void *job, int chunk) {
  const Norm *a = job;
  const int C = a->channels;
  const int64_t from = (int64_t)chunk * 4 * TOKENS, to = from + 4 * TOKENS < a->tokens ? from + 4 * TOKENS : a->tokens;
  for (int64_t t = from; t < to; t++)
    if (a->gy) {
      unnormed(a->y + t * C, a->inverse[t], a->gy + t * C, C, a->gx + t * C);
      if (a->gsum)
        for (int i = 0; i < C; i++) a->gx[t * C + i] += a->gsum[t * C + i];
    } else {
      const float *x = a->x + t * C;
      if (a->z) {
        for (int i = 0; i < C; i++) a->sum[t * C + i] = x[i] + a->z[t * C + i];
        x = a->sum + t * C;
      }
      a->inverse[t] = normed(x, C, a->y + t * C);
    }
}

/* Forward (gy NULL): sum = x + z (z may be NULL), y = normed(sum). Backward: gx = gradient through y, plus gsum. */
void gn_norm(const float *x, const float *z, float *sum, float *y, float *inverse, const float *gsum, const float *gy,
             float *gx, int64_t tokens, int channels, int threads) {
  Norm a = {x, z, gsum, gy, sum, y, inverse, gx, tokens, channels};
  pool_run(norm, &a, (int)((tokens + 4 * TOKENS - 1) / (4 * TOKENS)), threads);
}

/* --- hyper-connections ------------------------------------------------------------------------------------------------ */

typedef struct {
  int64_t tokens;
  int32_t streams, channels, threads;
  /* write: to = post z + comb x. z NULL: none, `to` is x itself. coef [N, Q] of the read before. */
  const float *x, *z, *coef;
  float *to;
  /* read of `to`: y [N, C] normed. phi packed [n*C -> P], scale and bias [P], order [M, n]: column of row j. NULL: none */
  const float *phi, *scale, *bias;
  const int32_t *order;
  float *y, *y_inverse, *inverse, *raw, *weights, *next; /* [N, C], [N], [N], [N, P], [N, M], [N, Q] */
  /* backward */
  const float *phi_back;           /* packed [P -> n*C] */
  const float *gto, *gy, *gnext;   /* [N, n, C] or NULL, [N, C], [N, Q] */
  float *graw, *part;              /* [N, P] gradient of the product; [chunks, 2, P] of bias, and of scale */
  float *gx, *gz, *gcoef;          /* [N, n, C]; [N, C], [N, Q] */
  atomic_int failed;
} Hyper;

static int factorial(int n) { return n < 2 ? 1 : n * factorial(n - 1); }

static inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

static void write_token(const float *x, const float *z, const float *coef, int n, int C, float *to) {
  const float *post = coef + n, *comb = coef + 2 * n;
  for (int k = 0; k < n; k++)
    for (int i = 0; i < C; i++) to[k * C + i] = post[k] * z[i];
  for (int k = 0; k < n; k++)
    for (int j = 0; j < n; j++) {
      const float c = comb[j * n + k];
      for (int i = 0; i < C; i++) to[k * C + i] += c * x[j * C + i];
    }
}

static void read_token(const Hyper *a, int64_t t, const float *product, float *y) {
  const int n = a->streams, C = a->channels, M = factorial(n), P = 2 * n + M, Q = 2 * n + n * n;
  const float *x = a->to + t * n * C;
  float *raw = a->raw + t * P, *w = a->weights + t * M, *next = a->next + t * Q, *comb = next + 2 * n;
  const float inverse = 1.0f / sqrtf(dot(x, x, n * C) / (n * C) + EPS);
  a->inverse[t] = inverse;
  for (int p = 0; p < P; p++) raw[p] = product[p] * inverse;
  for (int j = 0; j < n; j++) next[j] = sigmoid(raw[j] * a->scale[j] + a->bias[j]);
  for (int j = n; j < 2 * n; j++) next[j] = 2.0f * sigmoid(raw[j] * a->scale[j] + a->bias[j]);
  float top = -INFINITY, sum = 0;
  for (int m = 0; m < M; m++) {
    w[m] = raw[2 * n + m] * a->scale[2 * n + m] + a->bias[2 * n + m];
    top = w[m] > top ? w[m] : top;
  }
  for (int m = 0; m < M; m++) sum += w[m] = expf(w[m] - top);
  for (int q = 0; q < n * n; q++) comb[q] = 0;
  for (int m = 0; m < M; m++) {
    w[m] /= sum;
    for (int j = 0; j < n; j++) comb[j * n + a->order[m * n + j]] += w[m];
  }
  for (int i = 0; i < C; i++) y[i] = next[0] * x[i];
  for (int j = 1; j < n; j++)
    for (int i = 0; i < C; i++) y[i] += next[j] * x[j * C + i];
}

static void hyper(void *job, int chunk) {
  Hyper *a = job;
  const int n = a->streams, C = a->channels, P = 2 * n + factorial(n), Q = 2 * n + n * n;
  const int64_t from = (int64_t)chunk * TOKENS, to = from + TOKENS < a->tokens ? from + TOKENS : a->tokens;
  if (a->z)
    for (int64_t t = from; t < to; t++)
      write_token(a->x + t * n * C, a->z + t * C, a->coef + t * Q, n, C, a->to + t * n * C);
  if (!a->phi) return;
  float *product = room((int64_t)TOKENS * P + C);
  if (!product) {
    a->failed = 1;
    return;
  }
  matmul(a->to + from * n * C, n * C, (int)(to - from), a->phi, P, n * C, product, P);
  for (int64_t t = from; t < to; t++) {
    float *y = product + TOKENS * P;
    read_token(a, t, product + (t - from) * P, y);
    a->y_inverse[t] = normed(y, C, a->y + t * C);
  }
}

/* gy [C], gnext [Q] -> gradient through the coefficients: graw [P] of the product; adds the rest to g [n, C] */
static void read_token_back(const Hyper *a, int64_t t, float *gy, float *graw, float *part, float *g) {
  const int n = a->streams, C = a->channels, M = factorial(n), P = 2 * n + M, Q = 2 * n + n * n;
  const float *x = a->to + t * n * C, *raw = a->raw + t * P, *w = a->weights + t * M, *next = a->next + t * Q;
  const float *gnext = a->gnext + t * Q, *gcomb = gnext + 2 * n, inverse = a->inverse[t];
  unnormed(a->y + t * C, a->y_inverse[t], a->gy + t * C, C, gy);
  for (int j = 0; j < n; j++) {
    graw[j] = (gnext[j] + dot(gy, x + j * C, C)) * next[j] * (1.0f - next[j]);
    graw[n + j] = gnext[n + j] * next[n + j] * (1.0f - 0.5f * next[n + j]);
    for (int i = 0; i < C; i++) g[j * C + i] += next[j] * gy[i];
  }
  float mean = 0, along = 0;
  for (int m = 0; m < M; m++) {
    float sum = 0;
    for (int j = 0; j < n; j++) sum += gcomb[j * n + a->order[m * n + j]];
    graw[2 * n + m] = sum;
    mean += sum * w[m];
  }
  for (int m = 0; m < M; m++) graw[2 * n + m] = w[m] * (graw[2 * n + m] - mean);
  for (int p = 0; p < P; p++) {
    part[p] += graw[p];
    part[P + p] += graw[p] * raw[p];
    graw[p] *= a->scale[p];
    along += graw[p] * raw[p];
    graw[p] *= inverse;
  }
  const float back = along * inverse * inverse / (n * C);
  for (int i = 0; i < n * C; i++) g[i] -= back * x[i];
}

static void write_token_back(const Hyper *a, int64_t t, const float *g) {
  const int n = a->streams, C = a->channels, Q = 2 * n + n * n;
  const float *x = a->x + t * n * C, *z = a->z + t * C, *post = a->coef + t * Q + n, *comb = post + n;
  float *gx = a->gx + t * n * C, *gz = a->gz + t * C, *gcoef = a->gcoef + t * Q;
  for (int i = 0; i < C; i++) gz[i] = post[0] * g[i];
  for (int k = 1; k < n; k++)
    for (int i = 0; i < C; i++) gz[i] += post[k] * g[k * C + i];
  for (int k = 0; k < n; k++) {
    gcoef[k] = 0; /* of pre: its reader has it already */
    gcoef[n + k] = dot(g + k * C, z, C);
  }
  for (int j = 0; j < n; j++) {
    for (int i = 0; i < C; i++) gx[j * C + i] = comb[j * n] * g[i];
    gcoef[2 * n + j * n] = dot(g, x + j * C, C);
    for (int k = 1; k < n; k++) {
      const float c = comb[j * n + k];
      for (int i = 0; i < C; i++) gx[j * C + i] += c * g[k * C + i];
      gcoef[2 * n + j * n + k] = dot(g + k * C, x + j * C, C);
    }
  }
}

static void hyper_back(void *job, int chunk) {
  Hyper *a = job;
  const int n = a->streams, C = a->channels, P = 2 * n + factorial(n), W = n * C;
  const int64_t from = (int64_t)chunk * TOKENS, to = from + TOKENS < a->tokens ? from + TOKENS : a->tokens;
  const int many = (int)(to - from);
  float *g = room((int64_t)2 * TOKENS * W + C);
  if (!g) {
    a->failed = 1;
    return;
  }
  float *more = g + TOKENS * W, *gy = more + TOKENS * W;
  if (a->gto)
    memcpy(g, a->gto + from * W, sizeof(float) * many * W);
  else
    memset(g, 0, sizeof(float) * many * W);
  if (a->phi) {
    float *part = a->part + (int64_t)chunk * 2 * P;
    memset(part, 0, sizeof(float) * 2 * P);
    for (int t = 0; t < many; t++) read_token_back(a, from + t, gy, a->graw + (from + t) * P, part, g + t * W);
    matmul(a->graw + from * P, P, many, a->phi_back, W, P, more, W);
    for (int i = 0; i < many * W; i++) g[i] += more[i];
  }
  if (a->z)
    for (int t = 0; t < many; t++) write_token_back(a, from + t, g + t * W);
  else
    memcpy(a->gx + from * W, g, sizeof(float) * many * W);
}

int gn_hyper_chunks(int64_t tokens) { return (int)((tokens + TOKENS - 1) / TOKENS); }

/* Returns 0 where memory did not suffice. */
int gn_hyper(Hyper *a, int backward) {
  a->failed = 0;
  pool_run(backward ? hyper_back : hyper, a, gn_hyper_chunks(a->tokens), a->threads);
  return !a->failed;
}
