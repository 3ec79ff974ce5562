/* One step of a Llama-family model on a CPU: many sequences, each with its own length, no padding anywhere.

   Legend: M tokens of a step (of several rows = sequences), L layers, C channels, H heads, K heads of keys and values,
   D head size, F MLP width, V vocabulary, S capacity of a slot.

   A step of few tokens is reading the weights: threads share the outputs of every product, so that each weight is read
   once, by one of them. Every number of a row is computed in an order that depends on that row alone: results do not
   change with what else is in the step, with how a row is cut into steps or with the number of threads. Weights are
   float32 where the model keeps them (dense.h), or int8 (int8.h) with activations rounded to 16 bits for every product.
   The model of transformers is the definition; tests/model/test_llama_native.py holds this file to it. */

#include <stdatomic.h>

#include "attention.h"
#include "dense.h"
#include "int8.h"
#include "steer.h"

#define GROUP 128 /* tokens that pass through all layers together, so that activations stay in caches */
#define TILE 32   /* outputs of a chunk of work: two units, or one int8 panel, and a block of rounded activations */
#define FEW 4     /* rows that one thread does by itself */

typedef struct {
  int32_t vocab, channels, layers, heads, shared, size, ffn, int8;
  float eps;
} Shape;

typedef struct { /* weights: [outputs, inputs], or int8 panels; bias may be NULL */
  const void *weights;
  const float *bias;
  int32_t outputs, inputs;
} Matrix;

typedef struct {
  const float *attention_gain, *mlp_gain;
  Matrix q, k, v, out, gate, up, down;
} Layer;

typedef struct {
  Shape s;
  const float *embed, *gain, *rope; /* embed [V, C]; rope [context, 2, D/2] */
  Matrix head;
  Layer layer[];
} Model;

int64_t gn_model_size(const Shape *s) { return sizeof(Model) + sizeof(Layer) * (int64_t)s->layers; }

typedef struct { /* a group of M tokens on its way through the layers */
  const Model *model;
  Cache *cache;
  const Layer *layer;
  int index, M, threads;
  float *x, *y, *qkv, *z, *wide; /* [M, C], [M, C], [M, (H + 2K) D], [M, H D], [M, F] */
  Rounded narrow, inner;         /* y, and z or wide, as int8 */
  const float *gain, *source;    /* what a rows phase works on */
  float *logits;
  int32_t *slot, *place;
  atomic_int failed;
} Pass;

static void phase(Pass *p, Chunk chunk, int chunks) { pool_run(chunk, p, chunks, p->threads); }

static void rows_phase(Pass *p, Chunk chunk) { phase(p, chunk, (p->M + FEW - 1) / FEW); }

#define EACH_ROW(p, c, m) for (int m = (c)*FEW; m < (p)->M && m < ((c) + 1) * FEW; m++)

/* y = norm(source) * gain, rounded where the products want it */
static void norm_rows(void *all, int c) {
  Pass *p = all;
  const int C = p->model->s.channels;
  EACH_ROW(p, c, m) {
    const float *x = p->source + (int64_t)m * C;
    float *y = p->y + (int64_t)m * C, square = 0;
    for (int i = 0; i < C; i++) square += x[i] * x[i];
    const float scale = 1.0f / sqrtf(square / C + p->model->s.eps);
    for (int i = 0; i < C; i++) y[i] = p->gain[i] * (x[i] * scale);
    if (p->model->s.int8) round_row(y, C, &p->narrow, m);
  }
}

static void norm(Pass *p, const float *source, const float *gain) {
  p->source = source, p->gain = gain;
  rows_phase(p, norm_rows);
}

static int tiles(const Matrix *w) { return (w->outputs + TILE - 1) / TILE; }

/* where the weights of a tile begin */
static const char *tile_at(const Pass *p, const Matrix *w, int t) {
  const int64_t bytes = p->model->s.int8 ? gn_int8_size(TILE, w->inputs) : (int64_t)sizeof(float) * TILE * w->inputs;
  return (const char *)w->weights + t * bytes;
}

/* to [M, TILE]: outputs t * TILE ... of all tokens; x [M, inputs], or the same as int8. `ahead`: the weights that this
   thread will probably need next, fetched meanwhile. Returns how many outputs there are. */
static int tile(const Pass *p, const Matrix *w, int t, const float *x, const Rounded *rounded, float *to,
                const char *ahead) {
  const int at = t * TILE, width = w->outputs - at < TILE ? w->outputs - at : TILE;
  const char *weights = tile_at(p, w, t), *second = weights + sizeof(float) * UNIT * w->inputs;
  if (p->model->s.int8)
    int8_panel(rounded, p->M, (const uint8_t *)weights, blocks_of(w->inputs), to, (const uint8_t *)ahead);
  else if (width <= UNIT)
    dense_unit(x, w->inputs, p->M, (const float *)weights, width, w->inputs, to, TILE, ahead);
  else {
    dense_unit(x, w->inputs, p->M, (const float *)weights, UNIT, w->inputs, to, TILE, second);
    dense_unit(x, w->inputs, p->M, (const float *)second, width - UNIT, w->inputs, to + UNIT, TILE, ahead);
  }
  if (w->bias)
    for (int m = 0; m < p->M; m++)
      for (int i = 0; i < width; i++) to[m * TILE + i] += w->bias[at + i];
  return width;
}

static void qkv_tile(void *all, int c) {
  Pass *p = all;
  float room[GROUP * TILE];
  const Layer *l = p->layer;
  const Matrix *w = &l->q;
  int at = 0;
  if (c >= tiles(w)) c -= tiles(w), at += w->outputs, w = &l->k;
  if (w == &l->k && c >= tiles(w)) c -= tiles(w), at += w->outputs, w = &l->v;
  const int width = tile(p, w, c, p->y, &p->narrow, room, tile_at(p, w, c + p->threads));
  const int64_t all_outputs = l->q.outputs + l->k.outputs + l->v.outputs;
  for (int m = 0; m < p->M; m++)
    memcpy(p->qkv + m * all_outputs + at + c * TILE, room + m * TILE, width * sizeof(float));
}

static void add_tile(Pass *p, const Matrix *w, int c, const float *x) {
  float room[GROUP * TILE];
  const int C = p->model->s.channels, width = tile(p, w, c, x, &p->inner, room, tile_at(p, w, c + p->threads));
  for (int m = 0; m < p->M; m++)
    for (int i = 0; i < width; i++) p->x[(int64_t)m * C + c * TILE + i] += room[m * TILE + i];
}

static void out_tile(void *all, int c) {
  Pass *p = all;
  add_tile(p, &p->layer->out, c, p->z);
}

static void down_tile(void *all, int c) {
  Pass *p = all;
  add_tile(p, &p->layer->down, c, p->wide);
}

/* gate = silu(gate) * up */
static inline void gated(float *gate, const float *up) {
  const vkb g = *(vkb *)gate, e = exp_block((vkb)((ikb)g | ((ikb){0} + INT32_MIN))); /* of -|g| */
  const ikb positive = g >= 0.0f;
  const vkb one = (vkb){0} + 1.0f, top = (vkb)((positive & (ikb)one) | (~positive & (ikb)e));
  *(vkb *)gate = g * top / (one + e) * *(const vkb *)up;
}

static void gate_tile(void *all, int c) {
  Pass *p = all;
  float room[2][GROUP * TILE];
  const Matrix *up = &p->layer->up;
  const int width = tile(p, &p->layer->gate, c, p->y, &p->narrow, room[0], tile_at(p, up, c));
  tile(p, up, c, p->y, &p->narrow, room[1], tile_at(p, &p->layer->gate, c + p->threads));
  const int F = p->layer->gate.outputs, blocks = blocks_of(F);
  for (int m = 0; m < p->M; m++) {
    float *gate = room[0] + m * TILE;
    for (int i = width; i < TILE; i++) gate[i] = room[1][m * TILE + i] = 0;
    for (int i = 0; i < TILE; i += KB) gated(gate + i, room[1] + m * TILE + i);
    const int64_t block = (int64_t)m * blocks + c;
    if (p->model->s.int8)
      round_block(gate, width, p->inner.number + block * BLOCK * 2, p->inner.scale + block, p->inner.sum + block);
    else
      memcpy(p->wide + (int64_t)m * F + c * TILE, gate, width * sizeof(float));
  }
}

static void head_tile(void *all, int c) {
  Pass *p = all;
  float room[GROUP * TILE];
  const Matrix *w = &p->model->head;
  const int width = tile(p, w, c, p->y, &p->narrow, room, tile_at(p, w, c + p->threads));
  for (int m = 0; m < p->M; m++)
    memcpy(p->logits + (int64_t)m * w->outputs + c * TILE, room + m * TILE, width * sizeof(float));
}

/* turn queries and keys, keep keys and values */
static void place_rows(void *all, int c) {
  Pass *p = all;
  const Shape *s = &p->model->s;
  const int H = s->heads, K = s->shared, D = s->size;
  EACH_ROW(p, c, m) {
    float *row = p->qkv + (int64_t)m * (H + 2 * K) * D;
    for (int h = 0; h < H + K; h++) rotate(row + h * D, p->model->rope + (int64_t)p->place[m] * D, D / 2);
    for (int h = 0; h < K; h++)
      keep(p->cache, where(p->cache, p->index, p->slot[m], h, K, D), p->place[m], D, row + (H + h) * D,
           row + (H + K + h) * D);
  }
}

static Head head_of(const Pass *p, int item) {
  const Shape *s = &p->model->s;
  const int m = item / s->shared;
  const int64_t base = where(p->cache, p->index, p->slot[m], item % s->shared, s->shared, s->size);
  return (Head){p->cache->keys + base, p->cache->values + base, p->place[m] + 1};
}

/* one token's queries that share keys; the keys of the next come nearer meanwhile */
static void attend_item(void *all, int item) {
  Pass *p = all;
  const Shape *s = &p->model->s;
  const int m = item / s->shared, h = item % s->shared, D = s->size, G = s->heads / s->shared;
  const Head head = head_of(p, item), next = item + 1 < p->M * s->shared ? head_of(p, item + 1) : (Head){0};
  const Head none = {0};
  float small[4096], *scores = head.length + KB <= 4096 ? small : malloc(sizeof(float) * (head.length + KB));
  if (!scores) {
    atomic_store(&p->failed, 1);
    return;
  }
  const float *q = p->qkv + (int64_t)m * (s->heads + 2 * s->shared) * D + h * G * D;
  float *z = p->z + ((int64_t)m * s->heads + h * G) * D;
  for (int g = 0; g < G; g++) attend(q + g * D, &head, g + 1 < G ? &none : &next, D, scores, z + g * D);
  if (scores != small) free(scores);
}

static void round_rows(void *all, int c) {
  Pass *p = all;
  const int n = p->layer->out.inputs;
  EACH_ROW(p, c, m) round_row(p->z + (int64_t)m * n, n, &p->inner, m);
}

/* x through layer p->index; keys_only: nobody asks for what comes out of it */
static void layer(Pass *p, int keys_only) {
  const Layer *l = p->layer = &p->model->layer[p->index];
  norm(p, p->x, l->attention_gain);
  phase(p, qkv_tile, tiles(&l->q) + tiles(&l->k) + tiles(&l->v));
  rows_phase(p, place_rows);
  if (keys_only) return;
  phase(p, attend_item, p->M * p->model->s.shared);
  if (p->model->s.int8) rows_phase(p, round_rows);
  phase(p, out_tile, tiles(&l->out));
  norm(p, p->x, l->mlp_gain);
  phase(p, gate_tile, tiles(&l->gate));
  phase(p, down_tile, tiles(&l->down));
}

static void rounded_room(char **at, Rounded *r, int M, int inputs) {
  const int64_t blocks = (int64_t)M * blocks_of(inputs);
  r->number = carve(at, blocks * BLOCK * 2);
  r->scale = carve(at, blocks * 4);
  r->sum = carve(at, blocks * 4);
}

/* Room for groups of M tokens and for `wanted` last states in front of it. NULL when there is none. */
static float *pass_room(Pass *p, int64_t M, int64_t wanted) {
  const Shape *s = &p->model->s;
  const int64_t C = s->channels, heads = (int64_t)s->heads * s->size, F = s->int8 ? 0 : s->ffn;
  char *base = NULL, *at = NULL;
  float *last = NULL;
  for (int pass = 0; pass < 2; pass++) {
    if (pass) base = at = aligned_alloc(64, ((int64_t)(intptr_t)at + 63) / 64 * 64);
    if (pass && !base) return NULL;
    last = carve(&at, 4 * wanted * C);
    p->x = carve(&at, 4 * M * C);
    p->y = carve(&at, 4 * M * C);
    p->qkv = carve(&at, 4 * M * (heads + 2 * s->shared * s->size));
    p->z = carve(&at, 4 * M * heads);
    p->wide = carve(&at, 4 * M * F);
    if (s->int8) {
      rounded_room(&at, &p->narrow, (int)M, s->channels);
      rounded_room(&at, &p->inner, (int)M, s->ffn > heads ? s->ffn : (int)heads);
    }
    p->slot = carve(&at, 4 * M);
    p->place = carve(&at, 4 * M);
  }
  return last;
}

/* The final norm, the last entry of taps and the head, for the states of all wanted tokens; owner: places in taps. */
static void finish(Pass *p, const float *last, const int32_t *owner, int wanted, int most, float *logits, float *taps) {
  const Shape *s = &p->model->s;
  const int64_t C = s->channels;
  for (int w = 0; w < wanted; w += p->M) {
    p->M = wanted - w < most ? wanted - w : most;
    norm(p, last + w * C, p->model->gain);
    for (int m = 0; taps && m < p->M; m++)
      if (owner[w + m] >= 0)
        memcpy(taps + ((owner[w + m] + 1LL) * s->layers - 1) * C, p->y + m * C, sizeof(float) * C);
    p->logits = logits + (int64_t)w * s->vocab;
    if (logits) phase(p, head_tile, tiles(&p->model->head));
  }
}

/* R rows: slots [R] (all different), counts [R] >= 1 new tokens each, ids flat. logits [R, V] of each row's last token,
   or [tokens, V] where `every`; taps [W, L, C] of the last tokens of the rows whose tap_at [R] is not -1; either NULL.
   Returns 0 when memory ran out. */
int gn_step(const Model *model, Cache *cache, int rows, const int32_t *slots, const int32_t *counts, const int32_t *ids,
            int every, float *logits, float *taps, const int32_t *tap_at, const Steer *steer,
            int threads) {
  const Shape *s = &model->s;
  const int64_t C = s->channels;
  int64_t total = 0;
  for (int r = 0; r < rows; r++) total += counts[r];
  const int wanted = logits || taps ? (every ? (int)total : rows) : 0, most = total < GROUP ? (int)total : GROUP;
  Pass p = {.model = model, .cache = cache, .threads = threads};
  int32_t *owner = malloc(sizeof(int32_t) * ((size_t)wanted + 1)); /* wanted token -> its place in taps, or -1 */
  float *last = pass_room(&p, most, wanted), *kept = last;
  if (!last || !owner) {
    free(last), free(owner);
    return 0;
  }
  int row = 0, token = 0, found = 0; /* where the next group begins: token of row */
  for (int64_t done = 0; done < total; done += p.M) {
    p.M = total - done < most ? (int)(total - done) : most;
    const int first = row, begin = token;
    for (int m = 0; m < p.M; m++) {
      p.slot[m] = slots[row];
      p.place[m] = cache->lengths[slots[row]] + token;
      memcpy(p.x + m * C, model->embed + ids[done + m] * C, sizeof(float) * C);
      if (++token == counts[row]) token = 0, row++;
    }
    for (p.index = 0; p.index < s->layers; p.index++) {
      layer(&p, !wanted && p.index == s->layers - 1);
      for (int m = 0; steers(steer, p.index) && m < p.M; m++)
        steer_token(steer, p.index, (int)(done + m), p.x + m * C, 1, (int)C);
      for (int m = 0, r = first, t = begin; taps && p.index < s->layers - 1 && m < p.M; m++)
        if (++t == counts[r]) {
          if (tap_at[r] >= 0)
            memcpy(taps + ((int64_t)tap_at[r] * s->layers + p.index) * C, p.x + m * C, sizeof(float) * C);
          t = 0, r++;
        }
    }
    for (int m = 0, r = first, t = begin; wanted && m < p.M; m++) {
      const int end = ++t == counts[r];
      if (end || every) {
        owner[found++] = end && taps ? tap_at[r] : -1;
        memcpy(kept, p.x + m * C, sizeof(float) * C);
        kept += C;
      }
      if (end) t = 0, r++;
    }
  }
  finish(&p, last, owner, wanted, most, logits, taps);
  const int failed = atomic_load(&p.failed);
  for (int r = 0; r < rows && !failed; r++) cache->lengths[slots[r]] += counts[r];
  free(last), free(owner);
  return !failed;
}
