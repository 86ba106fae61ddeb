// The end of an epoch: are all its losses and weights finite, what is the mean loss; and, if all
// epochs so far were good, a copy of the weights.
//
// Launch: epoch_end, then epoch_end_keep, with any number of blocks of THREADS threads. `fine` is 1
// before the first epoch, and turns 0 for good.

#ifndef NUMBER
#define NUMBER float
#define THREADS 256
#endif

using Number = NUMBER;

// shares: of the epoch's samples in each step.
extern "C" __global__
void epoch_end(const Number* weights, long long n, const Number* losses, const double* shares,
               int n_steps, int* fine, double* mean)
{
    bool bad = false;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < n;
         i += (long long)gridDim.x * THREADS)
        bad |= !isfinite(weights[i]);
    if (blockIdx.x == 0) {
        __shared__ double parts[THREADS];
        double sum = 0;
        for (int i = threadIdx.x; i < n_steps; i += THREADS) {
            bad |= !isfinite(losses[i]);
            sum += losses[i] * shares[i];
        }
        parts[threadIdx.x] = sum;
        for (int apart = THREADS / 2; apart > 0; apart /= 2) {
            __syncthreads();
            if (threadIdx.x < apart) parts[threadIdx.x] += parts[threadIdx.x + apart];
        }
        if (threadIdx.x == 0) *mean = parts[0];
    }
    if (bad) *fine = 0;
}

extern "C" __global__
void epoch_end_keep(const Number* weights, Number* kept, long long n, const int* fine,
                    long long* n_good)
{
    if (!*fine) return;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < n;
         i += (long long)gridDim.x * THREADS)
        kept[i] = weights[i];
    if (blockIdx.x == 0 && threadIdx.x == 0) ++*n_good;
}
