/* Products with matrices as they lie in memory: w [outputs, inputs], row after row, float32.

   No second copy of a model's weights, and one pass over them from start to end, which is what a step of few rows
   costs. An output is one vector of sums over the inputs, added up in one order at the end: a row's result does not
   depend on its company. Outputs are computed in units of UNIT; `ahead` is fetched meanwhile. */

#ifndef GN_DENSE
#define GN_DENSE
#include "matrix.h"

#define UNIT 16 /* outputs computed together; their weights lie side by side */
#define ROWS 16 /* rows that pass over a unit together, so that both stay in the first cache */

#ifdef __AVX512F__
#include <immintrin.h>
/* y[i] = sum of the lanes of a[i]; every vector goes through the same tree */
static inline void lane_sums(const vec *a, float *y) {
  __m512 s[16];
  for (int i = 0; i < 16; i++) s[i] = (__m512)a[i];
  for (int i = 0; i < 8; i++)
    s[i] = _mm512_add_ps(_mm512_unpacklo_ps(s[2 * i], s[2 * i + 1]), _mm512_unpackhi_ps(s[2 * i], s[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d lo = _mm512_castps_pd(s[2 * i]), hi = _mm512_castps_pd(s[2 * i + 1]);
    s[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi)), _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi)));
  }
  for (int i = 0; i < 2; i++)
    s[i] = _mm512_add_ps(_mm512_shuffle_f32x4(s[2 * i], s[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(s[2 * i], s[2 * i + 1], 0xDD));
  _mm512_storeu_ps(y, _mm512_add_ps(_mm512_shuffle_f32x4(s[0], s[1], 0x88), _mm512_shuffle_f32x4(s[0], s[1], 0xDD)));
}
#define SUMS 16
#else
static inline void lane_sums(const vec *a, float *y) {
  for (int i = 0; i < 8; i++) {
    float half[4];
    for (int l = 0; l < 4; l++) half[l] = a[i][l] + a[i][l + 4];
    y[i] = (half[0] + half[2]) + (half[1] + half[3]);
  }
}
#define SUMS 8
#endif

/* the last inputs, fewer than a vector, and zeros behind them */
static inline vec rest(const float *x, int n) {
  float all[VL] = {0};
  memcpy(all, x, n * sizeof(float));
  return *(vec *)all;
}

/* O outputs of R rows, O * R = SUMS: y[r * ldy + o]. `lines` cache lines from `ahead` on are fetched at every step. */
#define DOTS(O, R)                                                                                                 \
  static void dots_##O##_##R(const float *x, int64_t ldx, const float *const *w, int inputs, float *y,             \
                             int64_t ldy, const char *ahead, int lines) {                                          \
    vec a[SUMS];                                                                                                   \
    for (int i = 0; i < SUMS; i++) a[i] = (vec){0};                                                                \
    int k = 0;                                                                                                     \
    for (; k + VL <= inputs; k += VL) {                                                                            \
      vec v[R];                                                                                                    \
      for (int r = 0; r < R; r++) v[r] = *(const vec *)(x + r * ldx + k);                                          \
      for (int o = 0; o < O; o++) {                                                                                \
        const vec u = *(const vec *)(w[o] + k);                                                                    \
        for (int r = 0; r < R; r++) a[r * O + o] += u * v[r];                                                      \
      }                                                                                                            \
      for (int i = 0; i < lines; i++, ahead += 64) __builtin_prefetch(ahead);                                      \
    }                                                                                                              \
    if (k < inputs)                                                                                                \
      for (int o = 0; o < O; o++) {                                                                                \
        const vec u = rest(w[o] + k, inputs - k);                                                                  \
        for (int r = 0; r < R; r++) a[r * O + o] += u * rest(x + r * ldx + k, inputs - k);                         \
      }                                                                                                            \
    float sums[SUMS];                                                                                              \
    lane_sums(a, sums);                                                                                            \
    for (int r = 0; r < R; r++) memcpy(y + r * ldy, sums + r * O, O * sizeof(float));                              \
  }
#if SUMS == 16
DOTS(16, 1)
DOTS(8, 2)
DOTS(4, 4)
#else
DOTS(8, 1)
DOTS(4, 2)
#endif

#define OVER(O, R)                                                                                    \
  for (; m + R <= end; m += R)                                                                        \
    for (int o = 0; o < UNIT; o += O) {                                                               \
      dots_##O##_##R(x + m * ldx, ldx, w + o, inputs, y + m * ldy + o, ldy, ahead, lines);            \
      ahead += (int64_t)lines * 64 * (inputs / VL);                                                   \
    }

/* y [M, UNIT of ldy]: `width` outputs of every row of x [M, inputs] (columns behind them are garbage), from the rows of
   the matrix that begin at `weights`; the unit that begins at `next` is fetched meanwhile */
static void dense_unit(const float *x, int64_t ldx, int M, const float *weights, int width, int inputs, float *y,
                       int64_t ldy, const void *next) {
  const float *w[UNIT];
  for (int o = 0; o < UNIT; o++) w[o] = weights + (int64_t)(o < width ? o : width - 1) * inputs;
  const char *ahead = next;
  for (int m = 0; m < M;) {
    const int end = m + ROWS < M ? m + ROWS : M, once = SUMS * SUMS / UNIT / end;
    const int lines = m ? 0 : once ? once : 1; /* the first rows' steps fetch all of it */
#if SUMS == 16
    OVER(4, 4)
    OVER(8, 2)
    OVER(16, 1)
#else
    OVER(4, 2)
    OVER(8, 1)
#endif
  }
}
#endif
