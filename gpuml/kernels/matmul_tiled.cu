// C = A B in float32: a block computes a tile of C, a thread 8 x 8 elements of it.
//
// A is M x K, B is K x N, C is M x N; all are stored row after row.
// Launch: blocks of 16 x 16 threads; N / 128 x M / 128 blocks, rounded up.
//
// Two ideas make it faster than matmul_naive:
// 1. The block brings a piece of A and a piece of B to shared memory, once, and all its threads
//    read them there. A piece is used 128 times for each time it is fetched.
// 2. A thread computes 8 x 8 elements. For each k it reads 8 numbers of A and 8 of B from shared
//    memory and makes 64 products of them: 4 products a number, where one element a thread would
//    give 1 product for 2 numbers.

constexpr int TILE = 128;                // rows and columns of C that a block computes
constexpr int STEP = 16;                 // how far a block goes along k between two barriers
constexpr int SIDE = 16;                 // the block has SIDE x SIDE threads
constexpr int EACH = TILE / SIDE;        // a thread computes EACH x EACH elements
constexpr int THREADS = SIDE * SIDE;
constexpr int LOADS = TILE * STEP / THREADS;   // a thread brings LOADS numbers to each tile

// Shared memory has 32 banks, and works fastest when the 32 threads of a warp use different
// ones. A is stored transposed, so a warp writes down STEP columns; these few numbers at the end
// of each row move the columns to different banks.
constexpr int PAD = 32 / STEP;

// At least 2 blocks shall fit on a multiprocessor, so that one computes while the other waits
// for memory: this limits a thread to 128 registers on GPUs with 65,536 of them.
extern "C" __global__ __launch_bounds__(THREADS, 2)
void matmul_tiled(const float* A, const float* B, float* C, int M, int N, int K)
{
    __shared__ float tile_A[STEP][TILE + PAD];   // transposed: tile_A[k][row]
    __shared__ float tile_B[STEP][TILE];         //             tile_B[k][column]

    int thread = threadIdx.y * SIDE + threadIdx.x;
    int first_row = blockIdx.y * TILE;
    int first_column = blockIdx.x * TILE;

    float sums[EACH][EACH] = {};                 // in registers

    for (int start = 0; start < K; start += STEP) {
        // All threads fill both tiles. Neighbouring threads read neighbouring addresses.
        // Outside the matrices there are zeros, which change no sum.
        for (int load = 0; load < LOADS; ++load) {
            int i = thread + load * THREADS;
            int row = first_row + i / STEP, k = start + i % STEP;
            tile_A[i % STEP][i / STEP] = row < M && k < K ? A[(size_t)row * K + k] : 0.0f;
        }
        for (int load = 0; load < LOADS; ++load) {
            int i = thread + load * THREADS;
            int k = start + i / TILE, column = first_column + i % TILE;
            tile_B[i / TILE][i % TILE] = k < K && column < N ? B[(size_t)k * N + column] : 0.0f;
        }
        __syncthreads();                         // the tiles are complete

#pragma unroll                                   // lets reads for the next k overlap with products
        for (int k = 0; k < STEP; ++k) {
            // EACH rows in sequence, but every SIDE-th column: threads with the same
            // threadIdx.y share one read of A, and their reads of B are neighbours.
            float a[EACH], b[EACH];
            for (int i = 0; i < EACH; ++i) {
                a[i] = tile_A[k][threadIdx.y * EACH + i];
                b[i] = tile_B[k][threadIdx.x + i * SIDE];
            }
            for (int i = 0; i < EACH; ++i) {
                for (int j = 0; j < EACH; ++j) {
                    sums[i][j] += a[i] * b[j];
                }
            }
        }
        __syncthreads();                         // no thread needs them any more
    }

    for (int i = 0; i < EACH; ++i) {
        int row = first_row + threadIdx.y * EACH + i;
        for (int j = 0; j < EACH; ++j) {
            int column = first_column + threadIdx.x + j * SIDE;
            if (row < M && column < N) {
                C[(size_t)row * N + column] = sums[i][j];
            }
        }
    }
}
