// Writes the transpose of a matrix of float32: out (columns x rows) from in (rows x columns).
//
// Both memories are read and written by neighbouring threads in lines of 64 numbers; the change of
// order happens in shared memory.
// Launch: a block of 256 threads for each tile of 64 x 64; rows and columns divisible by 4, both
// matrices at multiples of 16 bytes.

constexpr int TILE = 64, LOADS = 4;

extern "C" __global__ __launch_bounds__(256)
void transpose(const float4* in, float4* out, int rows, int columns)
{
    __shared__ float tile[TILE][TILE + 1];
    const int four = threadIdx.x % 16 * 4, line = threadIdx.x / 16;
    const int row = blockIdx.y * TILE, column = blockIdx.x * TILE;
    float4 x[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        const int r = row + line + 16 * i, c = column + four;
        if (r < rows && c < columns) x[i] = in[((long long)r * columns + c) / 4];
    }
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        float* place = &tile[line + 16 * i][four];
        place[0] = x[i].x;
        place[1] = x[i].y;
        place[2] = x[i].z;
        place[3] = x[i].w;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < LOADS; ++i) {
        const int c = line + 16 * i;
        if (column + c < columns && row + four < rows)
            out[((long long)(column + c) * rows + row + four) / 4] = make_float4(
                tile[four][c], tile[four + 1][c], tile[four + 2][c], tile[four + 3][c]);
    }
}
