// 1-D k-means of sorted rows with cuts on the edges of bins, then Lloyd steps over all points; one block a row.
//
// W and S are a row's prefix sums of w and of w*x at the bins' edges. Leaving out what the cut does not change, the
// best gain with c clusters over the first j bins is
//
//     gain[c][j] = max over i < j of gain[c-1][i] + (S[j] - S[i])^2 / (W[j] - W[i])
//
// The best i never falls as j grows. Every STRIDE-th j is searched whole, by a warp each; a j in between is
// searched by one thread, between what its two neighbours found. A layer needs about
// bins^2 / (2 STRIDE) + bins * STRIDE steps instead of bins^2 / 2.
//
// Shared memory: W, S and two layers of gain, all double; the current layer's cuts; centroids and bounds.
// Global memory: all layers' cuts, written once and read along one path.
// Same algorithm in torch: trapetum.kmeans (`_solve_torch`). Needs no host headers.

#define STRIDE 16
#define THREADS 256  // at least k
#define WARPS (THREADS / 32)
#define MAX_CODES 256

struct Shared {
    double *weight, *moment, *gain, *previous;  // [bins + 1]
    double *centroid;                           // [MAX_CODES]
    int *cut;                                   // [bins + 1]
    int *bound;                                 // [MAX_CODES + 1]
};

static __device__ Shared carve(double* memory, int bins) {
    Shared s;
    s.weight = memory;
    s.moment = s.weight + bins + 1;
    s.gain = s.moment + bins + 1;
    s.previous = s.gain + bins + 1;
    s.centroid = s.previous + bins + 1;
    s.cut = (int*)(s.centroid + MAX_CODES);
    s.bound = s.cut + bins + 1;
    return s;
}

static __device__ double gain_with(const Shared& s, int i, int j) {
    const double weight = s.weight[j] - s.weight[i], moment = s.moment[j] - s.moment[i];
    return s.previous[i] + (weight > 0 ? moment * moment / weight : 0);
}

// The best i of low, low + step, ... up to high, the lowest on a tie.
static __device__ void search(const Shared& s, int j, int low, int high, int step, double* best, int* cut) {
    *best = -1;
    *cut = low;
    for (int i = low; i <= high; i += step) {
        const double gain = gain_with(s, i, j);
        if (gain > *best) {
            *best = gain;
            *cut = i;
        }
    }
}

// Each warp takes every WARPS-th of j = bins, bins - STRIDE, ... down to first; `only` stops after the first.
static __device__ void fill_coarse(const Shared& s, int bins, int first, bool only) {
    const int lane = threadIdx.x & 31;
    for (int j = bins - (int)(threadIdx.x >> 5) * STRIDE; j >= (only ? bins : first); j -= WARPS * STRIDE) {
        double best;
        int cut;
        search(s, j, first - 1 + lane, j - 1, 32, &best, &cut);
        for (int offset = 16; offset > 0; offset >>= 1) {
            const double other = __shfl_down_sync(0xffffffffu, best, offset);
            const int place = __shfl_down_sync(0xffffffffu, cut, offset);
            if (other > best || (other == best && place < cut)) {
                best = other;
                cut = place;
            }
        }
        if (lane == 0) {
            s.gain[j] = best;
            s.cut[j] = cut;
        }
    }
}

static __device__ void fill_fine(const Shared& s, int bins, int first) {
    for (int j = first + (int)threadIdx.x; j < bins; j += THREADS) {
        const int above = bins - (bins - j) / STRIDE * STRIDE, below = above - STRIDE;
        if (j == above) continue;
        const int low = below >= first ? s.cut[below] : first - 1;
        const int high = s.cut[above] < j - 1 ? s.cut[above] : j - 1;
        double best;
        int cut;
        search(s, j, low, high, 1, &best, &cut);
        s.gain[j] = best;
        s.cut[j] = cut;
    }
}

static __device__ void fill_layers(Shared& s, int bins, int k, unsigned short* cuts) {
    for (int j = 1 + threadIdx.x; j <= bins; j += THREADS)
        s.gain[j] = s.weight[j] > 0 ? s.moment[j] * s.moment[j] / s.weight[j] : 0;
    for (int c = 1; c < k; c++) {
        double* swap = s.previous;
        s.previous = s.gain;
        s.gain = swap;
        __syncthreads();
        fill_coarse(s, bins, c + 1, c == k - 1);
        __syncthreads();
        if (c < k - 1) fill_fine(s, bins, c + 1);
        __syncthreads();
        for (int j = c + 1 + threadIdx.x; j <= bins; j += THREADS) cuts[c * (bins + 1) + j] = s.cut[j];
    }
    __syncthreads();
}

static __device__ void backtrack(const Shared& s, const int* edge, const unsigned short* cuts, int bins, int n, int k) {
    if (threadIdx.x == 0) {
        s.bound[0] = 0;
        s.bound[k] = n;
        for (int c = k - 1, j = bins; c > 0; c--) {
            j = cuts[c * (bins + 1) + j];
            s.bound[c] = edge[j];
        }
    }
    __syncthreads();
}

// A cluster of no weight keeps the centroid it has.
static __device__ void set_centroid(const Shared& s, const double* weight, const double* moment, int c) {
    const double w = weight[s.bound[c + 1]] - weight[s.bound[c]];
    if (w > 0) s.centroid[c] = (moment[s.bound[c + 1]] - moment[s.bound[c]]) / w;
}

static __device__ int first_above(const double* x, int n, double limit) {
    int low = 0;
    while (n > 0) {
        const int half = n / 2;
        if (x[low + half] <= limit) {
            low += half + 1;
            n -= half + 1;
        } else {
            n = half;
        }
    }
    return low;
}

static __device__ void lloyd(const Shared& s, const double* x, const double* weight, const double* moment, int n, int k,
                             int steps) {
    const int c = threadIdx.x;
    for (int step = 0; step < steps; step++) {
        int moved = 0;
        if (c > 0 && c < k) {
            const int bound = first_above(x, n, 0.5 * (s.centroid[c - 1] + s.centroid[c]));
            moved = bound != s.bound[c];
            s.bound[c] = bound;
        }
        if (!__syncthreads_or(moved)) return;
        if (c < k) set_centroid(s, weight, moment, c);
        __syncthreads();
    }
}

// x         double [rows][n]          sorted, around the row's mean
// weight    double [rows][n + 1]      prefix sums of w
// moment    double [rows][n + 1]      prefix sums of w*x
// edge      int    [rows][bins + 1]   where a cut may lie, from 0 to n, not falling
// k         1 to min(256, bins)
// steps     Lloyd steps at most
// cuts      uint16 [rows][k][bins+1]  scratch; bins <= 1024, so that shared memory stays under 48 KiB
// centroid  double [rows][k]          rising, around the row's mean
// Grid: rows. Block: THREADS. Dynamic shared memory: 8*(4*(bins+1) + 256) + 4*(bins+1 + 257) bytes.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    trapetum_kmeans(const double* x, const double* weight, const double* moment, const int* edge, int n, int bins, int k,
                    int steps, unsigned short* cuts, double* centroid) {
    extern __shared__ double memory[];
    Shared s = carve(memory, bins);
    const long long row = blockIdx.x;
    x += row * n;
    weight += row * (n + 1);
    moment += row * (n + 1);
    edge += row * (bins + 1);
    cuts += row * k * (bins + 1);
    for (int b = threadIdx.x; b <= bins; b += THREADS) {
        s.weight[b] = weight[edge[b]];
        s.moment[b] = moment[edge[b]];
    }
    __syncthreads();
    fill_layers(s, bins, k, cuts);
    backtrack(s, edge, cuts, bins, n, k);
    const int c = threadIdx.x;
    if (c < k) {
        s.centroid[c] = x[s.bound[c] < n ? s.bound[c] : n - 1];
        set_centroid(s, weight, moment, c);
    }
    __syncthreads();
    lloyd(s, x, weight, moment, n, k, steps);
    if (c < k) centroid[row * k + c] = s.centroid[c];
}
