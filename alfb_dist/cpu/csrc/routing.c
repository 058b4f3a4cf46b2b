// From a gate's scores and choices to weights and load, and back: the operations of torch's graph in its order, so that
// not a bit differs. Compiled without reordered sums and fused multiply-adds.
#include <stdint.h>
#include <string.h>

// So many sums side by side, which are then one; what is left of a last round goes to the first. Torch has an order that
// depends on K and on the width of the processor's vectors: one or four beside each other, for small K.
static float sum(int64_t K, int64_t beside, const float *x) {
    float total = 0;
    int64_t whole = K / beside * beside;
    for (int64_t j = 0; j < beside; j++) {
        float part = x[j];
        for (int64_t k = j + beside; k < whole; k += beside) part += x[k];
        for (int64_t k = whole; j == 0 && k < K; k++) part += x[k];
        total = j == 0 ? part : total + part;
    }
    return total;
}

// scores (T, E), ids (T, K): in. chosen and weights (T, K), load (E): out.
void weigh(int64_t T, int64_t E, int64_t K, int64_t beside, int64_t normalize, float scaling, const float *scores,
           const int64_t *ids, float *chosen, float *weights, int64_t *load) {
    memset(load, 0, sizeof(int64_t) * E);
    for (int64_t t = 0; t < T; t++, scores += E, ids += K, chosen += K, weights += K) {
        for (int64_t k = 0; k < K; k++) {
            chosen[k] = scores[ids[k]];
            load[ids[k]]++;
        }
        float total = normalize ? sum(K, beside, chosen) + 1e-20f : 1.0f;
        for (int64_t k = 0; k < K; k++) weights[k] = chosen[k] / total * scaling;
    }
}

// ids, chosen and grad_weights (T, K): in. grad_scores (T, E): out.
void weigh_backward(int64_t T, int64_t E, int64_t K, int64_t beside, int64_t normalize, float scaling,
                    const int64_t *ids, const float *chosen, const float *grad_weights, float *grad_scores) {
    memset(grad_scores, 0, sizeof(float) * T * E);
    for (int64_t t = 0; t < T; t++, ids += K, chosen += K, grad_weights += K, grad_scores += E) {
        float total = normalize ? sum(K, beside, chosen) + 1e-20f : 1.0f, through_total[K], through = 0;
        for (int64_t k = 0; k < K; k++) through_total[k] = -(grad_weights[k] * scaling) * (chosen[k] / total / total);
        if (normalize) through = sum(K, beside, through_total);
        for (int64_t k = 0; k < K; k++) grad_scores[ids[k]] += grad_weights[k] * scaling / total + through;
    }
}
