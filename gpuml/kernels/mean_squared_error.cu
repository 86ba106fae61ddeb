// The mean squared error of each batch, and its gradient, in one reading.
//
// Launch: mean_squared_error with n_parts blocks of THREADS threads for each batch of n numbers;
// then, if n_parts > 1, mean_squared_error_mean with a block of THREADS threads for each batch.
// All sums have a fixed order: the same bits each time.

#ifndef NUMBER
#define NUMBER float
#define THREADS 256
#endif

using Number = NUMBER;

// Returns the sum of all threads' x to the first of them.
__device__ double sum_over_block(double x)
{
    __shared__ double parts[THREADS / 32];
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffff, x, apart);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    for (int w = 1; w < THREADS / 32 && threadIdx.x == 0; ++w) x += parts[w];
    return x;
}

// d = slope (predictions - targets); targets may be given once for all batches. parts: the sums of
// the squared differences, or the means where there is one part for each batch.
extern "C" __global__
void mean_squared_error(const Number* predictions, const Number* targets, Number* d, double* parts,
                        Number* value, long long n, int n_parts, int shared, Number slope)
{
    const long long batch = blockIdx.x / n_parts, part = blockIdx.x % n_parts;
    predictions += batch * n;
    d += batch * n;
    if (!shared) targets += batch * n;
    double sum = 0;
    for (long long i = part * THREADS + threadIdx.x; i < n; i += (long long)n_parts * THREADS) {
        const Number difference = predictions[i] - targets[i];
        d[i] = slope * difference;
        sum += (double)difference * difference;
    }
    sum = sum_over_block(sum);
    if (threadIdx.x > 0) return;
    if (n_parts > 1) parts[blockIdx.x] = sum;
    else value[batch] = sum / n;
}

extern "C" __global__
void mean_squared_error_mean(const double* parts, Number* value, long long n, int n_parts)
{
    double sum = 0;
    for (int i = threadIdx.x; i < n_parts; i += THREADS)
        sum += parts[(long long)blockIdx.x * n_parts + i];
    sum = sum_over_block(sum);
    if (threadIdx.x == 0) value[blockIdx.x] = sum / n;
}
