// Causal attention on float32 heads, forward and backward: each piece of queries meets only the keys before its end.
//
// Products go through the BLAS that the caller passes; between them is one pass over each row of scores. The
// probabilities below the diagonal are kept for the backward, piece by piece.
#include "fast_exp.h"

#ifdef _OPENMP
#include <omp.h>
static inline int this_thread(void) { return omp_get_thread_num(); }
#else
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

// The steps between batches, heads and positions of a (batch, heads, length, width) tensor with contiguous rows.
typedef struct {
    int64_t batch, head, position;
} steps_t;

typedef struct {
    int64_t batches, heads, kv_heads, length, qk_width, v_width, piece;
    steps_t q, k, v, out;
} shape_t;

static int64_t kept_size(const shape_t *s) {
    int64_t total = 0;
    for (int64_t start = 0; start < s->length; start += s->piece) {
        int64_t stop = start + s->piece < s->length ? start + s->piece : s->length;
        total += (stop - start) * stop;
    }
    return total;
}

// The number of floats in `kept` for each head of each batch.
int64_t attention_kept(const shape_t *s) { return kept_size(s); }

static void softmax_row(float *row, int64_t valid, int64_t width, float scale) {
    float top = row[0], sum = 0;
#pragma omp simd reduction(max : top)
    for (int64_t j = 1; j < valid; j++) top = row[j] > top ? row[j] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < valid; j++) {
        float e = fast_exp((row[j] - top) * scale);
        row[j] = e;
        sum += e;
    }
    float inverse = 1.0f / sum;
#pragma omp simd
    for (int64_t j = 0; j < valid; j++) row[j] *= inverse;
    for (int64_t j = valid; j < width; j++) row[j] = 0;
}

// q, k, v: in. kept (batches heads kept_size), out (strides in s->out): out.
void attention_forward(blas_t blas, const shape_t *s, const float *scale, const float *q, const float *k,
                       const float *v, float *kept, float *out) {
    int64_t size = kept_size(s), group = s->heads / s->kv_heads;
#pragma omp parallel for
    for (int64_t bh = 0; bh < s->batches * s->heads; bh++) {
        int64_t b = bh / s->heads, h = bh % s->heads;
        const float *q_h = q + b * s->q.batch + h * s->q.head;
        const float *k_h = k + b * s->k.batch + h / group * s->k.head;
        const float *v_h = v + b * s->v.batch + h / group * s->v.head;
        float *p = kept + bh * size;
        for (int64_t start = 0; start < s->length; start += s->piece) {
            int64_t stop = start + s->piece < s->length ? start + s->piece : s->length, n = stop - start;
            product(blas, 0, 1, n, stop, s->qk_width, q_h + start * s->q.position, s->q.position, k_h, s->k.position, 0,
                    p, stop);
            for (int64_t i = 0; i < n; i++) softmax_row(p + i * stop, start + i + 1, stop, *scale);
            product(blas, 0, 0, n, s->v_width, stop, p, stop, v_h, s->v.position, 0,
                    out + b * s->out.batch + h * s->out.head + start * s->out.position, s->out.position);
            p += n * stop;
        }
    }
}

// grad: in the gradient of the probabilities p, out that of the scores before scaling.
static void softmax_row_backward(const float *p, float *grad, int64_t valid, int64_t width, float scale) {
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < valid; j++) dot += p[j] * grad[j];
#pragma omp simd
    for (int64_t j = 0; j < valid; j++) grad[j] = p[j] * (grad[j] - dot) * scale;
    for (int64_t j = valid; j < width; j++) grad[j] = 0;
}

// grad (strides in s->out): in. grad_q, grad_k, grad_v (batches, length, heads, width): out, the last two 0 before.
// scratch: threads piece length floats.
void attention_backward(blas_t blas, const shape_t *s, const float *scale, const float *q, const float *k,
                        const float *v, const float *kept, const float *grad, float *grad_q, float *grad_k,
                        float *grad_v, float *scratch) {
    int64_t size = kept_size(s), group = s->heads / s->kv_heads, width = s->qk_width;
    int64_t q_row = s->heads * width, k_row = s->kv_heads * width, v_row = s->kv_heads * s->v_width;
#pragma omp parallel for
    for (int64_t bk = 0; bk < s->batches * s->kv_heads; bk++) {
        int64_t b = bk / s->kv_heads, kv = bk % s->kv_heads;
        float *d = scratch + this_thread() * s->piece * s->length;
        const float *k_h = k + b * s->k.batch + kv * s->k.head, *v_h = v + b * s->v.batch + kv * s->v.head;
        float *grad_k_h = grad_k + b * s->length * k_row + kv * width;
        float *grad_v_h = grad_v + b * s->length * v_row + kv * s->v_width;
        for (int64_t h = kv * group; h < (kv + 1) * group; h++) {
            const float *p = kept + (b * s->heads + h) * size, *q_h = q + b * s->q.batch + h * s->q.head;
            const float *grad_h = grad + b * s->out.batch + h * s->out.head;
            float *grad_q_h = grad_q + b * s->length * q_row + h * width;
            for (int64_t start = 0; start < s->length; start += s->piece) {
                int64_t stop = start + s->piece < s->length ? start + s->piece : s->length, n = stop - start;
                const float *grad_n = grad_h + start * s->out.position, *q_n = q_h + start * s->q.position;
                product(blas, 1, 0, stop, s->v_width, n, p, stop, grad_n, s->out.position, 1, grad_v_h, v_row);
                product(blas, 0, 1, n, stop, s->v_width, grad_n, s->out.position, v_h, s->v.position, 0, d, stop);
                for (int64_t i = 0; i < n; i++)
                    softmax_row_backward(p + i * stop, d + i * stop, start + i + 1, stop, *scale);
                product(blas, 0, 0, n, width, stop, d, stop, k_h, s->k.position, 0, grad_q_h + start * q_row, q_row);
                product(blas, 1, 0, stop, width, n, d, stop, q_n, s->q.position, 1, grad_k_h, k_row);
                p += n * stop;
            }
        }
    }
}
