/* Products with 8-bit weights: blocks of BLOCK inputs, a scale and a lowest weight for every output and block, a scale
   for the activations of every row and block.

   A panel holds LANES outputs, block after block: LANES scales, LANES lowest weights, then the steps above the lowest
   as unsigned bytes, [BLOCK / 4][LANES][4], as the processor's products want them. A block's sum of (low + scale u) x
   is scale sum u x + low sum x: sums of integers are exact, blocks are added up in ascending order. A row's result
   does not depend on its company.

   Activations are 16-bit numbers, high * 256 + low, both signed bytes, because rounding them to 8 bits costs more than
   rounding the weights (mean KL of SmolLM2 to float32: .003 of .004). */

#ifndef GN_INT8
#define GN_INT8
#include "matrix.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define BLOCK 32
#define LANES 32
#define STEPS 32639.0f /* of the extreme activation of a block: 127 * 256 + 127 */
#define BLOCK_BYTES (LANES * 8 + LANES * BLOCK)

typedef struct { /* rows of activations: bytes [M, blocks, high and low, BLOCK]; scales and sums [M, blocks] */
  int8_t *number;
  float *scale, *sum;
} Rounded;

static int blocks_of(int inputs) { return (inputs + BLOCK - 1) / BLOCK; }

int64_t gn_int8_size(int outputs, int inputs) {
  return (int64_t)((outputs + LANES - 1) / LANES) * blocks_of(inputs) * BLOCK_BYTES;
}

/* Rounds a block to low + scale * (0 ... 255); returns the sum of squared errors. */
static float try_steps(const float *from, float scale, float low, uint8_t *to) {
  const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
  float error = 0;
  for (int i = 0; i < BLOCK; i++) {
    float steps = rintf((from[i] - low) * inverse);
    steps = steps > 0.0f ? steps : 0.0f;
    steps = steps < 255.0f ? steps : 255.0f;
    const float off = from[i] - (low + steps * scale);
    error += off * off;
    to[i] = (uint8_t)(int32_t)steps;
  }
  return error;
}

/* The best of three: 255 steps from the least to the greatest, or steps with zero among them, 127 or 128 to the extreme
   one. Blocks that come from a file of 4 or 8 bits lose nothing. */
static void pack_block(const float *from, float *scale, float *low, uint8_t *to) {
  float least = from[0], most = from[0];
  for (int i = 1; i < BLOCK; i++) {
    least = from[i] < least ? from[i] : least;
    most = from[i] > most ? from[i] : most;
  }
  const float top = most > -least ? most : least, even = fabsf(top) / 127.0f, full = top / -128.0f;
  const float scales[3] = {(most - least) / 255.0f, even, full}, lows[3] = {least, -128.0f * even, -128.0f * full};
  float error = INFINITY;
  for (int c = 0; c < 3; c++) {
    uint8_t steps[BLOCK];
    const float off = try_steps(from, scales[c], lows[c], steps);
    if (off < error) {
      error = off, *scale = scales[c], *low = lows[c];
      memcpy(to, steps, BLOCK);
    }
  }
}

/* w [outputs, inputs], row after row -> panels; what lies beyond it meets activations of zero or is never read */
void gn_int8_pack(const float *w, int outputs, int inputs, uint8_t *to) {
  for (int p = 0; p * LANES < outputs; p++)
    for (int b = 0; b < blocks_of(inputs); b++, to += BLOCK_BYTES)
      for (int j = 0; j < LANES; j++) {
        float from[BLOCK] = {0}, scale = 0, low = 0;
        uint8_t steps[BLOCK] = {0};
        const int o = p * LANES + j, n = inputs - b * BLOCK < BLOCK ? inputs - b * BLOCK : BLOCK;
        if (o < outputs) {
          memcpy(from, w + (int64_t)o * inputs + b * BLOCK, n * sizeof(float));
          pack_block(from, &scale, &low, steps);
        }
        memcpy(to + 4 * j, &scale, 4);
        memcpy(to + 4 * (LANES + j), &low, 4);
        for (int i = 0; i < BLOCK; i++) to[LANES * 8 + i / 4 * LANES * 4 + j * 4 + i % 4] = steps[i];
      }
}

/* one block of one row, `n` numbers of it */
static inline void round_block(const float *x, int n, int8_t *number, float *scale, float *total) {
  float all[BLOCK] = {0};
  memcpy(all, x, n * sizeof(float));
#ifdef __AVX512F__
  const __m512 a = _mm512_loadu_ps(all), b = _mm512_loadu_ps(all + 16);
  const float top = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
  const __m512 inverse = _mm512_set1_ps(top > 1e-30f ? STEPS / top : 0.0f);
  const __m512i p = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)), q = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
  const __m512i half = _mm512_set1_epi32(128); /* the low byte is signed */
  _mm_storeu_si128((__m128i *)number, _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(p, half), 8)));
  _mm_storeu_si128((__m128i *)(number + 16), _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(q, half), 8)));
  _mm_storeu_si128((__m128i *)(number + BLOCK), _mm512_cvtepi32_epi8(p));
  _mm_storeu_si128((__m128i *)(number + BLOCK + 16), _mm512_cvtepi32_epi8(q));
  const int32_t sum = _mm512_reduce_add_epi32(_mm512_add_epi32(p, q));
#else
  float top = 0;
  for (int i = 0; i < BLOCK; i++) top = fabsf(all[i]) > top ? fabsf(all[i]) : top;
  const float inverse = top > 1e-30f ? STEPS / top : 0.0f;
  int32_t sum = 0;
  for (int i = 0; i < BLOCK; i++) {
    const int32_t q = (int32_t)lrintf(all[i] * inverse);
    number[i] = (int8_t)((q + 128) >> 8);
    number[BLOCK + i] = (int8_t)(q - number[i] * 256); /* the low byte is signed */
    sum += q;
  }
#endif
  *scale = top > 1e-30f ? top / STEPS : 0.0f;
  *total = *scale * (float)sum;
}

static void round_row(const float *x, int inputs, const Rounded *to, int64_t row) {
  const int blocks = blocks_of(inputs);
  for (int b = 0; b < blocks; b++) {
    const int64_t at = row * blocks + b;
    const int n = inputs - b * BLOCK < BLOCK ? inputs - b * BLOCK : BLOCK;
    round_block(x + b * BLOCK, n, to->number + at * BLOCK * 2, to->scale + at, to->sum + at);
  }
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define INT8(M)                                                                                           \
  static void int8_##M(const Rounded *x, int64_t row, const uint8_t *panel, int blocks, float *y,         \
                       const uint8_t *ahead, int lines) {                                                 \
    __m512 a[M], b[M];                                                                                    \
    for (int m = 0; m < M; m++) a[m] = b[m] = _mm512_setzero_ps();                                        \
    for (int k = 0; k < blocks; k++, panel += BLOCK_BYTES) {                                              \
      __m512i s[M], t[M], p[M], q[M]; /* sums with high bytes, then with low ones */                      \
      for (int i = 0; i < lines; i++, ahead += 64) __builtin_prefetch(ahead);                             \
      for (int m = 0; m < M; m++) s[m] = t[m] = p[m] = q[m] = _mm512_setzero_si512();                     \
      for (int i = 0; i < BLOCK / 4; i++) {                                                               \
        const uint8_t *w = panel + LANES * 8 + i * LANES * 4;                                             \
        const __m512i u = _mm512_loadu_si512(w), v = _mm512_loadu_si512(w + 64);                          \
        for (int m = 0; m < M; m++) {                                                                     \
          int32_t high, low;                                                                              \
          const int8_t *number = x->number + ((row + m) * blocks + k) * BLOCK * 2 + i * 4;                \
          memcpy(&high, number, 4);                                                                       \
          memcpy(&low, number + BLOCK, 4);                                                                \
          s[m] = _mm512_dpbusd_epi32(s[m], u, _mm512_set1_epi32(high));                                   \
          t[m] = _mm512_dpbusd_epi32(t[m], v, _mm512_set1_epi32(high));                                   \
          p[m] = _mm512_dpbusd_epi32(p[m], u, _mm512_set1_epi32(low));                                    \
          q[m] = _mm512_dpbusd_epi32(q[m], v, _mm512_set1_epi32(low));                                    \
        }                                                                                                 \
      }                                                                                                   \
      const __m512 first = _mm512_loadu_ps(panel), second = _mm512_loadu_ps(panel + 64);                  \
      const __m512 low = _mm512_loadu_ps(panel + 128), least = _mm512_loadu_ps(panel + 192);              \
      for (int m = 0; m < M; m++) {                                                                       \
        const __m512 scale = _mm512_set1_ps(x->scale[(row + m) * blocks + k]);                            \
        const __m512 sum = _mm512_set1_ps(x->sum[(row + m) * blocks + k]);                                \
        const __m512i c = _mm512_add_epi32(_mm512_slli_epi32(s[m], 8), p[m]);                             \
        const __m512i d = _mm512_add_epi32(_mm512_slli_epi32(t[m], 8), q[m]);                             \
        a[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c), _mm512_mul_ps(first, scale), a[m]);                 \
        b[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d), _mm512_mul_ps(second, scale), b[m]);                \
        a[m] = _mm512_fmadd_ps(low, sum, a[m]);                                                           \
        b[m] = _mm512_fmadd_ps(least, sum, b[m]);                                                         \
      }                                                                                                   \
    }                                                                                                     \
    for (int m = 0; m < M; m++) {                                                                         \
      _mm512_storeu_ps(y + m * LANES, a[m]);                                                              \
      _mm512_storeu_ps(y + m * LANES + 16, b[m]);                                                         \
    }                                                                                                     \
  }
INT8(1)
INT8(2)
INT8(4)
#else
static void int8_1(const Rounded *x, int64_t row, const uint8_t *panel, int blocks, float *y, const uint8_t *ahead,
                   int lines) {
  (void)ahead, (void)lines;
  for (int j = 0; j < LANES; j++) y[j] = 0;
  for (int k = 0; k < blocks; k++, panel += BLOCK_BYTES) {
    const int8_t *number = x->number + (row * blocks + k) * BLOCK * 2;
    int32_t sum[LANES];
    for (int j = 0; j < LANES; j++) sum[j] = 0;
    for (int i = 0; i < BLOCK / 4; i++)
      for (int j = 0; j < LANES; j++) {
        const uint8_t *w = panel + LANES * 8 + (i * LANES + j) * 4;
        for (int n = 0; n < 4; n++) sum[j] += w[n] * (number[i * 4 + n] * 256 + number[BLOCK + i * 4 + n]);
      }
    for (int j = 0; j < LANES; j++) {
      float scale, low;
      memcpy(&scale, panel + 4 * j, 4);
      memcpy(&low, panel + 4 * (LANES + j), 4);
      y[j] += (float)sum[j] * (scale * x->scale[row * blocks + k]) + low * x->sum[row * blocks + k];
    }
  }
}
#endif

/* y [M, LANES]: the outputs of one panel for rows of activations; the panel at `ahead` is fetched meanwhile */
static void int8_panel(const Rounded *x, int M, const uint8_t *panel, int blocks, float *y, const uint8_t *ahead) {
  const int most = BLOCK_BYTES / 64; /* lines of a block: the first rows fetch as much as they read */
  int m = 0;
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  for (; m + 4 <= M; m += 4) int8_4(x, m, panel, blocks, y + m * LANES, ahead, m ? 0 : most);
  for (; m + 2 <= M; m += 2) int8_2(x, m, panel, blocks, y + m * LANES, ahead, m ? 0 : most);
#endif
  for (; m < M; m++) int8_1(x, m, panel, blocks, y + m * LANES, ahead, m ? 0 : most);
}
#endif
