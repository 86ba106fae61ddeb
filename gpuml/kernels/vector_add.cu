// c = a + b: one thread adds one pair of numbers.
//
// Launch: blocks of any size, enough of them to cover n; for example 256 threads a block.

extern "C" __global__
void vector_add(const float* a, const float* b, float* c, int n)
{
    // 64 bits, because blocks x threads may exceed what an int holds.
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;

    // The last block may reach past the end: its surplus threads do nothing.
    if (i < n) {
        c[i] = a[i] + b[i];
    }
}
