// For private training: the length of each row's gradient, and the factor that clips it.
//
// A row's gradient of a weight is a^T d, an outer product, so its length is |a| |d|: no such
// product is ever made. Goodfellow: Efficient Per-Example Gradient Computations. 2015.
//
// Launch: private_rows once a layer, with a warp of threads for each row in blocks of 256; then
// private_rows_mean with one block of 256.

#ifndef NUMBER
#define NUMBER float
#endif

using Number = NUMBER;

__device__ double warp_squares(const Number* row, int n)
{
    double sum = 0;
    for (int i = threadIdx.x % 32; i < n; i += 32) sum += (double)row[i] * row[i];
    for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
    return sum;
}

// a: (rows, n_in), a layer's inputs; d: (rows, n_out), the gradient at its outputs. squares: of
// the lengths so far, unless this is the first layer. factors: min(1, longest / length), written
// for the last layer; 0 for rows that are not present.
extern "C" __global__
void private_rows(const Number* a, const Number* d, int rows, int n_in, int n_out, int bias,
                  int first, int last, const Number* present, double longest, double* squares,
                  Number* factors)
{
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;  // a whole warp
    const double inputs = warp_squares(a + (long long)row * n_in, n_in) + bias;
    double sum = inputs * warp_squares(d + (long long)row * n_out, n_out);
    if (threadIdx.x % 32) return;
    if (!first) sum += squares[row];
    squares[row] = sum;
    if (!last) return;
    const double factor = longest / sqrt(sum);
    factors[row] = present[row] == 0 ? 0 : factor >= 1 ? 1 : (Number)factor;
}

// mean: of the values of present rows; 0 if there are none.
extern "C" __global__
void private_rows_mean(const Number* values, const Number* present, int rows, Number* mean)
{
    __shared__ double sums[256], counts[256];
    double sum = 0, count = 0;
    for (int row = threadIdx.x; row < rows; row += 256)
        if (present[row] != 0) sum += values[row], count += 1;
    sums[threadIdx.x] = sum, counts[threadIdx.x] = count;
    for (int apart = 128; apart > 0; apart /= 2) {
        __syncthreads();
        if (threadIdx.x < apart) {
            sums[threadIdx.x] += sums[threadIdx.x + apart];
            counts[threadIdx.x] += counts[threadIdx.x + apart];
        }
    }
    if (threadIdx.x == 0) *mean = (Number)(sums[0] / (counts[0] > 1 ? counts[0] : 1));
}
