// Softmax cross entropy of each row of logits, and its gradient; then the mean over a batch.
//
// Launch: softmax_cross_entropy with a warp of 32 threads for each row, in blocks of THREADS; then
// softmax_cross_entropy_mean with a block of THREADS threads for each batch. All sums have a fixed
// order: the same bits each time.

#ifndef NUMBER
#define NUMBER float
#define THREADS 256
#endif

using Number = NUMBER;

__device__ float exponential(float x) { return expf(x); }
__device__ double exponential(double x) { return exp(x); }
__device__ float logarithm(float x) { return logf(x); }
__device__ double logarithm(double x) { return log(x); }

template <class T>
__device__ T sum_over_warp(T x)
{
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffff, x, apart);
    return x;
}

// Batches of `batch` rows follow each other; labels may be given once for all of them.
extern "C" __global__
void softmax_cross_entropy(const Number* logits, const long long* labels, Number* gradient,
                           Number* row_loss, int rows, int classes, int batch, int n_labels)
{
    int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const Number* z = logits + (long long)row * classes;
    Number* d = gradient + (long long)row * classes;
    const long long label = labels[row % n_labels];

    Number largest = z[0], total = 0;
    for (int k = lane; k < classes; k += 32) largest = largest > z[k] ? largest : z[k];
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) {
        Number other = __shfl_xor_sync(0xffffffff, largest, apart);
        largest = largest > other ? largest : other;
    }
    for (int k = lane; k < classes; k += 32) total += exponential(z[k] - largest);
    total = sum_over_warp(total);
    const Number share = 1 / (total * batch), one = Number(1) / batch;
    for (int k = lane; k < classes; k += 32)
        d[k] = exponential(z[k] - largest) * share - (k == label ? one : 0);
    if (lane == 0) {
        long long chosen = label < 0 ? label + classes : label;
        row_loss[row] = logarithm(total) - (z[chosen < classes ? chosen : 0] - largest);
    }
}

extern "C" __global__
void softmax_cross_entropy_mean(const Number* row_loss, Number* value, int batch)
{
    __shared__ double parts[THREADS / 32];
    double sum = 0;
    for (int i = threadIdx.x; i < batch; i += THREADS)
        sum += row_loss[(long long)blockIdx.x * batch + i];
    sum = sum_over_warp(sum);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int w = 1; w < THREADS / 32; ++w) sum += parts[w];
    value[blockIdx.x] = sum / batch;
}
