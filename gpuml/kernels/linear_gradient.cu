// Loss and gradient of Y = X W + b under squared error, reading X once.
//
// A row of X is needed twice: for its residual r = x W + b - y, and, when that is known, for the
// gradient x r. Between the two it stays in registers. LANES threads share a row: each holds
// VALUES features, their weights, and their part of the gradient, over all rows of the group.
// All sums have a fixed order: the same bits each time.
//
// Launch: linear_gradient with any number of blocks of THREADS threads, each of which writes a
// partial sum; then linear_gradient_sum with ceil(SIZE / 32) blocks of 32 x 8 threads.

#ifndef FEATURES  // the sizes are compiled in, so that rows, weights and sums stay in registers
#define ELEMENT float
#define FEATURES 1024
#define OUTPUTS 1
#define THREADS 256
#define LANES 32    // threads for a row: a power of two up to 32, or all THREADS
#define VALUES 32   // features of a thread: FEATURES / LANES, rounded up to whole vectors
#define ROWS 1      // rows of a group under way at once
#define VECTOR 4    // features in one load; more than 1 only where alignment allows it
#endif

using Element = ELEMENT;

constexpr int GROUPS = THREADS / LANES;
constexpr int WARPS = (LANES + 31) / 32;                        // that share a row
constexpr int SIZE = FEATURES * OUTPUTS + OUTPUTS + 1;          // gradient of W, of b; the loss
constexpr int CHUNKS = VALUES / VECTOR;

struct alignas(VECTOR * sizeof(Element)) Vector {
    Element value[VECTOR];
};

// Feature number v of this thread: neighbours in a warp read neighbours in memory.
__device__ int feature(int lane, int v)
{
    return (v / VECTOR * LANES + lane) * VECTOR + v % VECTOR;
}

// Sum over the threads of a row; each gets the result.
__device__ void sum_over_row(Element (&part)[ROWS][OUTPUTS], Element* shared, int lane)
{
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int m = 0; m < OUTPUTS; ++m)
#pragma unroll
            for (int step = (LANES < 32 ? LANES : 32) / 2; step > 0; step /= 2)
                part[r][m] += __shfl_xor_sync(0xffffffff, part[r][m], step);
    if (WARPS == 1) return;
    if (lane % 32 == 0)
        for (int r = 0; r < ROWS; ++r)
            for (int m = 0; m < OUTPUTS; ++m)
                shared[(lane / 32 * ROWS + r) * OUTPUTS + m] = part[r][m];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
        for (int m = 0; m < OUTPUTS; ++m) {
            Element sum = 0;
            for (int w = 0; w < WARPS; ++w) sum += shared[(w * ROWS + r) * OUTPUTS + m];
            part[r][m] = sum;
        }
    __syncthreads();
}

extern "C" __global__ __launch_bounds__(THREADS)
void linear_gradient(const Element* X, const Element* Y, const Element* W, const Element* b,
                     Element* partial, long long n)
{
    __shared__ Element shared[SIZE > WARPS * ROWS * OUTPUTS ? SIZE : WARPS * ROWS * OUTPUTS];
    int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;

    Element weight[VALUES][OUTPUTS], gradient[VALUES][OUTPUTS] = {}, bias[OUTPUTS];
    Element bias_gradient[OUTPUTS] = {}, loss = 0;
#pragma unroll
    for (int v = 0; v < VALUES; ++v)
#pragma unroll
        for (int m = 0; m < OUTPUTS; ++m) {
            int f = feature(lane, v);
            weight[v][m] = f < FEATURES ? W[f * OUTPUTS + m] : 0;
        }
#pragma unroll
    for (int m = 0; m < OUTPUTS; ++m) bias[m] = b ? b[m] : 0;

    auto fetch = [&](long long first, Element (&x)[ROWS][VALUES]) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                int f = feature(lane, c * VECTOR);
                Vector vector = {};
                if (first + r < n && f < FEATURES)
                    vector = *(const Vector*)(X + (first + r) * FEATURES + f);
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) x[r][c * VECTOR + i] = vector.value[i];
            }
    };

    // All groups of all blocks take ROWS rows in turn. Those of the next turn are on their way
    // while these are worked on. A block's groups take the same number of turns.
    long long stride = (long long)gridDim.x * GROUPS * ROWS;
    long long first = ((long long)blockIdx.x * GROUPS + group) * ROWS;
    long long turns = (n + stride - 1) / stride;
    Element x[ROWS][VALUES], next[ROWS][VALUES];
    fetch(first, x);
    for (long long turn = 0; turn < turns; ++turn, first += stride) {
        fetch(first + stride, next);
        Element residual[ROWS][OUTPUTS] = {};
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int v = 0; v < VALUES; ++v)
#pragma unroll
                for (int m = 0; m < OUTPUTS; ++m) residual[r][m] += x[r][v] * weight[v][m];
        sum_over_row(residual, shared, lane);
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int m = 0; m < OUTPUTS; ++m) {
                bool real = first + r < n;
                Element target = real ? Y[(first + r) * OUTPUTS + m] : 0;
                Element error = real ? residual[r][m] + bias[m] - target : 0;
                loss += error * error;
                bias_gradient[m] += error;
#pragma unroll
                for (int v = 0; v < VALUES; ++v) gradient[v][m] += x[r][v] * error;
            }
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int v = 0; v < VALUES; ++v) x[r][v] = next[r][v];
    }

    // One group after the other adds its sums to the block's.
    for (int g = 0; g < GROUPS; ++g) {
        __syncthreads();
        if (g != group) continue;
#pragma unroll
        for (int v = 0; v < VALUES; ++v)
#pragma unroll
            for (int m = 0; m < OUTPUTS; ++m) {
                int f = feature(lane, v);
                if (f >= FEATURES) continue;
                Element before = g ? shared[f * OUTPUTS + m] : 0;
                shared[f * OUTPUTS + m] = before + gradient[v][m];
            }
        if (lane == 0) {
            for (int m = 0; m < OUTPUTS; ++m) {
                Element* sum = shared + FEATURES * OUTPUTS + m;
                *sum = (g ? *sum : 0) + bias_gradient[m];
            }
            shared[SIZE - 1] = (g ? shared[SIZE - 1] : 0) + loss;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < SIZE; i += THREADS)
        partial[(long long)blockIdx.x * SIZE + i] = shared[i];
}

// Add the blocks' partial sums in double precision, and scale: the gradient by 2 scale, the loss by
// scale.
extern "C" __global__
void linear_gradient_sum(const Element* partial, int blocks, double scale,
                         Element* weight_gradient, Element* bias_gradient, Element* loss)
{
    // 32 results a block; 8 threads share the work for each.
    __shared__ double shared[8][32];
    int i = blockIdx.x * 32 + threadIdx.x, slice = threadIdx.y;
    double sum = 0;
    if (i < SIZE)
#pragma unroll 8
        for (int block = slice; block < blocks; block += 8)
            sum += partial[(long long)block * SIZE + i];
    shared[slice][threadIdx.x] = sum;
    __syncthreads();
    if (slice > 0 || i >= SIZE) return;
    for (int s = 1; s < 8; ++s) sum += shared[s][threadIdx.x];

    int weights = FEATURES * OUTPUTS;
    if (i >= weights && i < SIZE - 1 && !bias_gradient) return;
    Element* out = i < weights ? weight_gradient + i : bias_gradient + (i - weights);
    if (i == SIZE - 1) out = loss;
    *out = sum * (i == SIZE - 1 ? scale : 2 * scale);
}
