/* One step of gnomon's own decoder on a CPU: many sequences, each with its own length, no padding anywhere.

   Legend: R rows (sequences) of a step, n residual streams, C channels, H heads, D head size, F MLP width, P entries of
   the mHC coefficients (2n + permutations, or 2n + n*n), V vocabulary, K tokens before, S capacity of a slot.

   Every number of a row is computed in an order that depends on that row alone: results do not change with what else
   is in the step, with how a row is cut into steps or with the number of threads. model/decoder.py is the definition;
   tests/model/test_native.py holds this file to it. Rows are dealt to threads, so no thread waits for another. */

#include <stdatomic.h>

#include "attention.h"
#include "steer.h"

#define EPS 1e-6f
#define GROUP 128 /* tokens of several rows that pass through all layers together, so that activations stay in caches */

typedef struct {
  int32_t vocab, channels, layers, heads, ffn, context, before, streams, sinkhorn; /* sinkhorn: iterations, 0 = exact */
} Shape;

typedef struct { /* one sublayer's hyper-connection */
  const float *phi, *alpha, *bias, *table; /* phi packed [n*C -> P]; table [P - 2n, n*n] permutations */
} Hyper;

typedef struct {
  const float *qkv, *out, *gain, *up, *down; /* packed, gain [H] */
  Hyper hyper[2];
} Layer;

typedef struct {
  Shape s;
  const float *embed, *before, *unembed, *rope; /* embed [V, C]; before, unembed packed; rope [context, 2, D/2] */
  Layer layer[];
} Model;

int64_t gn_model_size(const Shape *s) { return sizeof(Model) + sizeof(Layer) * (int64_t)s->layers; }

static float dot_self(const float *x, int n) {
  float sum = 0;
  for (int i = 0; i < n; i++) sum += x[i] * x[i];
  return sum;
}

static void rms(const float *x, int n, float *y) {
  const float scale = 1.0f / sqrtf(dot_self(x, n) / n + EPS);
  for (int i = 0; i < n; i++) y[i] = x[i] * scale;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* raw [P] -> pre [n], post [n], comb [n, n] (comb[j][k] = H_res[k][j]) */
static void coefficients(const Hyper *h, const Shape *s, const float *x, float *raw, float *pre, float *post,
                         float *comb) {
  const int n = s->streams, square = n * n;
  int residual = square;
  if (!s->sinkhorn) {
    residual = 1;
    for (int i = 2; i <= n; i++) residual *= i;
  }
  const float inverse = 1.0f / sqrtf(dot_self(x, n * s->channels) / (n * s->channels) + EPS);
  for (int i = 0; i < n; i++) {
    pre[i] = sigmoid(raw[i] * inverse * h->alpha[0] + h->bias[i]);
    post[i] = 2.0f * sigmoid(raw[n + i] * inverse * h->alpha[1] + h->bias[n + i]);
  }
  float *w = raw + 2 * n, top = -INFINITY, sum = 0;
  for (int i = 0; i < residual; i++) w[i] = w[i] * inverse * h->alpha[2] + h->bias[2 * n + i];
  if (!s->sinkhorn) {
    for (int i = 0; i < residual; i++) top = w[i] > top ? w[i] : top;
    for (int i = 0; i < residual; i++) sum += w[i] = expf(w[i] - top);
    memset(comb, 0, square * sizeof(float));
    for (int i = 0; i < residual; i++) {
      const float p = w[i] / sum;
      for (int e = 0; e < square; e++) comb[e] += p * h->table[i * square + e];
    }
    return;
  }
  for (int j = 0; j < n; j++) {
    float *row = w + j * n;
    top = -INFINITY, sum = 0;
    for (int k = 0; k < n; k++) top = row[k] > top ? row[k] : top;
    for (int k = 0; k < n; k++) sum += row[k] = expf(row[k] - top);
    for (int k = 0; k < n; k++) comb[j * n + k] = row[k] / sum + EPS;
  }
  for (int round = 0; round < s->sinkhorn; round++) {
    if (round)
      for (int j = 0; j < n; j++) {
        sum = EPS;
        for (int k = 0; k < n; k++) sum += comb[j * n + k];
        for (int k = 0; k < n; k++) comb[j * n + k] /= sum;
      }
    for (int k = 0; k < n; k++) {
      sum = EPS;
      for (int j = 0; j < n; j++) sum += comb[j * n + k];
      for (int j = 0; j < n; j++) comb[j * n + k] /= sum;
    }
  }
}

/* Streams x [M, n, C] -> normed input of the sublayer y [M, C]; keeps post and comb. One stream: y = norm(x). */
static void read_streams(const Hyper *h, const Shape *s, const float *x, int M, float *raw, int P, float *y,
                         float *post, float *comb) {
  const int n = s->streams, C = s->channels;
  if (n == 1) {
    for (int m = 0; m < M; m++) rms(x + (int64_t)m * C, C, y + (int64_t)m * C);
    return;
  }
  matmul(x, n * C, M, h->phi, P, n * C, raw, P);
  float pre[16];
  for (int m = 0; m < M; m++) {
    const float *row = x + (int64_t)m * n * C;
    float *to = y + (int64_t)m * C;
    coefficients(h, s, row, raw + (int64_t)m * P, pre, post + m * n, comb + m * n * n);
    for (int c = 0; c < C; c++) to[c] = pre[0] * row[c];
    for (int j = 1; j < n; j++)
      for (int c = 0; c < C; c++) to[c] += pre[j] * row[j * C + c];
    rms(to, C, to);
  }
}

/* x[k] = sum_j comb[j][k] x[j] + post[k] z, in place; old [n, C] is scratch */
static void write_streams(const Shape *s, float *x, int M, const float *z, const float *post, const float *comb,
                          float *old) {
  const int n = s->streams, C = s->channels;
  for (int m = 0; m < M; m++) {
    float *row = x + (int64_t)m * n * C;
    const float *add = z + (int64_t)m * C;
    if (n == 1) {
      for (int c = 0; c < C; c++) row[c] += add[c];
      continue;
    }
    memcpy(old, row, sizeof(float) * n * C);
    for (int k = 0; k < n; k++) {
      float *to = row + k * C;
      const float p = post[m * n + k];
      for (int c = 0; c < C; c++) to[c] = p * add[c];
      for (int j = 0; j < n; j++) {
        const float w = comb[(m * n + j) * n + k];
        for (int c = 0; c < C; c++) to[c] += w * old[j * C + c];
      }
    }
  }
}

typedef struct { /* activations of a group of M tokens */
  float *x, *y, *z, *wide, *raw, *post, *comb, *scores, *near;
  int32_t *slot, *place;
} Scratch;

static int coefficient_count(const Shape *s) {
  int residual = 1;
  for (int i = 2; i <= s->streams; i++) residual *= i;
  return 2 * s->streams + (s->sinkhorn ? s->streams * s->streams : residual);
}

static int scratch_new(Scratch *w, const Shape *s, int M, int64_t capacity) {
  const int64_t C = s->channels, n = s->streams, P = coefficient_count(s);
  const int64_t width = 3 * C > s->ffn * C ? 3 * C : s->ffn * C, deep = s->before * C;
  char *at = NULL;
  for (int pass = 0; pass < 2; pass++) {
    if (pass) {
      char *base = aligned_alloc(64, ((int64_t)(intptr_t)at + 63) / 64 * 64);
      if (!base) return 0;
      at = base;
    }
    w->x = carve(&at, 4 * M * n * C);
    w->y = carve(&at, 4 * M * C);
    w->z = carve(&at, 4 * M * C);
    w->wide = carve(&at, 4 * M * width);
    w->raw = carve(&at, 4 * M * P);
    w->post = carve(&at, 4 * M * n);
    w->comb = carve(&at, 4 * M * n * n);
    w->scores = carve(&at, 4 * (capacity + KB));
    w->near = carve(&at, 4 * (M * deep > n * C ? M * deep : n * C)); /* also the old streams of one token */
    w->slot = carve(&at, 4 * M);
    w->place = carve(&at, 4 * M);
  }
  return 1;
}

static void attention(const Model *model, const Layer *layer, Cache *cache, int index, Scratch *w, int M) {
  const Shape *s = &model->s;
  const int C = s->channels, H = s->heads, D = C / H;
  matmul(w->y, C, M, layer->qkv, 3 * C, C, w->wide, 3 * C);
  for (int m = 0; m < M; m++) {
    float *row = w->wide + (int64_t)m * 3 * C;
    const float *table = model->rope + (int64_t)w->place[m] * D;
    for (int h = 0; h < H; h++) {
      float *q = row + h * D, *k = row + C + h * D, *v = row + 2 * C + h * D;
      rms(q, D, q);
      rms(k, D, k);
      rotate(q, table, D / 2);
      rotate(k, table, D / 2);
      for (int d = 0; d < D; d++) q[d] *= layer->gain[h];
      keep(cache, where(cache, index, w->slot[m], h, H, D), w->place[m], D, k, v);
    }
  }
  for (int i = 0; i < M * H; i++) {
    Head both[2]; /* this head and the next one */
    for (int j = 0; j < 2; j++) {
      const int at = i + j < M * H ? i + j : i, m = at / H;
      const int64_t base = where(cache, index, w->slot[m], at % H, H, D);
      both[j] = (Head){cache->keys + base, cache->values + base, w->place[m] + 1};
    }
    const int64_t m = i / H, h = i % H;
    attend(w->wide + m * 3 * C + h * D, &both[0], &both[1], D, w->scores, w->z + m * C + h * D);
  }
  matmul(w->z, C, M, layer->out, C, C, w->y, C);
}

static void inputs(const Model *model, Cache *cache, Scratch *w, int rows, const int32_t *slots, const int32_t *counts,
                   const int32_t *ids) {
  const Shape *s = &model->s;
  const int C = s->channels, K = s->before;
  int m = 0;
  for (int r = 0; r < rows; r++) {
    int32_t *line = cache->ids + (int64_t)slots[r] * cache->capacity;
    for (int t = 0; t < counts[r]; t++, m++) {
      const int at = cache->lengths[slots[r]] + t;
      w->slot[m] = slots[r];
      w->place[m] = at;
      line[at] = ids[m];
      float *near = w->near + (int64_t)m * K * C;
      for (int k = 1; k <= K; k++, near += C)
        if (at >= k)
          memcpy(near, model->embed + (int64_t)line[at - k] * C, sizeof(float) * C);
        else
          memset(near, 0, sizeof(float) * C);
    }
  }
  matmul(w->near, K * C, m, model->before, C, K * C, w->y, C);
  for (int i = 0; i < m; i++) {
    float *y = w->y + (int64_t)i * C;
    const float *e = model->embed + (int64_t)ids[i] * C;
    for (int c = 0; c < C; c++) y[c] += e[c];
    rms(y, C, y);
    for (int j = 0; j < s->streams; j++) memcpy(w->x + ((int64_t)i * s->streams + j) * C, y, sizeof(float) * C);
  }
}

static void collapse(const Shape *s, const float *x, float *to) {
  const int n = s->streams, C = s->channels;
  for (int c = 0; c < C; c++) to[c] = x[c];
  for (int j = 1; j < n; j++)
    for (int c = 0; c < C; c++) to[c] += x[j * C + c];
  if (n > 1)
    for (int c = 0; c < C; c++) to[c] *= 1.0f / n;
}

/* A group of rows through the net. logits [rows, V] of each row's last token, or of every token where `every`; taps
   [wanted, L, C] of the last tokens of the rows whose tap_at [rows] is not -1; either may be NULL. */
static void group(const Model *model, Cache *cache, Scratch *w, int rows, const int32_t *slots, const int32_t *counts,
                  const int32_t *ids, int M, int every, float *logits, float *taps, const int32_t *tap_at,
                  const Steer *steer) {
  const Shape *s = &model->s;
  const int C = s->channels, n = s->streams, P = coefficient_count(s), F = s->ffn * C;
  inputs(model, cache, w, rows, slots, counts, ids);
  for (int l = 0; l < s->layers; l++) {
    const Layer *layer = &model->layer[l];
    read_streams(&layer->hyper[0], s, w->x, M, w->raw, P, w->y, w->post, w->comb);
    attention(model, layer, cache, l, w, M);
    write_streams(s, w->x, M, w->y, w->post, w->comb, w->near);
    read_streams(&layer->hyper[1], s, w->x, M, w->raw, P, w->y, w->post, w->comb);
    matmul(w->y, C, M, layer->up, F, C, w->wide, F);
    for (int64_t i = 0; i < (int64_t)M * F; i++) w->wide[i] = w->wide[i] > 0 ? w->wide[i] * w->wide[i] : 0.0f;
    matmul(w->wide, F, M, layer->down, C, F, w->z, C);
    write_streams(s, w->x, M, w->z, w->post, w->comb, w->near);
    if (steers(steer, l))
      for (int m = 0; m < M; m++) steer_token(steer, l, m, w->x + (int64_t)m * n * C, n, C);
    if (taps)
      for (int r = 0, m = -1; r < rows; r++) {
        m += counts[r];
        if (tap_at[r] >= 0) collapse(s, w->x + (int64_t)m * n * C, taps + ((int64_t)tap_at[r] * s->layers + l) * C);
      }
  }
  if (logits) {
    int kept = 0;
    for (int r = 0, m = -1; r < rows; r++)
      for (int t = 1; t <= counts[r]; t++) {
        m++;
        if (!every && t < counts[r]) continue;
        float *to = w->z + (int64_t)kept++ * C;
        collapse(s, w->x + (int64_t)m * n * C, to);
        rms(to, C, to);
      }
    matmul(w->z, C, kept, model->unembed, s->vocab, C, logits, s->vocab);
  }
  for (int r = 0; r < rows; r++) cache->lengths[slots[r]] += counts[r];
}

typedef struct { /* one call of gn_step, cut into chunks of neighbouring rows */
  const Model *model;
  Cache *cache;
  const int32_t *slots, *counts, *ids;
  const int32_t *first, *token; /* [chunks + 1]: first row and first token of every chunk */
  int every;
  float *logits, *taps;
  const int32_t *tap_at;
  const Steer *steer;
  atomic_int failed;
} Job;

static void chunk(void *all, int c) {
  Job *job = all;
  const Shape *s = &job->model->s;
  const int row = job->first[c], rows = job->first[c + 1] - row;
  const int64_t token = job->token[c], M = job->token[c + 1] - token;
  Scratch w;
  Steer steer = job->steer ? *job->steer : (Steer){0};
  if (job->steer) steer.at += token;
  if (!scratch_new(&w, s, (int)M, job->cache->capacity)) {
    atomic_store(&job->failed, 1);
    return;
  }
  group(job->model, job->cache, &w, rows, job->slots + row, job->counts + row, job->ids + token, (int)M, job->every,
        job->logits ? job->logits + (job->every ? token : row) * s->vocab : NULL,
        job->taps, job->taps ? job->tap_at + row : NULL, job->steer ? &steer : NULL);
  free(w.x);
}

/* R rows: slots [R] (all different), counts [R] >= 1 new tokens each, ids flat; see `group` for the rest.
   Returns 0 when memory ran out. */
int gn_step(const Model *model, Cache *cache, int rows, const int32_t *slots, const int32_t *counts, const int32_t *ids,
            int every, float *logits, float *taps, const int32_t *tap_at, const Steer *steer,
            int threads) {
  int64_t total = 0;
  for (int r = 0; r < rows; r++) total += counts[r];
  /* One chunk a thread, because every chunk reads all weights once more; but no more than GROUP tokens in one. */
  int64_t share = (total + threads - 1) / threads;
  share = share > GROUP ? GROUP : share;
  int32_t *cut = malloc(sizeof(int32_t) * 2 * ((size_t)rows + 1));
  if (!cut) return 0;
  int chunks = 0;
  int64_t token = 0, held = 0;
  for (int r = 0; r < rows; r++) {
    if (r == 0 || held + counts[r] > share) {
      cut[chunks] = r, cut[rows + 1 + chunks++] = (int32_t)token;
      held = 0;
    }
    held += counts[r];
    token += counts[r];
  }
  cut[chunks] = rows, cut[rows + 1 + chunks] = (int32_t)token;
  Job job = {model, cache, slots, counts, ids, cut, cut + rows + 1, every, logits, taps, tap_at, steer, 0};
  pool_run(chunk, &job, chunks, threads);
  free(cut);
  return !atomic_load(&job.failed);
}
