// How some epochs of many models ended: whether the weights after each and its losses are finite, and
// the mean loss.
//
// Launch: a block of THREADS threads for each model (x) and epoch (y). All sums have a fixed order.

#ifndef NUMBER
#define NUMBER float
#define THREADS 128
#endif

using Number = NUMBER;

// weights: for each epoch and model `size` numbers. losses: for each epoch and step one for each
// model. shares: of the epoch's samples in each step. fine, mean: for each epoch and model.
extern "C" __global__
void epochs_end(const Number* weights, long long size, const Number* losses, const double* shares,
                int n_steps, double* fine, double* mean)
{
    const int model = blockIdx.x, n_models = gridDim.x, epoch = blockIdx.y;
    const long long place = (long long)epoch * n_models + model;
    bool good = true;
    for (long long i = threadIdx.x; i < size; i += THREADS)
        good &= isfinite(weights[place * size + i]);
    __shared__ double parts[THREADS];
    double sum = 0;
    for (int i = threadIdx.x; i < n_steps; i += THREADS) {
        const Number loss = losses[((long long)epoch * n_steps + i) * n_models + model];
        good &= isfinite(loss);
        sum += loss * shares[i];
    }
    parts[threadIdx.x] = sum;
    for (int apart = THREADS / 2; apart > 0; apart /= 2) {
        __syncthreads();
        if (threadIdx.x < apart) parts[threadIdx.x] += parts[threadIdx.x + apart];
    }
    good = __syncthreads_and(good);
    if (threadIdx.x == 0) {
        fine[place] = good;
        mean[place] = parts[0];
    }
}
