/* One read of the metacognitive layer: heads and card together, for the rows that stand at one site.

   Legend: N rows, L used layers, A all layers, C hidden size, W width, P proj_dim, K plans, S sites.
   metacognition/heads.py and calibration.py are the definition; tests/metacognition/test_native.py holds this file to
   them. A read stands between two steps of a millisecond, so that it is one call. */

#include "matrix.h"

#include <stdatomic.h>

typedef struct {
  int32_t all, layers, hidden, width, proj, plans, attention;
  const int32_t *index;                              /* [L] which of the A taps are used */
  const float *mean, *inverse;                       /* [S, L, C]: standardisation, 1 / scale */
  const float *inp, *inp_bias, *layer, *site, *gain, *used; /* packed [C -> W]; [W]; [L, W]; [S, W]; [S, W]; [W] */
  const float *out, *out_bias, *norm, *norm_bias;    /* packed [W -> P]; [P] each */
  const float *query, *prior;                        /* [P], [L] */
  const float *gate, *gate_bias;                     /* packed [P + K + 1 -> C], [C]: FeedbackGate; NULL = none */
  const float *hidden_w[4], *hidden_b[4];            /* packed [P -> P], [P]: plan, budget, confidence, values */
  const float *last_w[4], *last_b[4];                /* packed [P -> K, 1, 1 or 2K] and their biases; values: NULL = none */
} Heads;

enum { PROMPT, THINK, BOUNDARY, END }; /* SITES of config.py */
enum { PLAN_HEAD, BUDGET_HEAD, CONFIDENCE_HEAD, VALUE_HEAD };

typedef struct {                /* what calibration.py calls a Card; all zero where there is none */
  int32_t present, layer, centres; /* of the domain: which tap, how many */
  const int32_t *order;            /* [K] plans in cost order */
  const float *root, *centre;      /* packed [C -> C]; [centres, C] in its coordinates */
  const double *mean;              /* [C], taken off before float32 is used: it keeps small gaps only near zero */
  double threshold, price;         /* of plans; price < 0: none */
  double temperature[4], shift[4], offset[4]; /* by site */
} Card;

#define GROUP 4 /* rows that go through a product together, at most */

typedef struct { /* one read, cut into chunks of `share` rows */
  const Heads *heads;
  const Card *card;
  int site, rows, share, width;
  const int32_t *sites; /* [N], each END or BOUNDARY, in place of `site`; NULL: all at `site` */
  const float *taps, *used;
  const int32_t *plan; /* [N], and vectors [N, C]: what the gate does under these plans; NULL: not asked */
  float *vectors;
  double *out;
  atomic_int failed; /* 1: no memory, 2: no finite number */
} Read;

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

static double sigmoid(double x) { return 0.5 * (1.0 + tanh(0.5 * x)); }

static double tokens_of(double raw) { return fmax(expm1(fmin(raw, 16.0)), 0.0); }

/* clip_tokens of calibration.py */
static double clipped(double raw, double offset) {
  return fmax(ceil(expm1(fmin(raw + offset, log1p(1e7))) - 1e-9), 0.0);
}

static int best(const double *value, int n) {
  int found = 0;
  for (int k = 1; k < n; k++)
    if (value[k] > value[found]) found = k;
  return found;
}

/* plan logits [K], values [2K] or NULL -> chosen plan, probabilities [K] */
static void choose(const Card *card, int K, const float *logits, const float *values, double *to) {
  double top = logits[0], sum = 0, *probs = to + 1;
  for (int k = 1; k < K; k++) top = logits[k] > top ? logits[k] : top;
  for (int k = 0; k < K; k++) sum += probs[k] = exp(logits[k] - top);
  for (int k = 0; k < K; k++) probs[k] /= sum;
  if (!card->present) {
    to[0] = best(probs, K);
  } else if (values && card->price >= 0) {
    double most = -INFINITY;
    for (int k = 0; k < K; k++) {
      const double value = sigmoid(values[k]) - card->price * fmax(expm1(fmin(values[K + k], 12.0)), 0.0);
      if (value > most) most = value, to[0] = k;
    }
  } else {
    double reached = 0;
    int k = 0;
    while (reached += probs[card->order[k]], k < K - 1 && reached < card->threshold - 1e-12) k++;
    to[0] = card->order[k];
  }
}

/* Distance of a tap [C] to the nearest centre; near, y: room for C each. */
static double distance(const Card *card, int C, const float *tap, float *near, float *y) {
  for (int c = 0; c < C; c++) near[c] = (float)(tap[c] - card->mean[c]);
  matmul(near, C, 1, card->root, C, C, y, C);
  float least = INFINITY;
  for (int m = 0; m < card->centres; m++) {
    float sum = 0;
    for (int c = 0; c < C; c++) {
      const float gap = y[c] - card->centre[(int64_t)m * C + c];
      sum += gap * gap;
    }
    least = sum < least || sum != sum ? sum : least;
  }
  return sqrtf(least);
}

/* Trunk and aggregator: taps [n, A, C] -> g [n, P] */
static void globals(const Heads *h, int n, int site, const int32_t *sites, const float *taps, const float *used, float *x, float *u, float *z,
                    float *alpha, float *g) {
  const int L = h->layers, C = h->hidden, W = h->width, P = h->proj;
  for (int i = 0; i < n * L; i++) {
    const int l = i % L, s = sites ? sites[i / L] : site;
    const float *mean = h->mean + (int64_t)s * L * C, *inverse = h->inverse + (int64_t)s * L * C;
    const float *tap = taps + ((int64_t)(i / L) * h->all + h->index[l]) * C;
    for (int c = 0; c < C; c++) {
      const float v = (tap[c] - mean[l * C + c]) * inverse[l * C + c];
      x[i * C + c] = v < -8.0f ? -8.0f : v > 8.0f ? 8.0f : v;
    }
  }
  matmul(x, C, n * L, h->inp, W, C, u, W);
  for (int r = 0; r < n; r++) {
    const float log_used = log1pf(fmaxf(used ? used[r] : 0.0f, 0.0f));
    const int s = sites ? sites[r] : site;
    const float *gain = h->gain + s * W, *offset = h->site + s * W;
    for (int l = 0; l < L; l++) {
      float *row = u + (r * L + l) * W;
      const float *layer = h->layer + l * W;
      for (int i = 0; i < W; i++)
        row[i] = (row[i] + h->inp_bias[i]) * (1.0f + gain[i]) + layer[i] + offset[i] + log_used * h->used[i];
    }
  }
  gelu(u, n * L * W); /* runs into z, which comes next and is written later */
  matmul(u, W, n * L, h->out, P, W, z, P);
  for (int i = 0; i < n * L; i++) { /* LayerNorm */
    float *row = z + i * P, mean = 0, square = 0;
    for (int p = 0; p < P; p++) mean += row[p] += h->out_bias[p];
    mean /= P;
    for (int p = 0; p < P; p++) square += (row[p] - mean) * (row[p] - mean);
    const float scale = 1.0f / sqrtf(square / P + 1e-5f);
    for (int p = 0; p < P; p++) row[p] = (row[p] - mean) * scale * h->norm[p] + h->norm_bias[p];
  }
  for (int r = 0; r < n; r++) {
    const float *row = z + r * L * P;
    float top = -INFINITY, sum = 0, *to = g + r * P;
    for (int l = 0; l < L; l++) {
      float score = 0;
      if (h->attention) {
        for (int p = 0; p < P; p++) score += row[l * P + p] * h->query[p];
        score = score / sqrtf((float)P) + h->prior[l];
      }
      alpha[l] = score;
      top = score > top ? score : top;
    }
    for (int l = 0; l < L; l++) sum += alpha[l] = expf(alpha[l] - top);
    for (int p = 0; p < P; p++) to[p] = 0;
    for (int l = 0; l < L; l++)
      for (int p = 0; p < P; p++) to[p] += alpha[l] / sum * row[l * P + p];
  }
}

/* One head on g [n, P] -> y [n, outputs]; a: room for n * P + KB. Returns whether all of y are finite numbers. */
static int head(const Heads *h, int k, int n, const float *g, float *a, float *y, int outputs) {
  const int P = h->proj;
  matmul(g, P, n, h->hidden_w[k], P, P, a, P);
  for (int i = 0; i < n * P; i++) a[i] += h->hidden_b[k][i % P];
  gelu(a, n * P);
  matmul(a, P, n, h->last_w[k], outputs, P, y, outputs);
  int finite = 1;
  for (int i = 0; i < n * outputs; i++) {
    y[i] += h->last_b[k][i % outputs];
    finite &= isfinite(y[i]) != 0;
  }
  return finite;
}

/* FeedbackGate: g [P], plan, confidence logit -> to [C]; said: room for P + K + 1 */
static void gate(const Heads *h, const float *g, int plan, float logit, float *said, float *to) {
  const int P = h->proj, K = h->plans, C = h->hidden;
  memcpy(said, g, sizeof(float) * P);
  for (int k = 0; k < K; k++) said[P + k] = k == plan;
  said[P + K] = 1.0f / (1.0f + expf(-logit));
  matmul(said, P + K + 1, 1, h->gate, C, P + K + 1, to, C);
  for (int c = 0; c < C; c++) to[c] = 1.0f + 0.5f * tanhf(to[c] + h->gate_bias[c]);
}

static void chunk(void *all, int c) {
  Read *read = all;
  const Heads *h = read->heads;
  const Card *card = read->card;
  const int L = h->layers, C = h->hidden, W = h->width, P = h->proj, K = h->plans, M = read->share * L, site = read->site;
  const int first = c * read->share, n = read->rows - first < read->share ? read->rows - first : read->share;
  const int64_t most = C > W ? C : W; /* x is also room for a distance */
  float *room = malloc(sizeof(float) * ((size_t)M * (most + W + P) + L + (n + 1) * (2 * P + 4 * K) + 2 * C + 4 * KB));
  if (!room) {
    atomic_store(&read->failed, 1);
    return;
  }
  float *x = room, *u = x + M * most + C, *z = u + M * W, *alpha = z + M * P + KB, *g = alpha + L, *a = g + n * P;
  float *y = a + (n + 1) * P + K + 1 + KB, *y2 = y + n * 2 * K;
  const float *taps = read->taps + (int64_t)first * h->all * C;
  double *to = read->out + (int64_t)first * read->width;
  int finite;
  globals(h, n, site, read->sites ? read->sites + first : NULL, taps, read->used ? read->used + first : NULL, x, u, z, alpha, g);
  if (site == PROMPT) {
    const int values = h->last_w[VALUE_HEAD] != NULL;
    finite = head(h, PLAN_HEAD, n, g, a, y, K) && (!values || head(h, VALUE_HEAD, n, g, a, y2, 2 * K));
    for (int r = 0; r < n && finite; r++)
      choose(card, K, y + r * K, values ? y2 + r * 2 * K : NULL, to + r * read->width);
  } else {
    finite = head(h, CONFIDENCE_HEAD, n, g, a, y, 1) && (site == END || head(h, BUDGET_HEAD, n, g, a, y2, 1));
    for (int r = 0; r < n && finite; r++, to += read->width) {
      const int s = read->sites ? read->sites[first + r] : site;
      double *at = to;
      if (site != END) {
        *at++ = s == END ? NAN : tokens_of(y2[r]);
        *at++ = s == END ? NAN : clipped(y2[r], card->offset[s]);
      }
      *at++ = card->present ? sigmoid(y[r] / card->temperature[s] + card->shift[s]) : NAN;
      *at++ = y[r];
      if (read->vectors)
        gate(h, g + r * P, read->plan[first + r], y[r], a, read->vectors + (int64_t)(first + r) * C);
      if (site == THINK)
        *at = card->present ? distance(card, C, taps + ((int64_t)r * h->all + card->layer) * C, x, x + C) : NAN;
    }
  }
  if (!finite) atomic_store(&read->failed, 2);
  free(room);
}

/* taps [N, A, C] at `site`, used [N] tokens so far (NULL: 0) -> out [N, width] numbers a row:
   PROMPT chosen plan, probability of each plan · THINK expected tokens, clipped, confidence, its logit, distance ·
   END confidence, logit · BOUNDARY expected remainder, upper bound, confidence, logit.
   With `sites` [N] rows of END and BOUNDARY together, all as at BOUNDARY (END: no remainder, no bound).
   At THINK also the gate's vectors [N, C] under `plan` [N], where they are asked for (else NULL).
   Returns 0 without memory, -1 where a head gave no finite number. */
int gn_read(const Heads *h, const Card *card, int site, int rows, const float *taps, const float *used,
            const int32_t *sites, const int32_t *plan, float *vectors, double *out, int width, int threads) {
  int share = (rows + threads - 1) / threads;
  share = share > GROUP ? GROUP : share;
  Read read = {h, card, site, rows, share, width, sites, taps, used, plan, vectors, out, 0};
  pool_run(chunk, &read, (rows + share - 1) / share, threads);
  const int failed = atomic_load(&read.failed);
  return failed == 2 ? -1 : !failed;
}
