// Exact 1-D k-means of each row: the k values that minimise
//
//     sum_i w[i] * (x[i] - nearest(x[i]))^2
//
// Sorted, a row's optimal clusters are intervals. With W and S the prefix sums of w and of w*x, leaving out what the
// cut does not change, the best gain with c clusters over the first j points is
//
//     gain[c][j] = max over i < j of gain[c-1][i] + (S[j] - S[i])^2 / (W[j] - W[i])
//
// The best i never falls as j grows, nor as c grows. The first lets a layer be filled by halving: the middle j searches
// its whole range, every other j only its side of what the middle found; n log n steps a layer. Both together bound
// the best i from two sides when j runs downwards; about n + n^2/(2 c^2) steps, fewer once c is large.
// Sources: Groenlund et al., "Fast Exact k-Means, k-Medians and Bregman Divergence Clustering in 1D", arXiv:1701.07204;
// F. Yao, "Efficient dynamic programming using quadrangle inequalities", STOC 1980.
//
// Equal values become one point first, and points of no weight take no part in the search. Sums are doubles around the
// row's mean, so a common offset costs no precision.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define RADIX_BITS 11
#define RADIX (1 << RADIX_BITS)
#ifndef HALVING
#define HALVING 16  // layers with c*c*HALVING > n are filled downwards; measured
#endif
#define NEGLIGIBLE 1e-12  // of the row's weight: below it a double's prefix sums lose the point anyway

typedef struct {
    uint64_t *pairs, *spare;      // [n] value key << 32 | position in the row
    double *x;                    // [n] distinct values around the mean, rising
    double *weight, *moment;      // [n + 1] prefix sums of w and of w*x over the distinct values
    double *gain, *previous;      // [n + 1] this layer and the one before
    int32_t *cut;                 // [k][n + 1] where the last cluster starts
    double *centroid;             // [k]
    double mean;                  // of the row
    int32_t points;               // distinct values of some weight
} Row;

// --- sorting: radix over (key, position) --------------------------------------------------------------------------

static uint32_t key_of(float value) {
    uint32_t bits;
    value += 0.0f;  // -0 becomes +0, so that the two are one value
    memcpy(&bits, &value, 4);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static float value_of(uint32_t key) {
    uint32_t bits = key & 0x80000000u ? key & 0x7fffffffu : ~key;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static void radix_pass(Row *row, int64_t n, int shift, int bits) {
    int64_t place[RADIX];
    memset(place, 0, sizeof(int64_t) << bits);
    const uint64_t mask = (1u << bits) - 1;
    for (int64_t i = 0; i < n; i++) place[row->pairs[i] >> shift & mask]++;
    for (int64_t b = 0, start = 0; b <= (int64_t)mask; b++) {
        const int64_t count = place[b];
        place[b] = start;
        start += count;
    }
    for (int64_t i = 0; i < n; i++) row->spare[place[row->pairs[i] >> shift & mask]++] = row->pairs[i];
    uint64_t *swap = row->pairs;
    row->pairs = row->spare;
    row->spare = swap;
}

static void sort_row(Row *row, const float *values, int64_t n) {
    for (int64_t i = 0; i < n; i++) row->pairs[i] = (uint64_t)key_of(values[i]) << 32 | (uint32_t)i;
    const int bits = n < 1024 ? 8 : RADIX_BITS;  // short rows: clearing 2048 counters would cost more than a pass
    for (int shift = 32; shift < 64; shift += bits) radix_pass(row, n, shift, shift + bits > 64 ? 64 - shift : bits);
}

// --- points and prefix sums ---------------------------------------------------------------------------------------

static double weight_at(const float *weights, uint64_t pair) { return weights ? weights[(uint32_t)pair] : 1.0; }

static void centre(Row *row, const float *weights, int64_t n, double *total) {
    double weight = 0, moment = 0;
    for (int64_t i = 0; i < n; i++) {
        const double w = weight_at(weights, row->pairs[i]);
        weight += w;
        moment += w * value_of(row->pairs[i] >> 32);
    }
    row->mean = moment / weight;
    *total = weight;
}

static void collect_points(Row *row, const float *weights, int64_t n) {
    double total;
    centre(row, weights, n, &total);
    int32_t m = 0;
    row->weight[0] = row->moment[0] = 0;
    for (int64_t i = 0; i < n;) {
        const uint32_t key = row->pairs[i] >> 32;
        double w = 0;
        for (; i < n && row->pairs[i] >> 32 == key; i++) w += weight_at(weights, row->pairs[i]);
        if (w <= NEGLIGIBLE * total) continue;
        row->x[m] = value_of(key) - row->mean;
        row->weight[m + 1] = row->weight[m] + w;
        row->moment[m + 1] = row->moment[m] + w * row->x[m];
        m++;
    }
    row->points = m;
}

// --- the dynamic program ------------------------------------------------------------------------------------------

// The best start of the last cluster over the first j points, the lowest on a tie; it lies in low..high.
static int32_t best_cut(const Row *row, int32_t j, int32_t low, int32_t high) {
    const double weight = row->weight[j], moment = row->moment[j];
    double best = -1;
    int32_t cut = low;
    for (int32_t i = low; i <= high; i++) {
        const double s = moment - row->moment[i];
        const double gain = row->previous[i] + s * s / (weight - row->weight[i]);
        if (gain > best) {
            best = gain;
            cut = i;
        }
    }
    row->gain[j] = best;
    return cut;
}

static void fill_by_halving(const Row *row, int32_t *cuts, int32_t first, int32_t last, int32_t low, int32_t high) {
    if (first > last) return;
    const int32_t j = first + (last - first) / 2;
    cuts[j] = best_cut(row, j, low, high < j ? high : j - 1);
    fill_by_halving(row, cuts, first, j - 1, low, cuts[j]);
    fill_by_halving(row, cuts, j + 1, last, cuts[j], high);
}

static void fill_downwards(const Row *row, int32_t *cuts, const int32_t *fewer, int32_t first, int32_t last) {
    for (int32_t j = last, high = last - 1; j >= first; j--) {
        const int32_t below = fewer[j < last ? j : j - 1];  // the layer before ends one j earlier
        const int32_t low = below > first - 1 ? below : first - 1;
        cuts[j] = best_cut(row, j, low, high < j ? high : j - 1);
        high = cuts[j];
    }
}

static void find_cuts(Row *row, int k) {
    const int32_t m = row->points;
    for (int32_t j = 1; j <= m; j++) row->gain[j] = row->moment[j] * row->moment[j] / row->weight[j];
    for (int c = 1; c < k; c++) {  // c + 1 clusters; the k - 1 - c that follow need a point each
        int32_t *cuts = row->cut + (int64_t)c * (m + 1);
        const int32_t last = m - (k - 1 - c), first = c == k - 1 ? m : c + 1;
        double *swap = row->previous;
        row->previous = row->gain;
        row->gain = swap;
        if (c > 1 && c < k - 1 && (int64_t)c * c * HALVING > m)
            fill_downwards(row, cuts, cuts - (m + 1), first, last);
        else
            fill_by_halving(row, cuts, first, last, c, last - 1);
    }
}

// --- centroids and assignment -------------------------------------------------------------------------------------

static void set_centroids(Row *row, int k, float *centroids) {
    int32_t end = row->points;
    for (int c = k - 1; c >= 0; c--) {
        const int32_t start = c ? row->cut[(int64_t)c * (row->points + 1) + end] : 0;
        double offset = (row->moment[end] - row->moment[start]) / (row->weight[end] - row->weight[start]);
        if (offset < row->x[start]) offset = row->x[start];  // rounding must not carry a mean out of its cluster
        if (offset > row->x[end - 1]) offset = row->x[end - 1];
        centroids[c] = (float)(row->mean + offset);
        end = start;
    }
}

// Nearest centroid of every value, the lower one on a tie; returns the weighted squared error.
static double assign_row(const Row *row, const float *weights, int64_t n, int k, const float *centroids, uint8_t *code) {
    double error = 0;
    int c = 0;
    for (int64_t i = 0; i < n; i++) {
        const double value = value_of(row->pairs[i] >> 32);
        while (c + 1 < k && value > 0.5 * ((double)centroids[c] + centroids[c + 1])) c++;
        code[(uint32_t)row->pairs[i]] = (uint8_t)c;
        error += weight_at(weights, row->pairs[i]) * (value - centroids[c]) * (value - centroids[c]);
    }
    return error;
}

static double solve(Row *row, const float *values, const float *weights, int64_t n, int k, float *centroids,
                    uint8_t *code) {
    sort_row(row, values, n);
    collect_points(row, weights, n);
    const int used = row->points < k ? row->points : k;  // fewer distinct values than codes: the last one repeats
    find_cuts(row, used);
    set_centroids(row, used, centroids);
    for (int c = used; c < k; c++) centroids[c] = centroids[used - 1];
    return assign_row(row, weights, n, used, centroids, code);
}

// --- memory and rows ----------------------------------------------------------------------------------------------

static void release(Row *row) {
    void *all[] = {row->pairs, row->spare, row->x, row->weight, row->moment, row->gain,
                   row->previous, row->cut};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
}

static int reserve(Row *row, int64_t n, int k) {
    double **doubles[] = {&row->x, &row->weight, &row->moment, &row->gain, &row->previous};
    memset(row, 0, sizeof *row);
    int ok = (row->pairs = malloc(8 * n)) && (row->spare = malloc(8 * n));
    for (size_t i = 0; i < sizeof doubles / sizeof *doubles; i++)
        ok = ok && (*doubles[i] = malloc(sizeof(double) * (n + 1)));
    return ok && (row->cut = malloc(sizeof(int32_t) * (n + 1) * k));
}

// values     float  [rows][n]   finite
// weights    float  [rows][n] or, with weight_stride 0, [n] for all rows; null for all 1; >= 0, a positive sum per row
// n          values a row, 1 to 2^31 - 1
// k          codes, 1 to 256
// centroids  float  [rows][k]   rising
// code       uint8  [rows][n]   index of the nearest centroid
// error      double [rows]      weighted squared error
// returns 0, or 1 when memory ran out
int trapetum_kmeans(const float *values, const float *weights, int64_t weight_stride, int64_t rows, int64_t n, int k,
                    int threads, float *centroids, uint8_t *code, double *error) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Row row;
        failed = !reserve(&row, n, k);
#pragma omp for schedule(dynamic, 4)
        for (int64_t r = 0; r < rows; r++) {
            if (failed) continue;
            const float *w = weights ? weights + r * weight_stride : NULL;
            error[r] = solve(&row, values + r * n, w, n, k, centroids + r * k, code + r * n);
        }
        release(&row);
    }
    return failed;
}
