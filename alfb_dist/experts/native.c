// The experts of one rank on float32 rows: expert by expert, in pieces that stay in cache.
//
// Products go through the BLAS that is handed in (torch's own). Everything between them is fused into single passes over
// a piece: gather, SwiGLU and weighting, their backward, scatter. Nothing here keeps state.
#include "native.h"

#define PARALLEL_FROM 65536  // elements below which starting threads costs more than it saves

static inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

static void gather(const float *from, int width, const int32_t *row, int n, float *to) {
#pragma omp parallel for if ((int64_t)n * width >= PARALLEL_FROM)
    for (int i = 0; i < n; i++) memcpy(to + (int64_t)i * width, from + (int64_t)row[i] * width, sizeof(float) * width);
}

// Threads take columns, not rows: a row may come twice.
static void scatter_add(float *to, int width, const int32_t *row, int n, const float *from) {
    int parts = (int64_t)n * width >= PARALLEL_FROM ? max_threads() : 1;
#pragma omp parallel for if (parts > 1)
    for (int part = 0; part < parts; part++) {
        int start = (int64_t)width * part / parts, stop = (int64_t)width * (part + 1) / parts;
        for (int i = 0; i < n; i++) {
            float *a = to + (int64_t)row[i] * width;
            const float *b = from + (int64_t)i * width;
#pragma omp simd
            for (int j = start; j < stop; j++) a[j] += b[j];
        }
    }
}

static void swiglu(int n, int F, const float *gate_up, const float *weight, float *h) {
#pragma omp parallel for if ((int64_t)n * F >= PARALLEL_FROM)
    for (int i = 0; i < n; i++) {
        const float *gate = gate_up + (int64_t)i * 2 * F, *up = gate + F;
        float *to = h + (int64_t)i * F, w = weight[i];
#pragma omp simd
        for (int j = 0; j < F; j++) to[j] = gate[j] * sigmoid(gate[j]) * up[j] * w;
    }
}

// grad_h: gradient of the unweighted h. h becomes the weighted one; grad_weight is grad_h . h.
static void swiglu_backward(int n, int F, const float *gate_up, const float *weight, const float *grad_h, float *h,
                            float *grad_gate_up, float *grad_weight) {
#pragma omp parallel for if ((int64_t)n * F >= PARALLEL_FROM)
    for (int i = 0; i < n; i++) {
        const float *gate = gate_up + (int64_t)i * 2 * F, *up = gate + F, *grad = grad_h + (int64_t)i * F;
        float *grad_gate = grad_gate_up + (int64_t)i * 2 * F, *grad_up = grad_gate + F, *to = h + (int64_t)i * F;
        float w = weight[i], dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int j = 0; j < F; j++) {
            float s = sigmoid(gate[j]), act = gate[j] * s, value = act * up[j], g = grad[j];
            dot += g * value;
            g *= w;
            to[j] = value * w;
            grad_up[j] = g * act;
            grad_gate[j] = g * up[j] * (s + act * (1.0f - s));
        }
        grad_weight[i] = dot;
    }
}

// Slots sorted by expert, stable, in `slot`; ids of `experts` are left out. sizes: of each expert, and room for one
// more. How many slots there are in all.
int64_t sort_slots(int64_t slots, int64_t experts, const int64_t *ids, int64_t *sizes, int32_t *slot) {
    int64_t next[experts + 1], start = 0;
    memset(sizes, 0, sizeof(int64_t) * (experts + 1));
    for (int64_t i = 0; i < slots; i++) sizes[ids[i]]++;
    for (int64_t e = 0; e < experts; start += sizes[e++]) next[e] = start;
    for (int64_t i = 0; i < slots; i++)
        if (ids[i] < experts) slot[next[ids[i]]++] = (int32_t)i;
    return start;
}

// x (R, D), weight (R K), gate_up (E, 2F, D), down (E, D, F), slot (S): in. kept (S, 2F), out (R, D): out.
// scratch: piece (2 D + F + 2) floats.
void forward(blas_t blas, int64_t rows, int64_t experts, int64_t top_k, int64_t D, int64_t F, int64_t piece,
             const int64_t *sizes, const int32_t *slot, const float *weight, const float *x, const float *gate_up,
             const float *down, float *kept, float *out, float *scratch) {
    float *x_part = scratch, *y = x_part + piece * D, *h = y + piece * D, *w = h + piece * F;
    int32_t *row = (int32_t *)(w + piece);
    int64_t start = 0;
    memset(out, 0, sizeof(float) * rows * D);
    for (int64_t e = 0; e < experts; e++) {
        const float *gate_up_e = gate_up + e * 2 * F * D, *down_e = down + e * D * F;
        for (int64_t left = sizes[e]; left > 0;) {
            int n = left < piece ? (int)left : piece;
            for (int i = 0; i < n; i++) {
                row[i] = slot[start + i] / top_k;
                w[i] = weight[slot[start + i]];
            }
            float *kept_part = kept + start * 2 * F;
            gather(x, D, row, n, x_part);
            product(blas, 0, 1, n, 2 * F, D, x_part, D, gate_up_e, D, 0, kept_part, 2 * F);
            swiglu(n, F, kept_part, w, h);
            product(blas, 0, 1, n, D, F, h, F, down_e, F, 0, y, D);
            scatter_add(out, D, row, n, y);
            start += n;
            left -= n;
        }
    }
}

// As forward, with grad (R, D) in; grad_x (R, D), grad_weight (R K), grad_gate_up, grad_down: out.
// scratch: piece (2 D + 4 F + 3) floats.
void backward(blas_t blas, int64_t rows, int64_t experts, int64_t top_k, int64_t D, int64_t F, int64_t piece,
              const int64_t *sizes, const int32_t *slot, const float *weight, const float *x, const float *gate_up,
              const float *down, const float *kept, const float *grad, float *grad_x, float *grad_weight,
              float *grad_gate_up, float *grad_down, float *scratch) {
    float *grad_part = scratch, *x_part = grad_part + piece * D, *grad_h = x_part + piece * D;
    float *h = grad_h + piece * F, *grad_kept = h + piece * F, *w = grad_kept + piece * 2 * F;
    float *grad_w = w + piece;
    int32_t *row = (int32_t *)(grad_w + piece);
    int64_t start = 0;
    memset(grad_x, 0, sizeof(float) * rows * D);
    memset(grad_weight, 0, sizeof(float) * rows * top_k);
    for (int64_t e = 0; e < experts; e++) {
        const float *gate_up_e = gate_up + e * 2 * F * D, *down_e = down + e * D * F;
        float *grad_gate_up_e = grad_gate_up + e * 2 * F * D, *grad_down_e = grad_down + e * D * F;
        if (sizes[e] == 0) {
            memset(grad_gate_up_e, 0, sizeof(float) * 2 * F * D);
            memset(grad_down_e, 0, sizeof(float) * D * F);
        }
        float beta = 0;
        for (int64_t left = sizes[e]; left > 0; beta = 1) {
            int n = left < piece ? (int)left : piece;
            for (int i = 0; i < n; i++) {
                row[i] = slot[start + i] / top_k;
                w[i] = weight[slot[start + i]];
            }
            gather(grad, D, row, n, grad_part);
            product(blas, 0, 0, n, F, D, grad_part, D, down_e, F, 0, grad_h, F);
            swiglu_backward(n, F, kept + start * 2 * F, w, grad_h, h, grad_kept, grad_w);
            product(blas, 1, 0, D, F, n, grad_part, D, h, F, beta, grad_down_e, F);
            gather(x, D, row, n, x_part);
            product(blas, 1, 0, 2 * F, D, n, grad_kept, 2 * F, x_part, D, beta, grad_gate_up_e, D);
            product(blas, 0, 0, n, D, 2 * F, grad_kept, 2 * F, gate_up_e, D, 0, x_part, D);
            scatter_add(grad_x, D, row, n, x_part);
            for (int i = 0; i < n; i++) grad_weight[slot[start + i]] = grad_w[i];
            start += n;
            left -= n;
        }
    }
}
