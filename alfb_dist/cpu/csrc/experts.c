// Routed and shared SwiGLU experts on float32 rows, in pieces of rows that stay in cache.
//
// Products gather their rows and add to those of the result (gemm.h); SwiGLU and weighting, and their backward, are
// single passes over a piece. Nothing keeps state.
#include "gemm.h"

#include "fast_exp.h"

#define PARALLEL_FROM 65536  // elements below which starting threads costs more than it saves
enum { PAD = 16 };           // columns added to a left factor's row: rows of a power of two share too few cache sets

// The weights of one expert: gate and up (F, D), down (D, F). together: the rows of gate and up in one product, 2F if
// up always follows gate in memory. Where it only may, F: bits must not depend on addresses.
typedef struct {
    int64_t D, F, together;
    const float *gate, *up, *down;
} mlp_t;

static inline float sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }

static void gather(const float *from, int64_t width, const int32_t *row, int64_t n, float *to) {
#pragma omp parallel for if (n * width >= PARALLEL_FROM)
    for (int64_t i = 0; i < n; i++) {
        for (int64_t q = 0; i + 4 < n && q < width; q += 16) __builtin_prefetch(from + row[i + 4] * width + q, 0, 2);
        memcpy(to + i * (width + PAD), from + row[i] * width, sizeof(float) * width);
    }
}

static void swiglu(int64_t n, int64_t F, const float *gate_up, const float *weight, float *h) {
#pragma omp parallel for if (n * F >= PARALLEL_FROM)
    for (int64_t i = 0; i < n; i++) {
        const float *gate = gate_up + i * 2 * F, *up = gate + F;
        float *to = h + i * (F + PAD), w = weight ? weight[i] : 1.0f;
#pragma omp simd
        for (int64_t j = 0; j < F; j++) to[j] = gate[j] * sigmoid(gate[j]) * up[j] * w;
    }
}

// grad_h: the gradient of the unweighted h. h: out, weighted. grad_weight: out, grad_h . h.
static void swiglu_backward(int64_t n, int64_t F, const float *gate_up, const float *weight, const float *grad_h,
                            float *h, float *grad_gate_up, float *grad_weight) {
#pragma omp parallel for if (n * F >= PARALLEL_FROM)
    for (int64_t i = 0; i < n; i++) {
        const float *gate = gate_up + i * 2 * F, *up = gate + F, *grad = grad_h + i * F;
        float *grad_gate = grad_gate_up + i * (2 * F + PAD), *grad_up = grad_gate + F, *to = h + i * F;
        float w = weight ? weight[i] : 1.0f, dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < F; j++) {
            float s = sigmoid(gate[j]), act = gate[j] * s, value = act * up[j], g = grad[j];
            dot += g * value;
            g *= w;
            to[j] = value * w;
            grad_up[j] = g * act;
            grad_gate[j] = g * up[j] * (s + act * (1.0f - s));
        }
        if (weight) grad_weight[i] = dot;
    }
}

// n rows of x; weight (n) or NULL for 1. kept (n, 2F): out. h: scratch of n (F + PAD) floats.
static void forward_piece(int64_t n, mlp_t mlp, matrix_t x, const float *weight, float *kept, float *h, result_t out) {
    int64_t D = mlp.D, F = mlp.F, step = mlp.together;
    for (int64_t done = 0; done < 2 * F; done += step)
        multiply(n, step, D, x, (matrix_t){done ? mlp.up : mlp.gate, D, NULL, TRANSPOSED},
                 (result_t){kept + done, 2 * F});
    swiglu(n, F, kept, weight, h);
    multiply(n, D, F, (matrix_t){h, F + PAD}, (matrix_t){mlp.down, F, NULL, TRANSPOSED}, out);
}

// grad: the output's gradient; kept: from the forward. grad_gate_up (2F, D), grad_down (D, F): out, or added to.
// grad_weight: (n), if there is a weight. scratch: n (4 F + PAD) floats. Gradients that are NULL are not computed.
static void backward_piece(int64_t n, mlp_t mlp, matrix_t x, const float *weight, const float *kept, matrix_t grad,
                           result_t grad_x, float *grad_weight, float *grad_gate_up, float *grad_down, int add,
                           float *scratch) {
    int64_t D = mlp.D, F = mlp.F, step = mlp.together, wide = 2 * F + PAD;
    float *grad_h = scratch, *h = grad_h + n * F, *grad_kept = h + n * F;
    multiply(n, F, D, grad, (matrix_t){mlp.down, F}, (result_t){grad_h, F});
    swiglu_backward(n, F, kept, weight, grad_h, h, grad_kept, grad_weight);
    if (grad_down)
        multiply(D, F, n, (matrix_t){grad.data, grad.width, NULL, TRANSPOSED}, (matrix_t){h, F},
                 (result_t){grad_down, F, NULL, add});
    if (grad_gate_up)
        multiply(2 * F, D, n, (matrix_t){grad_kept, wide, NULL, TRANSPOSED}, x, (result_t){grad_gate_up, D, NULL, add});
    for (int64_t done = 0; done < 2 * F && grad_x.data; done += step, grad_x.add = ADD)
        multiply(n, D, step, (matrix_t){grad_kept + done, wide}, (matrix_t){done ? mlp.up : mlp.gate, D}, grad_x);
}

// The rows and weights of the next n slots.
static void look_up(int64_t n, int64_t top_k, const int32_t *slot, const float *weight, int32_t *row, float *w) {
    for (int64_t i = 0; i < n; i++) {
        row[i] = slot[i] / top_k;
        w[i] = weight[slot[i]];
    }
}

// slot: out, the slots in a stable order by expert, without those of id `experts`. sizes: out, the slots per expert,
// with room for one more. Returns the number of slots in order, or -1 if an id is out of range.
int64_t sort_slots(int64_t slots, int64_t experts, const int64_t *ids, int64_t *sizes, int32_t *slot) {
    int64_t next[experts + 1], start = 0;
    memset(sizes, 0, sizeof(int64_t) * (experts + 1));
    for (int64_t i = 0; i < slots; i++) {
        if (ids[i] < 0 || ids[i] > experts) return -1;
        sizes[ids[i]]++;
    }
    for (int64_t e = 0; e < experts; start += sizes[e++]) next[e] = start;
    for (int64_t i = 0; i < slots; i++)
        if (ids[i] < experts) slot[next[ids[i]]++] = (int32_t)i;
    return start;
}

// x (R, D), weight (R K), gate_up (E, 2F, D), down (E, D, F), slot (S): in. kept (S, 2F), out (R, D): out.
// scratch: piece (D + F + 2 PAD + 2) floats.
void forward(int64_t rows, int64_t experts, int64_t top_k, int64_t D, int64_t F, int64_t piece, const int64_t *sizes,
             const int32_t *slot, const float *weight, const float *x, const float *gate_up, const float *down,
             float *kept, float *out, float *scratch) {
    float *x_part = scratch, *h = x_part + piece * (D + PAD), *w = h + piece * (F + PAD);
    int32_t *row = (int32_t *)(w + piece);
    memset(out, 0, sizeof(float) * rows * D);
    for (int64_t e = 0; e < experts; e++, gate_up += 2 * F * D, down += D * F) {
        mlp_t mlp = {D, F, 2 * F, gate_up, gate_up + F * D, down};
        for (int64_t left = sizes[e], n; left > 0; left -= n, slot += n, kept += n * 2 * F) {
            n = left < piece ? left : piece;
            look_up(n, top_k, slot, weight, row, w);
            gather(x, D, row, n, x_part);
            forward_piece(n, mlp, (matrix_t){x_part, D + PAD}, w, kept, h, (result_t){out, D, row, ADD});
        }
    }
}

// As forward, with grad (R, D): in. grad_x (R, D), grad_weight (R K), grad_gate_up, grad_down: out; all but grad_weight
// may be NULL.
// scratch: piece (D + 4 F + 2 PAD + 3) floats.
void backward(int64_t rows, int64_t experts, int64_t top_k, int64_t D, int64_t F, int64_t piece, const int64_t *sizes,
              const int32_t *slot, const float *weight, const float *x, const float *gate_up, const float *down,
              const float *kept, const float *grad, float *grad_x, float *grad_weight, float *grad_gate_up,
              float *grad_down, float *scratch) {
    float *grad_part = scratch, *w = grad_part + piece * (D + PAD), *grad_w = w + piece;
    int32_t *row = (int32_t *)(grad_w + piece);
    if (grad_x) memset(grad_x, 0, sizeof(float) * rows * D);
    memset(grad_weight, 0, sizeof(float) * rows * top_k);
    for (int64_t e = 0; e < experts; e++) {
        mlp_t mlp = {D, F, 2 * F, gate_up, gate_up + F * D, down};
        int add = 0;
        if (sizes[e] == 0 && grad_gate_up) memset(grad_gate_up, 0, sizeof(float) * 2 * F * D);
        if (sizes[e] == 0 && grad_down) memset(grad_down, 0, sizeof(float) * D * F);
        for (int64_t left = sizes[e], n; left > 0; left -= n, slot += n, kept += n * 2 * F, add = ADD) {
            n = left < piece ? left : piece;
            look_up(n, top_k, slot, weight, row, w);
            gather(grad, D, row, n, grad_part);
            backward_piece(n, mlp, (matrix_t){x, D, row}, w, kept, (matrix_t){grad_part, D + PAD},
                           (result_t){grad_x, D, row, ADD}, grad_w, grad_gate_up, grad_down, add,
                           (float *)(row + piece));
            for (int64_t i = 0; i < n; i++) grad_weight[slot[i]] = grad_w[i];
        }
        gate_up += 2 * F * D, down += D * F;
        if (grad_gate_up) grad_gate_up += 2 * F * D;
        if (grad_down) grad_down += D * F;
    }
}

// Shared experts, which compute all rows. x (R, D), gate and up (F, D), down (D, F): in. kept (R, 2F), out (R, D): out.
// scratch: piece (F + PAD) floats.
void shared_forward(int64_t rows, int64_t D, int64_t F, int64_t piece, const float *x, const float *gate,
                    const float *up, const float *down, float *kept, float *out, float *scratch) {
    for (int64_t done = 0, n; done < rows; done += n) {
        n = rows - done < piece ? rows - done : piece;
        forward_piece(n, (mlp_t){D, F, F, gate, up, down}, (matrix_t){x + done * D, D}, NULL, kept + done * 2 * F,
                      scratch, (result_t){out + done * D, D});
    }
}

// As shared_forward, with grad (R, D): in. grad_x (R, D), grad_gate_up (2F, D), grad_down: out; any may be NULL. The
// weights' are zeros if there are no rows.
// scratch: piece (4 F + PAD) floats.
void shared_backward(int64_t rows, int64_t D, int64_t F, int64_t piece, const float *x, const float *gate,
                     const float *up, const float *down, const float *kept, const float *grad, float *grad_x,
                     float *grad_gate_up, float *grad_down, float *scratch) {
    int64_t done = 0, n;
    do {
        n = rows - done < piece ? rows - done : piece;
        backward_piece(n, (mlp_t){D, F, F, gate, up, down}, (matrix_t){x + done * D, D}, NULL, kept + done * 2 * F,
                       (matrix_t){grad + done * D, D}, (result_t){grad_x ? grad_x + done * D : NULL, D}, NULL,
                       grad_gate_up, grad_down, done > 0, scratch);
        done += n;
    } while (done < rows);
}

// The backward of y = x weight^T. x (R, D), weight (E, D), grad (R, E): in. grad_x, grad_weight: out; each may be NULL.
void linear_backward(int64_t rows, int64_t E, int64_t D, const float *x, const float *weight, const float *grad,
                     float *grad_x, float *grad_weight) {
    if (grad_x) multiply(rows, D, E, (matrix_t){grad, E}, (matrix_t){weight, D}, (result_t){grad_x, D});
    if (grad_weight)
        multiply(E, D, rows, (matrix_t){grad, E, NULL, TRANSPOSED}, (matrix_t){x, D}, (result_t){grad_weight, D});
}
