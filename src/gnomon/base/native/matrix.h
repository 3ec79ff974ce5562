/* What the compiled kernels share: vectors, exponentials, packed matrices and their product.

   Matrices [out, in] are packed as panels of NR outputs, panel[k][NR], so that the inner loop is broadcast times
   vector. Every output has one accumulator and k ascends, whatever else is computed: a row's result does not depend on
   its company. */

#ifndef GN_MATRIX
#define GN_MATRIX
#include "pool.h"

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define VL 16
#define MR 8
#else
#define VL 8
#define MR 4
#endif
#define NR (2 * VL)

#define KB 16 /* numbers in a block of exponentials */

typedef float vec __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef float vkb __attribute__((vector_size(KB * 4), aligned(4), may_alias));
typedef int32_t ikb __attribute__((vector_size(KB * 4)));

static int panels(int outputs) { return (outputs + NR - 1) / NR; }

int64_t gn_packed_size(int outputs, int inputs) { return (int64_t)panels(outputs) * NR * inputs; }

/* w [outputs, inputs] with any strides -> panels, rows beyond `outputs` zero */
void gn_pack(const float *w, int64_t row_stride, int64_t column_stride, int outputs, int inputs, float *to) {
  for (int p = 0; p < panels(outputs); p++)
    for (int k = 0; k < inputs; k++)
      for (int j = 0; j < NR; j++) {
        int o = p * NR + j;
        *to++ = o < outputs ? w[o * row_stride + k * column_stride] : 0.0f;
      }
}

#define KERNEL(M)                                                                                        \
  static void kernel_##M(const float *x, int64_t ldx, const float *panel, int inputs, float *y, int64_t ldy, \
                         int width) {                                                                    \
    vec a[M], b[M];                                                                                      \
    for (int m = 0; m < M; m++) a[m] = b[m] = (vec){0};                                                  \
    for (int k = 0; k < inputs; k++) {                                                                   \
      const vec w0 = *(const vec *)(panel + (int64_t)k * NR), w1 = *(const vec *)(panel + (int64_t)k * NR + VL); \
      for (int m = 0; m < M; m++) {                                                                      \
        const float v = x[m * ldx + k];                                                                  \
        a[m] += v * w0;                                                                                  \
        b[m] += v * w1;                                                                                  \
      }                                                                                                  \
    }                                                                                                    \
    for (int m = 0; m < M; m++) {                                                                        \
      if (width == NR) {                                                                                 \
        *(vec *)(y + m * ldy) = a[m];                                                                    \
        *(vec *)(y + m * ldy + VL) = b[m];                                                               \
      } else {                                                                                           \
        float both[NR];                                                                                  \
        memcpy(both, &a[m], VL * 4);                                                                     \
        memcpy(both + VL, &b[m], VL * 4);                                                                \
        memcpy(y + m * ldy, both, width * sizeof(float));                                                \
      }                                                                                                  \
    }                                                                                                    \
  }
KERNEL(1)
KERNEL(2)
KERNEL(4)
#if MR == 8
KERNEL(6)
KERNEL(8)
#endif

/* y [M, outputs] = x [M, inputs] times the packed matrix; one accumulator per output, k ascending, whatever M is */
static void matmul(const float *x, int64_t ldx, int M, const float *packed, int outputs, int inputs, float *y,
                   int64_t ldy) {
  for (int p = 0; p < panels(outputs); p++) {
    const float *panel = packed + (int64_t)p * NR * inputs;
    const int width = outputs - p * NR < NR ? outputs - p * NR : NR;
    int m = 0;
#if MR == 8
    for (; m + 8 <= M; m += 8) kernel_8(x + m * ldx, ldx, panel, inputs, y + m * ldy + p * NR, ldy, width);
    for (; m + 6 <= M; m += 6) kernel_6(x + m * ldx, ldx, panel, inputs, y + m * ldy + p * NR, ldy, width);
#endif
    for (; m + 4 <= M; m += 4) kernel_4(x + m * ldx, ldx, panel, inputs, y + m * ldy + p * NR, ldy, width);
    for (; m + 2 <= M; m += 2) kernel_2(x + m * ldx, ldx, panel, inputs, y + m * ldy + p * NR, ldy, width);
    for (; m < M; m++) kernel_1(x + m * ldx, ldx, panel, inputs, y + m * ldy + p * NR, ldy, width);
  }
}

/* e^x for a block, x <= 0: 2^n times a polynomial of degree 6 on [-ln2/2, ln2/2]; relative error below 2e-7, and 0
   below -87 (also for minus infinity) */
static inline vkb exp_block(vkb x) {
  const vkb lo = (vkb){0} - 87.0f;
  const ikb low = x < lo;
  x = (vkb)((low & (ikb)lo) | (~low & (ikb)x));
  const ikb whole = __builtin_convertvector(x * 1.44269504088896341f - 0.5f, ikb); /* nearest, for x <= 0 */
  const vkb n = __builtin_convertvector(whole, vkb);
  const vkb r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vkb p = r * 1.3981999507e-3f + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (vkb)(~low & (ikb)(p * (vkb)((whole + 127) << 23)));
}
#endif
