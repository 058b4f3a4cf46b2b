// What the compiled passes share: threads, a fast exponential, and how attention calls the BLAS that it is handed.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
static inline int max_threads(void) { return omp_get_max_threads(); }
static inline int this_thread(void) { return omp_get_thread_num(); }
#else
static inline int max_threads(void) { return 1; }
static inline int this_thread(void) { return 0; }
#endif

typedef void (*blas_t)(const char *, const char *, const int *, const int *, const int *, const float *, const float *,
                       const int *, const float *, const int *, const float *, float *, const int *);

// Row-major c[m, n] = beta c + op(a) op(b), by the column-major BLAS on the transposes.
static inline void product(blas_t blas, int transpose_a, int transpose_b, int m, int n, int k, const float *a, int lda,
                    const float *b, int ldb, float beta, float *c, int ldc) {
    const float one = 1.0f;
    blas(transpose_b ? "T" : "N", transpose_a ? "T" : "N", &n, &m, &k, &one, b, &ldb, a, &lda, &beta, c, &ldc);
}

// exp to 4 units in the last place, in a form that compilers vectorise; NaN stays NaN.
static inline float fast_exp(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float n = nearbyintf(x * 1.44269504f), r = x - n * 0.693145752f - n * 1.42860677e-6f;
    float p = 1.39304355e-3f;
    p = p * r + 8.33336077e-3f;
    p = p * r + 4.16664853e-2f;
    p = p * r + 0.166666672f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    union {
        int32_t bits;
        float value;
    } power = {.bits = ((int32_t)n + 127) << 23};
    return p * power.value;
}
