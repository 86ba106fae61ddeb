// Trains a perceptron of any number of layers for many steps in one launch, on the whole GPU.
//
// Each layer, forward and back, is a phase: all blocks compute tiles of one product, and meet before
// the next phase. What they pass on stays in the L2 cache. A phase is so short that fetching its
// instructions counts: all products share one loop, and the layers as well.
//
// Launch: cooperatively, at most as many blocks as fit on the GPU together, of THREADS threads, with
// SHARED_BYTES of dynamic shared memory. All sums have a fixed order: the same bits each time.
// Needs compute capability 8.0.

#ifndef SIZES  // the sizes are compiled in
#define SIZES 784, 256, 128, 10  // features, units of each hidden layer, outputs
#define BATCH 128
#define CLASSES 1       // 1: cross entropy of integer labels, 0: mean squared error
#define OPTIMIZER 1     // 0: gradient descent, 1: with momentum, 2: Adam
#define SPACE 49152     // numbers in shared memory for the factors of a product
#define SHARED_BYTES 0  // 0: not checked
#endif

#include "mlp_step.cuh"

template <int... N>
struct Count {
    static constexpr int value = sizeof...(N);
};
__device__ constexpr int size(int i)
{
    const int sizes[] = {SIZES};
    return sizes[i];
}
constexpr int LAYERS = Count<SIZES>::value - 1;
constexpr int INPUTS = size(LAYERS - 1), OUTPUTS = size(LAYERS);  // of the last layer
constexpr int ROWS = (BATCH + 15) / 16 * 16;

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int TILE = 16;              // rows and columns of what a warp computes
constexpr int TALL = 64, WIDE = 32;   // of what a block computes where each warp has its own part
static_assert(THREADS == TILE * TILE && WARPS * TILE * TILE == TALL * WIDE, "tiles and threads");
static_assert((INPUTS + 1) * OUTPUTS <= SPACE, "the last layer's weights");

// A layer: its sizes, and where its weights (inputs x outputs, then the biases), its outputs and
// the loss's gradient by them are. The last two have lines of a multiple of 4 numbers.
struct Layer {
    int inputs, outputs, weight, bias, result, gradient, line;
};

struct Shared {
    float factors[SPACE];
    float sum[WARPS][TILE * TILE];
    int row[2][ROWS];  // which rows of the data make this batch, and the next
    Layer layer[LAYERS];
};
static_assert(!SHARED_BYTES || sizeof(Shared) == SHARED_BYTES, "the host reckons differently");

// A factor of a product. If BY_TERM each of its lines in memory holds one term of the sums for many
// rows (or columns), else many terms for one. `lines` may say where each line is found.
struct Factor {
    const float* data;
    int stride, height, length;
    const int* lines;
    bool by_term;
};

// Bring `terms` terms of SIZE rows (or columns) to shared memory; zeros where the matrix ends. Lines
// there are longer than what they hold, so that a warp's reads hit all banks.
template <int COUNT>
__device__ __forceinline__ View fetch(float* to, const Factor& m, int first, int begin, int terms)
{
    const bool whole = m.stride % 4 == 0 && (size_t)m.data % 16 == 0;
    const int t = threadIdx.x, stride = m.by_term ? COUNT + 8 : terms + 4;
    const int n_lines = m.by_term ? terms : COUNT, width = m.by_term ? COUNT : terms;
    const int top = m.by_term ? begin : first, left = m.by_term ? first : begin;
    // Some neighbouring threads for each line, of four numbers each at a time.
    const int each = m.by_term ? COUNT / 4 : 32, member = t & (each - 1);
#pragma unroll 2
    for (int line = t / each; line < n_lines; line += THREADS / each) {
        const bool there = top + line < m.height;
        const float* from = m.data + left;
        if (there) from += (long long)(m.lines ? m.lines[top + line] : top + line) * m.stride;
#pragma unroll 1
        for (int i = member * 4; i < width; i += each * 4) {
            const int real = there ? min(4, max(0, m.length - left - i)) : 0;
            float* place = to + line * stride + i;
            if (whole) copy_behind<16>(place, real ? from + i : m.data, 4 * real);
            else
#pragma unroll 1
                for (int j = 0; j < 4; ++j)
                    copy_behind<4>(place + j, j < real ? from + i + j : m.data, j < real ? 4 : 0);
        }
    }
    return m.by_term ? View{to, 1, stride} : View{to, stride, 1};
}

// The terms of a product that fit into shared memory at once, a multiple of 8 * WARPS.
template <int HEIGHT, int WIDTH>
__device__ constexpr int terms_at_once()
{
    return SPACE / (HEIGHT + 8 + WIDTH + 8) / (8 * WARPS) * (8 * WARPS);
}

// Wait for all blocks of the launch; what they wrote before is seen after.
__device__ __forceinline__ void meet(unsigned* arrived, unsigned& expected)
{
    expected += gridDim.x;
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned n;
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(n) : "l"(arrived) : "memory");
        while (n < expected);
    }
    __syncthreads();
}

extern "C" __global__ __launch_bounds__(THREADS, 1)
void mlp_grid(const float* X, const void* targets, const int* order, float* parameters,
              float* first, float* second, const float* learning_rates, float* numbers,
              float* losses, float* space, unsigned* arrived, int n_rows, int n_epochs)
{
    // parameters: of each layer W (inputs x outputs) and b; first, second: alike.
    // order: for each epoch n_rows row numbers. learning_rates: one for each epoch.
    // numbers: momentum, beta1, beta2, epsilon, weight decay, and Adam's two powers.
    // losses: one for each step. arrived: 0.
    // space: for each layer twice ROWS lines of its outputs, then ROWS numbers.
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& s = *(Shared*)memory;
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    const int worker = warp * gridDim.x + blockIdx.x, n_workers = WARPS * gridDim.x;
    float* row_loss = space;
    unsigned expected = 0;
    Rates rates = {0, numbers[0], numbers[1], numbers[2], numbers[3], numbers[4],
                   numbers[5], numbers[6]};

    if (t == 0) {
        Layer l = {};
        int end = ROWS, weights = 0;
        for (int i = 0; i < LAYERS; ++i) {
            l.inputs = size(i), l.outputs = size(i + 1), l.line = (l.outputs + 3) / 4 * 4;
            l.weight = weights, l.bias = weights + l.inputs * l.outputs;
            l.result = end, l.gradient = end + ROWS * l.line;
            weights = l.bias + l.outputs, end += 2 * ROWS * l.line;
            s.layer[i] = l;
        }
    }
    auto fetch_order = [&](int epoch, int begin, int (&row)[ROWS]) {
        for (int i = t; epoch < n_epochs && i < min(BATCH, n_rows - begin); i += THREADS)
            row[i] = order[(long long)epoch * n_rows + begin + i];
    };
    fetch_order(0, 0, s.row[0]);
    __syncthreads();

#pragma unroll 1
    for (int step = 0, epoch = 0, begin = 0; epoch < n_epochs; ++step) {
        const int h = min(BATCH, n_rows - begin), *rows = s.row[step % 2];
        rates.learning_rate = learning_rates[epoch];
        next_step<OPTIMIZER>(rates);
        begin += BATCH;
        if (begin >= n_rows) begin = 0, ++epoch;
        fetch_order(epoch, begin, s.row[(step + 1) % 2]);
        auto inputs_of = [&](int l, bool by_term) {  // of a layer
            if (l == 0) return Factor{X, size(0), h, size(0), rows, by_term};
            const Layer& before = s.layer[l - 1];
            return Factor{space + before.result, before.line, ROWS, before.outputs, nullptr,
                          by_term};
        };

        // Forward through the hidden layers, and back. Each tile by one block: its warps share the
        // terms, and each thread finishes one number.
#pragma unroll 1
        for (int phase = 0; phase < max(LAYERS, 2 * LAYERS - 3); ++phase) {
            if (phase == LAYERS - 1) {
                // The last layer, the loss, and its gradient by the outputs of the layer before;
                // a warp for each row.
                const Layer &last = s.layer[LAYERS - 1], &before = s.layer[LAYERS - 2];
                const float *w = parameters + last.weight, *bias = parameters + last.bias;
                // Few blocks, so that few ask for the same lines; each keeps what all its rows need.
                float *const w_here = s.factors, *const bias_here = w_here + INPUTS * OUTPUTS;
                if (blockIdx.x * WARPS < ROWS) {
                    for (int i = t; i < INPUTS * OUTPUTS; i += THREADS) w_here[i] = __ldcg(w + i);
                    if (t < OUTPUTS) bias_here[t] = __ldcg(bias + t);
                }
                __syncthreads();
#pragma unroll 1
                for (int row = blockIdx.x * WARPS + warp; row < ROWS; row += n_workers) {
                    const int sample = rows[min(row, h - 1)];
                    const int label = CLASSES ? (int)((const long long*)targets)[sample] : 0;
                    const float* target = (const float*)targets + (long long)sample * OUTPUTS;
                    const float* in = space + before.result + row * before.line;
                    float z[OUTPUTS] = {}, loss = 0, largest = LOWEST, total = 0;
#pragma unroll 4
                    for (int i = lane; i < INPUTS; i += 32) {
                        const float a = __ldcg(in + i);
#pragma unroll
                        for (int k = 0; k < OUTPUTS; ++k) z[k] += a * w_here[i * OUTPUTS + k];
                    }
#pragma unroll
                    for (int k = 0; k < OUTPUTS; ++k) {
#pragma unroll
                        for (int apart = 16; apart > 0; apart /= 2)
                            z[k] += __shfl_xor_sync(0xffffffff, z[k], apart);
                        z[k] += bias_here[k];
                        largest = fmaxf(largest, z[k]);
                    }
                    const float scale = row < h ? 1.f / (CLASSES ? h : h * OUTPUTS) : 0;
#pragma unroll
                    for (int k = 0; k < OUTPUTS; ++k) {
                        if (CLASSES) {
                            z[k] -= largest;
                            if (k == label) loss = -z[k];
                            z[k] = expf(z[k]);
                            total += z[k];
                        } else {
                            z[k] -= target[k];
                            loss += z[k] * z[k];
                            z[k] *= 2 * scale;
                        }
                    }
                    if (CLASSES) {
                        loss += logf(total);
                        const float share = scale / total;
#pragma unroll
                        for (int k = 0; k < OUTPUTS; ++k)
                            z[k] = z[k] * share - (k == label ? scale : 0);
                    }
                    float* back = space + before.gradient + row * before.line;
#pragma unroll 4
                    for (int i = lane; i < INPUTS; i += 32) {
                        float d = 0;
#pragma unroll
                        for (int k = 0; k < OUTPUTS; ++k) d += z[k] * w_here[i * OUTPUTS + k];
                        back[i] = __ldcg(in + i) > 0 ? d : 0;
                    }
                    float* out = space + last.gradient + row * last.line;
                    if (lane == 0) {
#pragma unroll
                        for (int k = 0; k < OUTPUTS; ++k) out[k] = z[k];
                        row_loss[row] = loss;
                    }
                }
                meet(arrived, expected);
                if (LAYERS == 2) break;
            }
            const bool forward = phase < LAYERS - 1;
            const int l = forward ? phase : 2 * LAYERS - 3 - phase;
            const Layer layer = s.layer[forward ? l : l - 1];
            const Layer& own = s.layer[l];
            Factor a = inputs_of(l, false), b = {parameters + own.weight, own.outputs, own.inputs,
                                                own.outputs, nullptr, forward};
            if (!forward)
                a = {space + own.gradient, own.line, ROWS, own.outputs, nullptr, false};
            const float* known = forward ? parameters + own.bias : space + layer.result;
            const int known_stride = forward ? 0 : layer.line;
            float* out = space + (forward ? layer.result : layer.gradient);
            const int n_terms = forward ? own.inputs : own.outputs;
            const int across = (layer.outputs + TILE - 1) / TILE;
#pragma unroll 1
            for (int tile = blockIdx.x; tile < ROWS / TILE * across; tile += gridDim.x) {
                const int row = tile / across * TILE, column = tile % across * TILE;
                const int r = row + t / TILE, c = column + t % TILE;
                const bool there = c < layer.outputs;
                const float k = there ? __ldcg(known + r * known_stride + c) : 0;
                constexpr int MOST = terms_at_once<TILE, TILE>();
                Tile<2> mine;
                mine.clear();
#pragma unroll 1
                for (int begin = 0; begin < n_terms; begin += MOST) {
                    const int terms = min(MOST, (n_terms - begin + 7) / 8 * 8);
                    View x = fetch<TILE>(s.factors, a, row, begin, terms);
                    View y = fetch<TILE>(s.factors + (TILE + 8) * MOST, b, column, begin, terms);
                    end_of_group();
                    wait_for_all_but<0>();
                    __syncthreads();
                    const int each = (terms / 8 + WARPS - 1) / WARPS * 8, from = warp * each;
                    x.data += from * x.across;
                    y.data += from * y.across;
                    mine.add(x, {y.data, y.across, y.down}, min(each, terms - from));
                    __syncthreads();
                }
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    s.sum[warp][mine.row(i) * TILE + mine.column(i)] = mine.value(i);
                __syncthreads();
                float total = 0;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) total += s.sum[w][t];
                if (there)
                    out[r * layer.line + c] = forward ? relu(total + k) : k > 0 ? total : 0;
                __syncthreads();
            }
            meet(arrived, expected);
        }

        // The weights of all layers follow their gradients. Each tile by one block, of which each
        // warp has its own part.
        int tile = blockIdx.x;
#pragma unroll 1
        for (int l = 0; l < LAYERS; ++l) {
            const Layer layer = s.layer[l];
            const int across = (layer.outputs + WIDE - 1) / WIDE;
            const int tiles = (layer.inputs + TALL - 1) / TALL * across;
            const Factor a = inputs_of(l, true);
            const Factor b = {space + layer.gradient, layer.line, ROWS, layer.outputs, nullptr, true};
#pragma unroll 1
            for (; tile < tiles; tile += gridDim.x) {
                const int row = tile / across * TALL, column = tile % across * WIDE;
                const int down = warp / (WIDE / TILE) * TILE, right = warp % (WIDE / TILE) * TILE;
                // What changes is fetched first, and arrives during the product. The last is a bias.
                float p[9], u[9], v[9], bias = 0;
                int place[9];
#pragma unroll
                for (int i = 0; i < 9; ++i) {
                    int r = i < 8 ? row + down + Tile<2>::row(i) : row + t;
                    int c = column + (i < 8 ? right + Tile<2>::column(i) : t);
                    bool there = c < layer.outputs && (i < 8 ? r < layer.inputs : row == 0 && t < WIDE);
                    place[i] = there ? (i < 8 ? layer.weight + r * layer.outputs : layer.bias) + c : -1;
                    if (!there) continue;
                    p[i] = __ldcg(parameters + place[i]);
                    if (OPTIMIZER > 0) u[i] = __ldcg(first + place[i]);
                    if (OPTIMIZER > 1) v[i] = __ldcg(second + place[i]);
                }
                constexpr int MOST = terms_at_once<TALL, WIDE>();
                Tile<2> mine;
                mine.clear();
#pragma unroll 1
                for (int begin = 0; begin < ROWS; begin += MOST) {
                    const int terms = min(MOST, ROWS - begin);
                    View x = fetch<TALL>(s.factors, a, row, begin, terms);
                    View y = fetch<WIDE>(s.factors + (TALL + 8) * MOST, b, column, begin, terms);
                    end_of_group();
                    wait_for_all_but<0>();
                    __syncthreads();
                    x.data += down;
                    mine.add(x, {y.data + right, y.across, y.down}, terms);
                    if (row == 0) {  // the biases' gradient: eight threads share a column
                        float part = 0;
                        for (int k = t / WIDE; k < terms; k += WARPS) part += y(t % WIDE, k);
                        s.sum[t / WIDE][t % WIDE] = part;
                        __syncthreads();
                        for (int w = 0; w < WARPS && t < WIDE; ++w) bias += s.sum[w][t];
                    }
                    __syncthreads();
                }
#pragma unroll
                for (int i = 0; i < 9; ++i) {
                    if (place[i] < 0) continue;
                    update<OPTIMIZER>(p[i], i < 8 ? mine.value(i % 8) : bias, u[i], v[i], i < 8,
                                      rates);
                    parameters[place[i]] = p[i];
                    if (OPTIMIZER > 0) first[place[i]] = u[i];
                    if (OPTIMIZER > 1) second[place[i]] = v[i];
                }
            }
            tile -= tiles;
        }
        if (worker == n_workers - 1) {
            float loss = 0;
            for (int row = lane; row < h; row += 32) loss += __ldcg(row_loss + row);
#pragma unroll
            for (int apart = 16; apart > 0; apart /= 2)
                loss += __shfl_xor_sync(0xffffffff, loss, apart);
            if (lane == 0) losses[step] = loss / (CLASSES ? h : h * OUTPUTS);
        }
        meet(arrived, expected);
    }
    if (OPTIMIZER == ADAM && worker == 0 && lane == 0) {
        numbers[5] = rates.power1;
        numbers[6] = rates.power2;
    }
}
