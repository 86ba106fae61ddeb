// A vector made shorter: g *= min(1, longest / |g|).
//
// Launch: clip_norm, then clip_norm_scale, each with blocks of THREADS threads; clip_norm with at
// most THREADS blocks, each of which adds up a part. What is not finite stays so, or becomes NaN.

#ifndef NUMBER
#define NUMBER float
#define THREADS 256
#endif

using Number = NUMBER;

// The sum over all threads of a block, to all of them.
__device__ double block_sum(double value)
{
    __shared__ double parts[THREADS];
    parts[threadIdx.x] = value;
    for (int apart = THREADS / 2; apart > 0; apart /= 2) {
        __syncthreads();
        if (threadIdx.x < apart) parts[threadIdx.x] += parts[threadIdx.x + apart];
    }
    __syncthreads();
    return parts[0];
}

// sums: of squares, one number a block.
extern "C" __global__
void clip_norm(const Number* g, long long n, double* sums)
{
    double sum = 0;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < n;
         i += (long long)gridDim.x * THREADS)
        sum += (double)g[i] * g[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

extern "C" __global__
void clip_norm_scale(Number* g, long long n, const double* sums, int n_sums, double longest)
{
    const double sum = block_sum(threadIdx.x < n_sums ? sums[threadIdx.x] : 0);
    const double factor = longest / sqrt(sum);
    if (factor >= 1) return;  // not so if it is NaN
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < n;
         i += (long long)gridDim.x * THREADS)
        g[i] = (Number)(g[i] * factor);
}
