// C = A B in float32: one thread computes one element of C.
//
// A is M x K, B is K x N, C is M x N; all are stored row after row.
// Launch: blocks of 16 x 16 threads; N / 16 x M / 16 blocks, rounded up.

extern "C" __global__
void matmul_naive(const float* A, const float* B, float* C, int M, int N, int K)
{
    // x counts columns: neighbouring threads then read neighbouring elements of B and write
    // neighbouring elements of C, which the memory serves in few requests.
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    int row = blockIdx.y * blockDim.y + threadIdx.y;
    if (row >= M || column >= N) {
        return;
    }

    // Every operand of every product comes from global memory (or a cache in front of it).
    float sum = 0.0f;
    for (int k = 0; k < K; ++k) {
        sum += A[(size_t)row * K + k] * B[(size_t)k * N + column];
    }
    C[(size_t)row * N + column] = sum;
}
