/* Slots of keys and values, and attention over them: what the decoders' steps share.

   Keys are kept in blocks of KB positions, [block][D][KB], values as [S][D]. D: head size, H: heads of keys and values,
   S: capacity of a slot. */

#ifndef GN_ATTENTION
#define GN_ATTENTION
#include "matrix.h"

typedef struct { /* keys [L, slots, H, S/KB, D, KB], values [L, slots, H, S, D], lengths [slots], ids [slots, S] */
  float *keys, *values;
  int32_t *lengths, *ids;
  int64_t slots, capacity; /* capacity: a multiple of KB */
} Cache;

/* where the keys and the values of a head begin */
static int64_t where(const Cache *cache, int layer, int slot, int head, int H, int D) {
  return (((int64_t)layer * cache->slots + slot) * H + head) * cache->capacity * D;
}

/* k, v [D] become position `at` of the head that begins at `base` */
static void keep(Cache *cache, int64_t base, int at, int D, const float *k, const float *v) {
  float *block = cache->keys + base + (int64_t)(at / KB) * D * KB + at % KB;
  for (int d = 0; d < D; d++) block[d * KB] = k[d];
  memcpy(cache->values + base + (int64_t)at * D, v, sizeof(float) * D);
}

/* channels i and i + half turn together; table: half cosines, half sines */
static void rotate(float *x, const float *table, int half) {
  for (int i = 0; i < half; i++) {
    const float a = x[i], b = x[half + i], cos = table[i], sin = table[half + i];
    x[i] = a * cos - b * sin;
    x[half + i] = a * sin + b * cos;
  }
}

typedef struct { /* one head of one row: keys [length/KB][D][KB], values [length][D] */
  const float *keys, *values;
  int length;
} Head;

/* Bring a block of keys and its values, KB positions each, nearer to the processor. */
static inline void prefetch(const Head *head, int block, int D) {
  if (block * KB >= head->length) return;
  const char *k = (const char *)(head->keys + (int64_t)block * D * KB);
  const char *v = (const char *)(head->values + (int64_t)block * D * KB);
  for (int i = 0; i < D * KB * 4; i += 64) {
    __builtin_prefetch(k + i);
    __builtin_prefetch(v + i);
  }
}

/* scores [blocks * KB] = q . keys: four blocks at a time, because one sum alone waits for itself */
static void score(const float *q, const Head *head, const Head *next, int blocks, int D, float *scores) {
  const float scale = 1.0f / sqrtf((float)D);
  int b = 0;
  for (; b + 4 <= blocks; b += 4) {
    const float *k = head->keys + (int64_t)b * D * KB;
    vkb s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    for (int d = 0; d < D; d++) {
      s0 += q[d] * *(const vkb *)(k + d * KB);
      s1 += q[d] * *(const vkb *)(k + (D + d) * KB);
      s2 += q[d] * *(const vkb *)(k + (2 * D + d) * KB);
      s3 += q[d] * *(const vkb *)(k + (3 * D + d) * KB);
    }
    *(vkb *)(scores + b * KB) = s0 * scale;
    *(vkb *)(scores + (b + 1) * KB) = s1 * scale;
    *(vkb *)(scores + (b + 2) * KB) = s2 * scale;
    *(vkb *)(scores + (b + 3) * KB) = s3 * scale;
    for (int i = 0; i < 4; i++) prefetch(next, b + i, D);
  }
  for (; b < blocks; b++) {
    const float *k = head->keys + (int64_t)b * D * KB;
    vkb s0 = {0};
    for (int d = 0; d < D; d++) s0 += q[d] * *(const vkb *)(k + d * KB);
    *(vkb *)(scores + b * KB) = s0 * scale;
    prefetch(next, b, D);
  }
}

/* o [D] = sum_t p[t] values[t]: four positions at a time, KB channels at a time where D allows it */
static void blend(const float *p, const Head *head, int D, float *o) {
  const int length = head->length;
  int d = 0;
  for (; d + KB <= D; d += KB) {
    const float *v = head->values + d;
    vkb s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
    int t = 0;
    for (; t + 4 <= length; t += 4) {
      s0 += p[t] * *(const vkb *)(v + (int64_t)t * D);
      s1 += p[t + 1] * *(const vkb *)(v + (int64_t)(t + 1) * D);
      s2 += p[t + 2] * *(const vkb *)(v + (int64_t)(t + 2) * D);
      s3 += p[t + 3] * *(const vkb *)(v + (int64_t)(t + 3) * D);
    }
    for (; t < length; t++) s0 += p[t] * *(const vkb *)(v + (int64_t)t * D);
    *(vkb *)(o + d) = (s0 + s1) + (s2 + s3);
  }
  for (; d < D; d++) {
    float sum = 0;
    for (int t = 0; t < length; t++) sum += p[t] * head->values[(int64_t)t * D + d];
    o[d] = sum;
  }
}

/* One query of one head: q [D] -> o [D]; scores has room for the length rounded up to KB; `next` comes after it */
static void attend(const float *q, const Head *head, const Head *next, int D, float *scores, float *o) {
  const int length = head->length, blocks = (length + KB - 1) / KB;
  score(q, head, next, blocks, D, scores);
  for (int t = length; t < blocks * KB; t++) scores[t] = -INFINITY;
  vkb high = *(vkb *)scores, total = {0};
  for (int b = 1; b < blocks; b++) {
    const vkb s = *(vkb *)(scores + b * KB);
    const ikb more = s > high;
    high = (vkb)((more & (ikb)s) | (~more & (ikb)high));
  }
  float top = high[0], sum = 0;
  for (int i = 1; i < KB; i++) top = high[i] > top ? high[i] : top;
  for (int b = 0; b < blocks; b++) {
    const vkb e = exp_block(*(vkb *)(scores + b * KB) - top);
    total += e;
    *(vkb *)(scores + b * KB) = e;
  }
  for (int i = 0; i < KB; i++) sum += total[i];
  blend(scores, head, D, o);
  const float inverse = 1.0f / sum;
  for (int d = 0; d < D; d++) o[d] *= inverse;
}

/* `bytes` of a block of memory that is laid out in two passes: first counted, then dealt */
static void *carve(char **at, int64_t bytes) {
  void *p = *at;
  *at += (bytes + 63) / 64 * 64;
  return p;
}
#endif
