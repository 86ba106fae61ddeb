// Softmax cross entropy of each row of logits, and its gradient; and the mean over each batch.
//
// Launch: softmax_cross_entropy with a warp of 32 threads for each row, in blocks of THREADS; then
// softmax_cross_entropy_mean with a block of THREADS threads for each batch. Or, for small ones,
// softmax_cross_entropy_batch with a block of THREADS threads for each batch, and no more.
// All sums have a fixed order: the same bits each time.

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

template <class T>
__device__ T sum_over_block(T x)  // for the first thread
{
    __shared__ T parts[THREADS / 32];
    x = sum_over_warp(x);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    for (int w = 1; w < THREADS / 32 && threadIdx.x == 0; ++w) x += parts[w];
    return x;
}

// Returns a row's loss, and writes its gradient d; the lanes of a warp share the classes.
__device__ Number one_row(const Number* z, Number* d, long long label, int classes, int batch)
{
    const int lane = threadIdx.x % 32;
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
    const long long chosen = label < 0 ? label + classes : label;
    return logarithm(total) - (z[chosen < classes ? chosen : 0] - largest);
}

// Batches of `batch` rows follow each other; labels may be given once for all of them.
extern "C" __global__
void softmax_cross_entropy(const Number* logits, const long long* labels, Number* gradient,
                           Number* row_loss, int rows, int classes, int batch, int n_labels)
{
    const int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    const long long first = (long long)row * classes;
    const Number loss = one_row(logits + first, gradient + first, labels[row % n_labels], classes,
                                batch);
    if (threadIdx.x % 32 == 0) row_loss[row] = loss;
}

extern "C" __global__
void softmax_cross_entropy_mean(const Number* row_loss, Number* value, int batch)
{
    double sum = 0;
    for (int i = threadIdx.x; i < batch; i += THREADS)
        sum += row_loss[(long long)blockIdx.x * batch + i];
    sum = sum_over_block(sum);
    if (threadIdx.x == 0) value[blockIdx.x] = sum / batch;
}

extern "C" __global__ __launch_bounds__(THREADS)
void softmax_cross_entropy_batch(const Number* logits, const long long* labels, Number* gradient,
                                 Number* value, int classes, int batch, int n_labels)
{
    double sum = 0;
    for (int i = threadIdx.x / 32; i < batch; i += THREADS / 32) {
        const long long row = (long long)blockIdx.x * batch + i, first = row * classes;
        const Number loss = one_row(logits + first, gradient + first, labels[row % n_labels],
                                    classes, batch);
        if (threadIdx.x % 32 == 0) sum += loss;
    }
    sum = sum_over_block(sum);
    if (threadIdx.x == 0) value[blockIdx.x] = sum / batch;
}
