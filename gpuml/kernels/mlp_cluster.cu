// Trains a perceptron with one hidden layer for many steps in one launch. Its weights and the
// optimizer's state stay in shared memory all the while.
//
// The blocks of a cluster share the hidden units: each computes its units for the whole batch, and
// what they add to the predictions. These sums travel to the block that has a row's predictions, and
// the loss's gradient by them travels back to all; nothing else leaves a block.
// A step is so short that fetching its instructions counts: loops are kept, not unrolled.
//
// Launch: one cluster of CLUSTER blocks of THREADS threads, with SHARED_BYTES of dynamic shared
// memory. All sums have a fixed order: the same bits each time.
// Needs compute capability 8.0, and 9.0 for more than one block.

#ifndef FEATURES  // the sizes are compiled in
#define FEATURES 64
#define HIDDEN 128
#define OUTPUTS 10
#define BATCH 64
#if __CUDA_ARCH__ >= 900
#define CLUSTER 8       // blocks: a power of two; on older GPUs 1
#else
#define CLUSTER 1
#endif
#define THREADS 256
#define CLASSES 1       // 1: cross entropy of integer labels, 0: mean squared error
#define OPTIMIZER 1     // 0: gradient descent, 1: with momentum, 2: Adam
#define SHARED_BYTES 0  // 0: not checked
#endif

#include "mlp_step.cuh"

__device__ constexpr int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

constexpr int SHARE = (HIDDEN + CLUSTER - 1) / CLUSTER;  // hidden units of a block
constexpr int UNITS = round_up(SHARE, 8), DEPTH = round_up(FEATURES, 8);
constexpr int ROWS = round_up(BATCH, 16), SUMS = round_up(OUTPUTS, 8);
// Lines in shared memory have an odd number of groups of four: a warp's reads hit all banks.
constexpr int BY_FEATURE = DEPTH + 4, BY_UNIT = UNITS + 4, BY_OUTPUT = SUMS + 4;
constexpr int WARPS = THREADS / 32;
constexpr int KEPT = 1 + OPTIMIZER;  // the parameters, and vectors like them of the optimizer
constexpr int OWN = ROWS / CLUSTER;  // rows of which a block makes the predictions
// Bytes that a block gets in a step: what all units add to its rows, and the gradient, with the
// loss, of each row.
constexpr int SUMS_BYTES = ROWS * round_up(OUTPUTS, 2) * 4, GRADIENT_BYTES = ROWS * (OUTPUTS + 1) * 4;
static_assert(BATCH <= THREADS && OUTPUTS <= THREADS, "a thread for each row, and each output");

struct Shared {
    float input_weight[KEPT][UNITS * BY_FEATURE];  // unit by unit
    float input_bias[KEPT][UNITS];
    float output_weight[KEPT][SUMS * BY_UNIT];  // output by output
    float output_bias[KEPT][SUMS];
    float x[2][ROWS * BY_FEATURE];  // this batch and the next
    float hidden[ROWS * BY_UNIT], d_hidden[ROWS * BY_UNIT];
    float parts[CLUSTER][OWN * BY_OUTPUT];  // what each block's units add to the predictions
    float d_predictions[ROWS * BY_OUTPUT + 16];  // and in column SUMS each row's loss
    unsigned long long mail[2];
    long long label[2][CLASSES ? ROWS : 1];
    float target[2][CLASSES ? 2 : ROWS * OUTPUTS];
    int row[2][ROWS];  // which rows of the data make a batch
};
static_assert(!SHARED_BYTES || sizeof(Shared) == SHARED_BYTES, "the host reckons differently");

__device__ unsigned cluster_rank()
{
    unsigned rank = 0;
#if CLUSTER > 1
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

// All threads of all blocks meet.
__device__ void meet()
{
#if CLUSTER > 1
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// A counter of bytes that are to come from the blocks of the cluster. To wait for it is much
// cheaper than a meeting, which waits for everything that anyone has written anywhere.
struct Mail {
    unsigned long long state;

    __device__ unsigned here() const { return (unsigned)__cvta_generic_to_shared(&state); }
    __device__ void begin()
    {
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(here()) : "memory");
    }
    __device__ void end()
    {
        asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(here()) : "memory");
    }
    __device__ void expect(int bytes)
    {
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(here()), "r"(bytes)
                     : "memory");
    }
    __device__ void wait(int parity)
    {
        unsigned done = 0;
        while (!done)
            asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
                         "selp.u32 %0, 1, 0, p; }"
                         : "=r"(done) : "r"(here()), "r"(parity) : "memory");
    }
    // Send to the same place in the shared memory of a block.
    __device__ void send(float* place, unsigned block, float a) const
    {
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];"
                     ::"r"(there(place, block)), "f"(a), "r"(there(&state, block)) : "memory");
    }
    __device__ void send(float* place, unsigned block, float a, float b) const
    {
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, "
                     "[%3];" ::"r"(there(place, block)), "f"(a), "f"(b),
                     "r"(there(&state, block)) : "memory");
    }
    __device__ static unsigned there(const void* place, unsigned block)
    {
        unsigned here = (unsigned)__cvta_generic_to_shared(place), there;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(block));
        return there;
    }
};

extern "C" __global__ __launch_bounds__(THREADS, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
void mlp_cluster(const float* X, const void* targets, const int* order, float* parameters,
                 float* first, float* second, const float* learning_rates, float* numbers,
                 float* losses, int n_rows, int n_epochs)
{
    // parameters: W1 (FEATURES x HIDDEN), b1, W2 (HIDDEN x OUTPUTS), b2; first, second: alike.
    // order: for each epoch n_rows row numbers. learning_rates: one for each epoch.
    // numbers: momentum, beta1, beta2, epsilon, weight decay, and Adam's two powers.
    // losses: one for each step.
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& s = *(Shared*)memory;
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    const unsigned rank = cluster_rank();
    const int first_unit = rank * SHARE, n_units = max(0, min(SHARE, HIDDEN - first_unit));
    // What this block keeps of the parameters, and of the vectors like them: here, and there.
    auto for_each_number = [&](int n_outputs, auto visit) {
#pragma unroll 1
        for (int v = 0; v < KEPT; ++v) {
            float *w1 = v == 0 ? parameters : v == 1 ? first : second;
            float *b1 = w1 + FEATURES * HIDDEN, *w2 = b1 + HIDDEN, *b2 = w2 + HIDDEN * OUTPUTS;
#pragma unroll 2
            for (int i = t; i < FEATURES * SHARE; i += THREADS) {
                const int f = i / SHARE, u = i % SHARE;
                if (u < n_units)
                    visit(s.input_weight[v][u * BY_FEATURE + f], w1[f * HIDDEN + first_unit + u]);
            }
#pragma unroll 1
            for (int i = t; i < OUTPUTS * n_units; i += THREADS)
                visit(s.output_weight[v][i % OUTPUTS * BY_UNIT + i / OUTPUTS],
                      w2[first_unit * OUTPUTS + i]);
#pragma unroll 1
            for (int i = t; i < n_units; i += THREADS)
                visit(s.input_bias[v][i], b1[first_unit + i]);
            if (t < n_outputs) visit(s.output_bias[v][t], b2[t]);
        }
    };

#pragma unroll 1
    for (int i = t; i < sizeof(Shared) / 8; i += THREADS) ((long long*)memory)[i] = 0;
    __syncthreads();
    for_each_number(OUTPUTS, [](float& here, float there) { here = there; });
    Rates rates = {0, numbers[0], numbers[1], numbers[2], numbers[3], numbers[4],
                   numbers[5], numbers[6]};
    auto follow = [&](auto& weights, int i, float gradient, bool decays) {
        float none = 0;
        update<OPTIMIZER>(weights[0][i], gradient, OPTIMIZER > 0 ? weights[OPTIMIZER > 0][i] : none,
                          OPTIMIZER > 1 ? weights[OPTIMIZER][i] : none, decays, rates);
    };

    // What a step works on: rows from `begin` on of an epoch's order.
    struct Place {
        int number = 0, epoch = 0, begin = 0;
    };
    auto after = [&](Place p) {
        bool more = p.begin + BATCH < n_rows;
        return Place{p.number + 1, p.epoch + !more, more ? p.begin + BATCH : 0};
    };
    auto height = [&](Place p) { return p.epoch < n_epochs ? min(BATCH, n_rows - p.begin) : 0; };
    auto fetch_order = [&](Place p) {
        if (t < height(p))
            copy_behind<4>(s.row[p.number % 2] + t,
                           order + (long long)p.epoch * n_rows + p.begin + t);
    };
    auto fetch_rows = [&](Place p) {
        const int h = height(p), *row = s.row[p.number % 2];
        constexpr int WIDTH = FEATURES % 4 == 0 ? 4 : 1, LOADS = FEATURES / WIDTH;
#pragma unroll 1
        for (int i = t; i < h * LOADS; i += THREADS) {
            int r = i / LOADS, f = i % LOADS * WIDTH;
            copy_behind<4 * WIDTH>(s.x[p.number % 2] + r * BY_FEATURE + f,
                                   X + (long long)row[r] * FEATURES + f);
        }
        if (CLASSES && t < h)
            copy_behind<8>(s.label[p.number % 2] + t, (const long long*)targets + row[t]);
#pragma unroll 1
        for (int i = t; !CLASSES && i < h * OUTPUTS; i += THREADS)
            copy_behind<4>(s.target[p.number % 2] + i, (const float*)targets +
                           (long long)row[i / OUTPUTS] * OUTPUTS + i % OUTPUTS);
    };
    Place step, next = after(step);
    fetch_order(step);
    end_of_group();
    wait_for_all_but<0>();
    __syncthreads();
    fetch_order(next);
    fetch_rows(step);
    end_of_group();
    Mail* mail = (Mail*)s.mail;
    if (CLUSTER > 1 && t == 0) {
        mail[0].begin();
        mail[1].begin();
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        __syncwarp(1);  // keeps this a branch: see tests/benchmarks/sanitize.py
    }
    meet();  // all blocks have begun: their memory may be written to

#pragma unroll 1
    for (; step.epoch < n_epochs; step = next, next = after(next)) {
        const int now = step.number % 2, h = height(step);
        const float *x = s.x[now], *w1 = s.input_weight[0], *w2 = s.output_weight[0];
        rates.learning_rate = learning_rates[step.epoch];
        next_step<OPTIMIZER>(rates);
        wait_for_all_but<0>();
        __syncthreads();
        fetch_rows(next);
        fetch_order(after(next));
        end_of_group();
        if (CLUSTER > 1 && t == 0) {
            mail[0].expect(SUMS_BYTES);
            mail[1].expect(GRADIENT_BYTES);
        }

        // hidden = relu(x W1 + b1)
#pragma unroll 1
        for (int i = warp; i < ROWS / 16 * (UNITS / 8); i += WARPS) {
            const int row = i / (UNITS / 8) * 16, unit = i % (UNITS / 8) * 8;
            Tile<1> tile;
            tile.clear();
            tile.add({x + row * BY_FEATURE, BY_FEATURE, 1}, {w1 + unit * BY_FEATURE, 1, BY_FEATURE},
                     DEPTH);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int u = unit + tile.column(j);
                s.hidden[(row + tile.row(j)) * BY_UNIT + u] =
                    relu(tile.value(j) + s.input_bias[0][u]);
            }
        }
        __syncthreads();

        // what these units add to the predictions, for every block
#pragma unroll 1
        for (int i = warp; i < ROWS / 16 * (SUMS / 8); i += WARPS) {
            const int row = i / (SUMS / 8) * 16, k = i % (SUMS / 8) * 8;
            Tile<1> tile;
            tile.clear();
            tile.add({s.hidden + row * BY_UNIT, BY_UNIT, 1}, {w2 + k * BY_UNIT, 1, BY_UNIT}, UNITS);
            if (k + tile.column(0) < OUTPUTS)
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    const int r = row + tile.row(j), block = r / OWN;
                    float* place = s.parts[rank] + r % OWN * BY_OUTPUT + k + tile.column(0);
                    if (CLUSTER > 1) mail[0].send(place, block, tile.value(j), tile.value(j + 1));
                    else *(float2*)place = make_float2(tile.value(j), tile.value(j + 1));
                }
        }
        // Nobody sends the next sums before all gradients have come, which are sent after the sums
        // were read; nor the next gradients before the sums of blocks that are done with these.
        if (CLUSTER > 1) mail[0].wait(now);
        else __syncthreads();

        // predictions, loss and its gradient, of this block's rows, by several lanes for each
        constexpr int LANES = THREADS >= 32 * OWN ? 32 : THREADS >= 16 * OWN ? 16
            : THREADS >= 8 * OWN ? 8 : THREADS >= 4 * OWN ? 4 : THREADS >= 2 * OWN ? 2 : 1;
        constexpr int EACH = (OUTPUTS + LANES - 1) / LANES;
        if (t / LANES < OWN) {
            const int own = t / LANES, member = t % LANES, row = rank * OWN + own;
            const bool real = row < h;
            const float scale = real ? 1.f / (CLASSES ? h : h * OUTPUTS) : 0;
            float z[EACH], largest = LOWEST, total = 0, loss = 0;
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const int k = member + i * LANES;
                z[i] = LOWEST;
                if (k >= OUTPUTS) continue;
                z[i] = s.output_bias[0][k];
#pragma unroll
                for (int c = 0; c < CLUSTER; ++c) z[i] += s.parts[c][own * BY_OUTPUT + k];
                largest = fmaxf(largest, z[i]);
            }
            const int label = CLASSES ? (int)s.label[now][row] : 0;
#pragma unroll
            for (int apart = 1; CLASSES && apart < LANES; apart *= 2)
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, apart));
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const int k = member + i * LANES;
                if (k >= OUTPUTS) continue;
                if (CLASSES) {
                    z[i] -= largest;
                    if (k == label) loss = -z[i];
                    z[i] = expf(z[i]);
                    total += z[i];
                } else {
                    z[i] -= s.target[now][row * OUTPUTS + k];
                    loss += z[i] * z[i];
                }
            }
#pragma unroll
            for (int apart = 1; apart < LANES; apart *= 2) {
                total += __shfl_xor_sync(0xffffffff, total, apart);
                loss += __shfl_xor_sync(0xffffffff, loss, apart);
            }
            if (CLASSES) loss += logf(total);
            const float share = CLASSES ? scale / total : 2 * scale;
#pragma unroll
            for (int i = 0; i <= EACH; ++i) {
                const int k = i < EACH ? member + i * LANES : OUTPUTS;
                if (i < EACH ? k >= OUTPUTS : member > 0) continue;
                float d = i < EACH ? z[i % EACH] * share - (CLASSES && k == label ? scale : 0)
                                   : loss * scale;
                if (!real) d = 0;
                float* place = s.d_predictions + row * BY_OUTPUT + (i < EACH ? k : SUMS);
                if (CLUSTER == 1) *place = d;
                else
#pragma unroll 4
                    for (int block = 0; block < CLUSTER; ++block) mail[1].send(place, block, d);
            }
        }
        if (CLUSTER > 1) mail[1].wait(now);
        else __syncthreads();

        // the gradient carried back to the hidden units
#pragma unroll 1
        for (int i = warp; i < ROWS / 16 * (UNITS / 8); i += WARPS) {
            const int row = i / (UNITS / 8) * 16, unit = i % (UNITS / 8) * 8;
            Tile<1> tile;
            tile.clear();
            tile.add({s.d_predictions + row * BY_OUTPUT, BY_OUTPUT, 1}, {w2 + unit, BY_UNIT, 1},
                     SUMS);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int place = (row + tile.row(j)) * BY_UNIT + unit + tile.column(j);
                s.d_hidden[place] = s.hidden[place] > 0 ? tile.value(j) : 0;
            }
        }
        __syncthreads();

        // all weights follow their gradients, and last the biases
        constexpr int INPUT_TILES = (FEATURES + 15) / 16 * (UNITS / 8);
        constexpr int TILES = INPUT_TILES + (OUTPUTS + 15) / 16 * (UNITS / 8);
        constexpr int BIASES = (UNITS + OUTPUTS + 1 + 31) / 32;
#pragma unroll 1
        for (int i = warp; i < TILES + BIASES; i += WARPS) {
            if (i >= TILES) {
                int c = (i - TILES) * 32 + lane, k = c - UNITS;
                const float* d = k < 0 ? s.d_hidden + c : s.d_predictions + (k < OUTPUTS ? k : SUMS);
                float sum = 0;
#pragma unroll 8
                for (int row = 0; row < ROWS; ++row, d += k < 0 ? BY_UNIT : BY_OUTPUT) sum += *d;
                if (k < 0) follow(s.input_bias, c, sum, false);
                else if (k < OUTPUTS) follow(s.output_bias, k, sum, false);
                else if (k == OUTPUTS && rank == 0) losses[step.number] = sum;
                continue;
            }
            const bool input = i < INPUT_TILES;
            const int line = (input ? i : i - INPUT_TILES) / (UNITS / 8) * 16;
            const int unit = i % (UNITS / 8) * 8;
            Tile<1> tile;
            tile.clear();
            if (input) tile.add({x + line, 1, BY_FEATURE}, {s.d_hidden + unit, BY_UNIT, 1}, ROWS);
            else tile.add({s.d_predictions + line, 1, BY_OUTPUT}, {s.hidden + unit, BY_UNIT, 1}, ROWS);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int l = line + tile.row(j), u = unit + tile.column(j);
                if (l >= (input ? FEATURES : OUTPUTS)) continue;
                if (input) follow(s.input_weight, u * BY_FEATURE + l, tile.value(j), true);
                else follow(s.output_weight, l * BY_UNIT + u, tile.value(j), true);
            }
        }
    }

    meet();  // no block ends while another may send to it
    if (CLUSTER > 1 && t == 0) {
        mail[0].end();
        mail[1].end();
    }
    for_each_number(rank == 0 ? OUTPUTS : 0, [](float here, float& there) { there = here; });
    if (rank == 0 && t == 0 && OPTIMIZER == ADAM) {
        numbers[5] = rates.power1;
        numbers[6] = rates.power2;
    }
}
