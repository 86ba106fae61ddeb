// What a layer does between its products, in place: z = max(z + bias, 0), and on the way back
// d = 0 where the layer's output was 0, and the sums of d over the batch. And rounding to bfloat16.
//
// Launch: any number of blocks of any number of threads, each with elements number first, first +
// all threads, and so on. `n` and `columns` count groups of VECTOR elements. relu_layer_back with
// blocks of 32 x 8 threads, for 32 groups of columns and `each` rows. All sums have a fixed order.

#ifndef NUMBER  // compiled in
#define NUMBER float  // of sums and biases: float or double
#define BFLOAT16 0    // 1: activations are stored in 16 bits
#define VECTOR 4      // elements of one access; a divisor of the number of columns
#endif

#include "bfloat16.cuh"

using Number = NUMBER;
#if BFLOAT16
using Stored = unsigned short;
__device__ Number widen(Stored x) { return from_bfloat16(x); }
__device__ Stored narrow(Number x) { return to_bfloat16(x); }
#else
using Stored = Number;
__device__ Number widen(Stored x) { return x; }
__device__ Stored narrow(Number x) { return x; }
#endif

template <class T>
struct alignas(VECTOR * sizeof(T)) Vector {
    T value[VECTOR];
};

__device__ long long first() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }
__device__ long long all() { return (long long)gridDim.x * blockDim.x; }

// Model number i / each has its own biases; `columns` and `each` count groups as well.
extern "C" __global__
void relu_layer(Vector<Stored>* z, const Vector<Number>* bias, long long n, int columns,
                long long each, int relu)
{
    for (long long i = first(); i < n; i += all()) {
        Vector<Stored> x = z[i];
        Vector<Number> b = bias[i / each * columns + i % columns];
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            Number sum = widen(x.value[j]) + b.value[j];
            x.value[j] = narrow(relu && sum < 0 ? 0 : sum);
        }
        z[i] = x;
    }
}

extern "C" __global__
void relu_layer_slope(Vector<Stored>* d, const Vector<Stored>* output, long long n)
{
    for (long long i = first(); i < n; i += all()) {
        Vector<Stored> x = d[i], y = output[i];
#pragma unroll
        for (int j = 0; j < VECTOR; ++j)
            if (!(widen(y.value[j]) > 0)) x.value[j] = 0;
        d[i] = x;
    }
}

extern "C" __global__
void relu_layer_round(const Vector<Number>* x, Vector<Stored>* rounded, long long n)
{
    for (long long i = first(); i < n; i += all()) {
        Vector<Number> in = x[i];
        Vector<Stored> out;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) out.value[j] = narrow(in.value[j]);
        rounded[i] = out;
    }
}

// parts: for each of gridDim.y parts of the rows the sums of all columns. output may be null.
extern "C" __global__
void relu_layer_back(Vector<Stored>* d, const Vector<Stored>* output, Vector<Number>* parts,
                     int rows, int columns, int each)
{
    __shared__ Vector<Number> shared[8][32];
    const int column = blockIdx.x * 32 + threadIdx.x, end = min(rows, (int)(blockIdx.y + 1) * each);
    Vector<Number> sum = {};
    for (int row = blockIdx.y * each + threadIdx.y; row < end && column < columns; row += 8) {
        const long long i = (long long)row * columns + column;
        Vector<Stored> x = d[i];
        if (output) {
            Vector<Stored> y = output[i];
#pragma unroll
            for (int j = 0; j < VECTOR; ++j)
                if (!(widen(y.value[j]) > 0)) x.value[j] = 0;
            d[i] = x;
        }
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum.value[j] += widen(x.value[j]);
    }
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || column >= columns) return;
    for (int w = 1; w < 8; ++w)
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum.value[j] += shared[w][threadIdx.x].value[j];
    parts[(long long)blockIdx.y * columns + column] = sum;
}

extern "C" __global__
void relu_layer_sum(const Number* parts, Number* sums, int n_parts, long long n)
{
    for (long long i = first(); i < n; i += all()) {
        double sum = 0;
        for (int part = 0; part < n_parts; ++part) sum += parts[part * n + i];
        sums[i] = sum;
    }
}
