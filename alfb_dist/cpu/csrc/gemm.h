// Products of float32 matrices in tiles that stay in registers. An index may pick the rows that are read, and another
// the rows of the result that are added to, which spares the passes that a library's product needs before and after.
//
// A row of the result depends on its own row of a and on b alone, not on the number of rows or their order.
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
static inline int max_threads(void) { return omp_get_max_threads(); }
#else
static inline int max_threads(void) { return 1; }
#endif

// The sums of a tile fill the registers. INTERLEAVED alternates the halves of two vectors.
#ifdef __AVX512F__
enum { LANES = 16, VECTORS = 4 };
#define FIRST_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define SECOND_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#else
enum { LANES = 8, VECTORS = 2 };
#define FIRST_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define SECOND_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#endif
#ifdef __clang__
#define INTERLEAVED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define INTERLEAVED(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#endif
enum { ROWS = 6, WIDTH = LANES * VECTORS };  // of a tile
enum { COLUMNS = 64, DEPTH = 512, DEPTH_DOWN = 320 };  // of b at a time; DEPTH_DOWN where a is transposed
enum { TRANSPOSED = 1, ADD = 1 };

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));

// Stored row by row; with an index, row i of the matrix is stored row index[i].
typedef struct {
    const float *data;
    int64_t width;
    const int32_t *index;
    int transposed;  // the transpose is stored, without an index
} matrix_t;

typedef struct {
    float *data;
    int64_t width;
    const int32_t *index;
    int add;  // to the values there
} result_t;

typedef struct {
    int64_t m, n, k;
    matrix_t a, b;
    result_t c;
} product_t;

static inline int64_t at(const int32_t *index, int64_t i) { return index ? index[i] : i; }

// One tile of c. Inlined everywhere with constant `rows` and `vectors`.
static inline __attribute__((always_inline)) void tile(int rows, int vectors, int64_t depth, const float *const *a,
                                                       int64_t a_column, const float *b, float *const *c, int add) {
    vector sum[ROWS][VECTORS];
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++) sum[i][v] = (vector){0};
#pragma GCC unroll 4
    for (int64_t k = 0, offset = 0; k < depth; k++, offset += a_column, b += WIDTH) {
        vector right[VECTORS];
        for (int v = 0; v < vectors; v++) right[v] = *(const vector *)(b + v * LANES);
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < vectors; v++) sum[i][v] += a[i][offset] * right[v];
    }
    for (int i = 0; i < rows; i++)
        for (int v = 0; v < vectors; v++) {
            anywhere *to = (anywhere *)(c[i] + v * LANES);
            *to = add ? *to + sum[i][v] : sum[i][v];
        }
}

static void any_tile(int rows, int vectors, int64_t depth, const float *const *a, int64_t a_column, const float *b,
                     float *const *c, int add) {
#define TILE(R, V) \
    case V * (ROWS + 1) + R: return tile(R, V, depth, a, a_column, b, c, add);
#define TILES(V) TILE(1, V) TILE(2, V) TILE(3, V) TILE(4, V) TILE(5, V) TILE(6, V)
    switch (vectors * (ROWS + 1) + rows) {
        TILES(1)
        TILES(2)
#ifdef __AVX512F__
        TILES(3)
        TILES(4)
#endif
    }
}

// Transpose LANES rows of LANES numbers, `row` apart, into a packed panel.
static inline void transpose(const float *from, int64_t row, float *to) {
    vector x[LANES], y[LANES];
    for (int i = 0; i < LANES; i++) x[i] = *(const anywhere *)(from + i * row);
    for (int done = 1; done < LANES; done *= 2) {  // log2(LANES) interleavings of the two halves transpose
        for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = INTERLEAVED(x[i], x[i + LANES / 2], FIRST_HALVES);
            y[2 * i + 1] = INTERLEAVED(x[i], x[i + LANES / 2], SECOND_HALVES);
        }
        memcpy(x, y, sizeof x);
    }
    for (int i = 0; i < LANES; i++) *(vector *)(to + i * WIDTH) = x[i];
}

// The start of column i in a packed panel; the next row is WIDTH further.
static inline int64_t place(int64_t i, int64_t depth) { return i / WIDTH * WIDTH * depth + i % WIDTH; }

// Copy b[k .. k + depth, j .. j + columns] tile by tile, with zeros up to a whole vector.
static void pack(matrix_t b, int64_t k, int64_t depth, int64_t j, int64_t columns, float *to) {
    int64_t whole = columns / LANES * LANES, whole_depth = b.transposed ? depth / LANES * LANES : depth;
    int64_t row = b.transposed ? 1 : b.width, column = b.transposed ? b.width : 1;
    if (b.transposed)
        for (int64_t i = 0; i < whole; i += LANES)
            for (int64_t q = 0; q < whole_depth; q += LANES)
                transpose(b.data + (j + i) * b.width + k + q, b.width, to + place(i, depth) + q * WIDTH);
    else
        for (int64_t q = 0; q < depth; q++) {
            const float *from = b.data + at(b.index, k + q) * b.width + j;
            if (whole == COLUMNS) {
                for (int i = 0; i < COLUMNS; i += LANES)
                    *(vector *)(to + place(i, depth) + q * WIDTH) = *(const anywhere *)(from + i);
                continue;
            }
            for (int64_t i = 0; i < whole; i += LANES)
                *(vector *)(to + place(i, depth) + q * WIDTH) = *(const anywhere *)(from + i);
        }
    for (int64_t q = whole < columns ? 0 : whole_depth; q < depth; q++)
        for (int64_t i = q < whole_depth ? whole : 0; i < columns || i % LANES; i++)
            to[place(i, depth) + q * WIDTH] = i < columns ? b.data[at(b.index, k + q) * row + (j + i) * column] : 0;
}

// Rows start .. stop and columns j .. j + COLUMNS of c, from k .. k + depth of the sum.
static void panel(const product_t *p, int64_t k, int64_t depth, int64_t j, int64_t start, int64_t stop) {
    float b[DEPTH * COLUMNS] __attribute__((aligned(4 * LANES))), part[ROWS * WIDTH];
    int64_t a_row = p->a.transposed ? 1 : p->a.width, a_column = p->a.transposed ? p->a.width : 1, rows;
    int64_t columns = p->n - j < COLUMNS ? p->n - j : COLUMNS;
    int add = p->c.add || k > 0;
    pack(p->b, k, depth, j, columns, b);
    for (int64_t i = start; i < stop; i += rows) {
        const float *a[ROWS];
        float *c[ROWS], *to[ROWS];
        int64_t left = stop - i, tiles = (left + ROWS - 1) / ROWS;
        rows = (left + tiles - 1) / tiles;
        for (int64_t r = 0; r < rows; r++) {
            a[r] = p->a.data + at(p->a.index, i + r) * a_row + k * a_column;
            c[r] = p->c.data + at(p->c.index, i + r) * p->c.width + j;
            for (int64_t q = 0; q < columns; q += 16) __builtin_prefetch(c[r] + q, 0, 2);  // into the second cache
        }
        for (int64_t q = 0; q < columns; q += WIDTH) {
            int64_t width = columns - q < WIDTH ? columns - q : WIDTH;
            int whole = width % LANES == 0;
            for (int64_t r = 0; r < rows; r++) to[r] = whole ? c[r] + q : part + r * WIDTH;
            any_tile(rows, (width + LANES - 1) / LANES, depth, a, a_column, b + q * depth, to, whole && add);
            for (int64_t r = 0; r < rows && !whole; r++)
                for (int64_t e = 0; e < width; e++) c[r][q + e] = to[r][e] + (add ? c[r][q + e] : 0.0f);
        }
    }
}

// Returns into how many parts the rows of each panel are cut, so that all threads have work. With an index there is one
// part: the index may name a row twice, and two threads must not add to the same row.
static int64_t cuts(int64_t m, int64_t panels, const int32_t *index) {
    int64_t wanted = (max_threads() + panels - 1) / panels, most = m / (8 * ROWS);
    return index || most < 1 ? 1 : wanted < most ? wanted : most;
}

// c[m, n] = a[m, k] b[k, n], in parts of k of nearly equal depth.
static void multiply(int64_t m, int64_t n, int64_t k, matrix_t a, matrix_t b, result_t c) {
    product_t p = {m, n, k, a, b, c};
    int64_t most = a.transposed ? DEPTH_DOWN : DEPTH, parts = k > most ? (k + most - 1) / most : 1;
    int64_t panels = (n + COLUMNS - 1) / COLUMNS, cut = panels ? cuts(m, panels, c.index) : 1;
    for (int64_t part = 0; part < parts; part++) {
        int64_t done = k * part / parts, depth = k * (part + 1) / parts - done;
#pragma omp parallel for if (panels * cut > 1 && m * n * depth >= 1 << 20)
        for (int64_t i = 0; i < panels * cut; i++)
            panel(&p, done, depth, i / cut * COLUMNS, m * (i % cut) / cut, m * (i % cut + 1) / cut);
    }
}
