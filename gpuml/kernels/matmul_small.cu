// c[i] = a[i] b[i] for very many small matrices: ROWS x INNER times INNER x COLUMNS.
//
// Such products wait for memory, not for arithmetic. So a block fetches the operands of several
// products in one sweep, each byte once and next to the byte of its neighbour thread, into shared
// memory. Then each thread multiplies a TILE x TILE part of one product out of it.
//
// Launch: ceil(n / PRODUCTS) blocks of THREADS threads.
// a_step, b_step: elements from one matrix to the next, 0 where all products share one.

#ifndef ROWS  // the sizes are compiled in, so that all loops unroll
#define ELEMENT float
#define ROWS 8
#define COLUMNS 8
#define INNER 8
#define THREADS 128
#define PRODUCTS 32  // of a block: THREADS / threads for one product, or what fits
#define A_TRANSPOSED 0  // 1: a[i] lies in memory column by column
#define B_TRANSPOSED 0
#define A_VECTOR 4  // elements in one load of a; more than 1 only where alignment allows it
#define B_VECTOR 4
#endif

using Element = ELEMENT;

constexpr int TILE = 4;
constexpr int ROW_PARTS = (ROWS + TILE - 1) / TILE;
constexpr int COLUMN_PARTS = (COLUMNS + TILE - 1) / TILE;
constexpr int PARTS = ROW_PARTS * COLUMN_PARTS;           // threads for one product
constexpr int PAD = 16 / sizeof(Element);                 // spreads the matrices over the banks

template <int WIDTH>
struct alignas(WIDTH * sizeof(Element)) Vector {
    Element value[WIDTH];
};

// Copy `count` matrices of SIZE elements each from global to shared memory.
template <int SIZE, int WIDTH>
__device__ void fetch(const Element* from, long long step, int count, Element* to)
{
    constexpr int EACH = SIZE / WIDTH;  // loads for one matrix
#pragma unroll 4
    for (int i = threadIdx.x; i < count * EACH; i += THREADS) {
        int matrix = i / EACH, element = i % EACH * WIDTH;
        *(Vector<WIDTH>*)(to + matrix * (SIZE + PAD) + element) =
            *(const Vector<WIDTH>*)(from + matrix * step + element);
    }
}

extern "C" __global__ __launch_bounds__(THREADS)
void matmul_small(const Element* a, const Element* b, Element* c, long long n, long long a_step,
                  long long b_step)
{
    __shared__ alignas(16) Element a_here[PRODUCTS * (ROWS * INNER + PAD)];
    __shared__ alignas(16) Element b_here[PRODUCTS * (INNER * COLUMNS + PAD)];

    long long first = (long long)blockIdx.x * PRODUCTS;
    int count = n - first < PRODUCTS ? n - first : PRODUCTS;
    fetch<ROWS * INNER, A_VECTOR>(a + first * a_step, a_step, count, a_here);
    fetch<INNER * COLUMNS, B_VECTOR>(b + first * b_step, b_step, count, b_here);
    __syncthreads();

    int product = threadIdx.x / PARTS, part = threadIdx.x % PARTS;
    if (product >= count) return;
    const Element* x = a_here + product * (ROWS * INNER + PAD);
    const Element* y = b_here + product * (INNER * COLUMNS + PAD);
    // The rows of a thread lie apart, its columns side by side: fewer bank conflicts, whole stores.
    int row = part / COLUMN_PARTS, column = part % COLUMN_PARTS * TILE;

    Element sum[TILE][TILE] = {};
#pragma unroll
    for (int k = 0; k < INNER; ++k) {
        Element left[TILE], right[TILE];
#pragma unroll
        for (int t = 0; t < TILE; ++t) {
            int i = min(row + t * ROW_PARTS, ROWS - 1), j = min(column + t, COLUMNS - 1);
            left[t] = A_TRANSPOSED ? x[k * ROWS + i] : x[i * INNER + k];
            right[t] = B_TRANSPOSED ? y[j * INNER + k] : y[k * COLUMNS + j];
        }
#pragma unroll
        for (int i = 0; i < TILE; ++i)
#pragma unroll
            for (int j = 0; j < TILE; ++j) sum[i][j] += left[i] * right[j];
    }

    Element* out = c + (first + product) * (ROWS * COLUMNS);
#pragma unroll
    for (int t = 0; t < TILE; ++t) {
        int i = row + t * ROW_PARTS;
        if (i >= ROWS) continue;
        if (COLUMNS % TILE == 0) {
            Vector<TILE> whole;
#pragma unroll
            for (int j = 0; j < TILE; ++j) whole.value[j] = sum[t][j];
            *(Vector<TILE>*)(out + i * COLUMNS + column) = whole;
        } else {
#pragma unroll
            for (int j = 0; j < TILE; ++j)
                if (column + j < COLUMNS) out[i * COLUMNS + column + j] = sum[t][j];
        }
    }
}
