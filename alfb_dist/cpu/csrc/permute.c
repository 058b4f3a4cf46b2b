// The rows that go to each rank, and the sum of those that come back: single passes for a dozen of torch's operations.
#include <stdint.h>
#include <string.h>

// ids (T, K): experts, `local` of them on each of P ranks; P * local marks an empty slot. rows and slots (P): out, the
// number of rows for each rank and of their filled slots. last (P): scratch. Returns the number of ids out of range.
int64_t count_rows(int64_t T, int64_t K, int64_t P, int64_t local, const int64_t *ids, int64_t *rows, int64_t *slots,
                int64_t *last) {
    int64_t wrong = 0;
    for (int64_t p = 0; p < P; p++) rows[p] = slots[p] = 0, last[p] = -1;
    for (int64_t t = 0; t < T; t++)
        for (int64_t k = 0; k < K; k++) {
            int64_t id = ids[t * K + k], p = id / local;
            wrong += id < 0 || id > P * local;
            if (id < 0 || p >= P) continue;
            slots[p]++;
            rows[p] += last[p] != t;
            last[p] = t;
        }
    return wrong;
}

// rows: from count_rows. token (N), local_ids (N, K), row_weights (N, K), empty (N, K): out, by rank, then by token.
// Ids are local to the rank, weights 0 where a slot is empty. last and next (P): scratch.
void list_rows(int64_t T, int64_t K, int64_t P, int64_t local, const int64_t *ids, const float *weights,
               const int64_t *rows, int64_t *token, int32_t *local_ids, float *row_weights, uint8_t *empty,
               int64_t *last, int64_t *next) {
    int64_t start = 0;
    for (int64_t p = 0; p < P; start += rows[p++]) next[p] = start, last[p] = -1;
    for (int64_t t = 0; t < T; t++)
        for (int64_t k = 0; k < K; k++) {
            int64_t id = ids[t * K + k], p = id / local, n;
            if (p >= P) continue;
            if (last[p] != t) {
                n = next[p]++;
                token[n] = last[p] = t;
                for (int64_t j = n * K; j < (n + 1) * K; j++) local_ids[j] = local, row_weights[j] = 0, empty[j] = 1;
            }
            n = (next[p] - 1) * K + k;
            local_ids[n] = id - p * local;
            row_weights[n] = weights[t * K + k];
            empty[n] = 0;
        }
}

// total[token[n]] += rows[n], or = rows[n] for the first row of a token. seen (T): which tokens had a row; updated.
void add_rows(int64_t n, int64_t D, const int64_t *token, const float *rows, float *total, uint8_t *seen) {
    for (int64_t i = 0; i < n; i++, rows += D) {
        float *to = total + token[i] * D;
        if (seen[token[i]])
            for (int64_t j = 0; j < D; j++) to[j] += rows[j];
        else
            memcpy(to, rows, sizeof(float) * D);
        seen[token[i]] = 1;
    }
}

// Zero the totals of tokens without a row.
void clear_unseen(int64_t T, int64_t D, float *total, const uint8_t *seen) {
    for (int64_t t = 0; t < T; t++)
        if (!seen[t]) memset(total + t * D, 0, sizeof(float) * D);
}
