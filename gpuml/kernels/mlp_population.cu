// Trains many perceptrons of one shape, with one hidden layer, for many steps in one launch. Their
// weights and the optimizer's state stay in shared memory all the while.
//
// A block holds MODELS of them, which read the same rows, and gives each WARPS warps. A warp takes
// 16 rows of the batch from the data to the hidden units' gradient without meeting any other: what
// one product gives is what the next one needs, in the same registers, since the order of a sum's
// terms is free. Then the model's warps meet and share the weights' gradient by tiles.
// Loops are kept where they can be: fetching instructions counts.
//
// Launch: for each MODELS models a block of 32 * WARPS * MODELS threads, with SHARED_BYTES of
// dynamic shared memory. All sums have a fixed order: the same bits each time.
// Needs compute capability 8.0.

#ifndef FEATURES  // the sizes are compiled in
#define FEATURES 64
#define HIDDEN 32
#define OUTPUTS 10
#define BATCH 64
#if __CUDA_ARCH__ >= 900
#define MODELS 4        // of a block
#else
#define MODELS 2
#endif
#define WARPS 4         // of a model
#define WIDTH 4         // columns of a tile of the weights' gradient, in eights: up to 4
#define UNROLL 2        // steps of a product's loop at a time
#define OWN_ORDER 0     // 1: each model has its own order of the rows (then MODELS is 1)
#define CLASSES 1       // 1: cross entropy of integer labels, 0: mean squared error
#define OPTIMIZER 1     // 0: gradient descent, 1: with momentum, 2: Adam
#define SHARED_BYTES 0  // 0: not checked
#endif

#include "mlp_step.cuh"

__device__ constexpr int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Length of a line of n numbers in shared memory: an odd number of eights. So a warp's reads hit
// all banks, both of 8 lines and 4 pairs of columns, and of 4 lines and 8 columns.
__device__ constexpr int line(int n) { return round_up(n, 8) + (round_up(n, 8) % 16 ? 0 : 8); }

constexpr int MODEL_THREADS = 32 * WARPS, THREADS = MODEL_THREADS * MODELS;
constexpr int EIGHTS = (HIDDEN + 7) / 8, CHUNKS = (EIGHTS + 3) / 4;
constexpr int CHUNK = (EIGHTS + CHUNKS - 1) / CHUNKS;  // of hidden units, in eights: up to 4
constexpr int UNITS = 8 * CHUNK * CHUNKS, DEPTH = round_up(FEATURES, 8);
constexpr int ROWS = round_up(BATCH, 16), SUMS = round_up(OUTPUTS, 8);
constexpr int BY_FEATURE = line(FEATURES), BY_UNIT = line(UNITS);
constexpr int BY_OUTPUT = round_up(OUTPUTS + 1, 4);
// Where a model's parameters are. Those that are not real are zero; the optimizer's vectors lack
// the last of them.
constexpr int INPUT_BIAS = UNITS * BY_FEATURE, OUTPUT_BIAS = INPUT_BIAS + UNITS;
constexpr int OUTPUT_WEIGHT = OUTPUT_BIAS + SUMS, ALL = OUTPUT_WEIGHT + SUMS * BY_UNIT;
constexpr int STATE = OUTPUT_WEIGHT + OUTPUTS * BY_UNIT;
// A tile may read this far behind a matrix. What comes of it is dropped.
constexpr int BEHIND = 32;
static_assert(!OWN_ORDER || MODELS == 1, "the models of a block share its rows");
static_assert(MODELS < 16 && THREADS <= 1024 && WIDTH <= 4, "barriers, threads and pads");

struct Model {
    float parameters[ALL];  // input weights unit by unit, biases, output weights output by output
    float state[OPTIMIZER ? OPTIMIZER * STATE : 2];
    float hidden[ROWS * BY_UNIT + BEHIND], d_hidden[ROWS * BY_UNIT + BEHIND];
    float d_predictions[ROWS * BY_OUTPUT + BEHIND];  // and in column OUTPUTS each row's loss
};

struct Shared {
    float x[2][ROWS * BY_FEATURE + BEHIND];  // this batch and the next
    Model model[MODELS];
    long long label[2][CLASSES ? ROWS : 1];
    float target[2][CLASSES ? 2 : ROWS * OUTPUTS];
    int row[2][ROWS];  // which rows of the data make a batch
};
static_assert(!SHARED_BYTES || sizeof(Shared) == SHARED_BYTES, "the host reckons differently");

// The warps of a model meet.
__device__ void meet(int model)
{
    if (WARPS == 1) __syncwarp();
    else asm volatile("bar.sync %0, %1;" ::"r"(model + 1), "n"(MODEL_THREADS) : "memory");
}

// One warp's part of a product: 16 rows, 8 COLUMNS columns. Each float32 is split in two, and three
// of the four products are summed, the small two apart from the large one: see Tile.
template <int COLUMNS>
struct Sums {
    float large[COLUMNS][4] = {}, small[COLUMNS][4] = {};

    // Eight more terms for eight columns. Of a, this lane holds rows lane / 4 and that + 8 of one
    // term, then of another; of b, column lane / 4 of the same two terms.
    __device__ void add(int column, const Split (&a)[4], const Split (&b)[2])
    {
        tensor_product(small[column], a[0].low, a[1].low, a[2].low, a[3].low, b[0].high, b[1].high);
        tensor_product(large[column], a[0].high, a[1].high, a[2].high, a[3].high, b[0].high,
                       b[1].high);
        tensor_product(small[column], a[0].high, a[1].high, a[2].high, a[3].high, b[0].low,
                       b[1].low);
    }
    // Element i of this lane: row lane / 4 + i / 2 * 8, column lane % 4 * 2 + i % 2 of the eight.
    __device__ float operator()(int column, int i) const
    {
        return large[column][i] + small[column][i];
    }
};

__device__ float2& pair(float* at) { return *(float2*)at; }
__device__ float2 pair(const float* at) { return *(const float2*)at; }

// The sum over the four lanes that share a row of a product.
__device__ float over_row(float x)
{
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

extern "C" __global__ __launch_bounds__(THREADS, 1)
void mlp_population(const float* X, const void* targets, const int* order, float* parameters,
                    float* first, float* second, const float* learning_rates, float* numbers,
                    float* losses, float* kept, int n_rows, int n_epochs, int n_models)
{
    // parameters: for each model W1 (FEATURES x HIDDEN), b1, W2 (HIDDEN x OUTPUTS), b2; first,
    // second: alike. numbers: for each model momentum, beta1, beta2, epsilon, weight decay, and
    // Adam's two powers. order: for each epoch n_rows row numbers; with OWN_ORDER for each model.
    // learning_rates: for each epoch one for each model. losses: for each step one for each model.
    // kept: parameters as they are after each epoch, for each epoch and model; or null.
    extern __shared__ __align__(16) unsigned char memory[];
    Shared& s = *(Shared*)memory;
    const int t = threadIdx.x, own = t / MODEL_THREADS, warp = t % MODEL_THREADS / 32;
    const int group = t % 32 / 4, member = t % 4;
    // What is left over of the last block trains the last model once more, and keeps it to itself.
    const int wanted = blockIdx.x * MODELS + own, model = min(wanted, n_models - 1);
    const bool told = wanted < n_models;
    Model& m = s.model[own];
    constexpr int COUNT = (FEATURES + 1) * HIDDEN + (HIDDEN + 1) * OUTPUTS;
    // Visits the numbers of a vector: here of the parameters' shape, there in the vector's order.
    auto for_each_number = [&](float* here, float* w1, auto visit) {
        const int me = t % MODEL_THREADS;
        float *b1 = w1 + FEATURES * HIDDEN, *w2 = b1 + HIDDEN, *b2 = w2 + HIDDEN * OUTPUTS;
#pragma unroll 2
        for (int i = me; i < FEATURES * HIDDEN; i += MODEL_THREADS)
            visit(here[i % HIDDEN * BY_FEATURE + i / HIDDEN], w1[i]);
#pragma unroll 1
        for (int i = me; i < HIDDEN; i += MODEL_THREADS) visit(here[INPUT_BIAS + i], b1[i]);
#pragma unroll 1
        for (int i = me; i < HIDDEN * OUTPUTS; i += MODEL_THREADS)
            visit(here[OUTPUT_WEIGHT + i % OUTPUTS * BY_UNIT + i / OUTPUTS], w2[i]);
        if (me < OUTPUTS) visit(here[OUTPUT_BIAS + me], b2[me]);
    };
    auto for_each_vector = [&](auto visit) {
#pragma unroll 1
        for (int v = 0; v <= OPTIMIZER; ++v) {
            float* there = v == 0 ? parameters : v == 1 ? first : second;
            float* here = v == 0 ? m.parameters : m.state + (v - 1) * STATE;
            for_each_number(here, there + (long long)model * COUNT, visit);
        }
    };
    auto give_back = [](float here, float& there) { there = here; };

#pragma unroll 1
    for (int i = t; i < sizeof(Shared) / 8; i += THREADS) ((long long*)memory)[i] = 0;
    __syncthreads();
    for_each_vector([](float& here, float there) { here = there; });
    float* number = numbers + 7LL * model;
    Rates rates = {0, number[0], number[1], number[2], number[3], number[4], number[5], number[6]};
    // Two neighbouring parameters at a time: reads and writes of pairs hit all banks.
    auto follow = [&](int i, float2 gradient, bool decays) {
        float *p = m.parameters + i, *state = m.state + i, *both = state + STATE;
        float2 now = pair(p), u = {}, v = {};
        if (OPTIMIZER > 0) u = pair(state);
        if (OPTIMIZER > 1) v = pair(both);
        update<OPTIMIZER>(now.x, gradient.x, u.x, v.x, decays, rates);
        update<OPTIMIZER>(now.y, gradient.y, u.y, v.y, decays, rates);
        pair(p) = now;
        if (OPTIMIZER > 0) pair(state) = u;
        if (OPTIMIZER > 1) pair(both) = v;
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
    if (OWN_ORDER) order += (long long)model * n_epochs * n_rows;
    auto fetch_order = [&](Place p) {
        const int h = height(p);
#pragma unroll 1
        for (int i = t; i < h; i += THREADS)
            copy_behind<4>(s.row[p.number % 2] + i,
                           order + (long long)p.epoch * n_rows + p.begin + i);
    };
    auto fetch_rows = [&](Place p) {
        const int h = height(p), *row = s.row[p.number % 2];
        constexpr int EACH = FEATURES % 4 == 0 ? 4 : 1, LOADS = FEATURES / EACH;
#pragma unroll 1
        for (int i = t; i < h * LOADS; i += THREADS) {
            int r = i / LOADS, f = i % LOADS * EACH;
            copy_behind<4 * EACH>(s.x[p.number % 2] + r * BY_FEATURE + f,
                                  X + (long long)row[r] * FEATURES + f);
        }
#pragma unroll 1
        for (int i = t; CLASSES && i < h; i += THREADS)
            copy_behind<8>(s.label[p.number % 2] + i, (const long long*)targets + row[i]);
#pragma unroll 1
        for (int i = t; !CLASSES && i < h * OUTPUTS; i += THREADS)
            copy_behind<4>(s.target[p.number % 2] + i, (const float*)targets +
                           (long long)row[i / OUTPUTS] * OUTPUTS + i % OUTPUTS);
    };
    // Parameters change only when a model's warps have met, and by then all have passed here.
    auto keep = [&](int epoch) {
        float* there = kept + ((long long)epoch * n_models + model) * COUNT;
        for_each_number(m.parameters, there, give_back);
    };
    Place step, next = after(step);
    fetch_order(step);
    end_of_group();
    wait_for_all_but<0>();
    __syncthreads();
    fetch_order(next);
    fetch_rows(step);
    end_of_group();

#pragma unroll 1
    for (; step.epoch < n_epochs; step = next, next = after(next)) {
        const int now = step.number % 2, h = height(step);
        const float *x = s.x[now], *w1 = m.parameters, *w2 = w1 + OUTPUT_WEIGHT;
        const float of_a_row = 1.f / (CLASSES ? h : h * OUTPUTS);  // its share of the loss
        rates.learning_rate = learning_rates[(long long)step.epoch * n_models + model];
        next_step<OPTIMIZER>(rates);
        wait_for_all_but<0>();
        __syncthreads();
        fetch_rows(next);
        fetch_order(after(next));
        end_of_group();
        if (kept && told && step.begin == 0 && step.epoch > 0) keep(step.epoch - 1);

#pragma unroll 1
        for (int row = 16 * warp; row < ROWS; row += 16 * WARPS) {
            // hidden = relu(x W1 + b1), and what it adds to the predictions, some units at a time.
            // This lane's columns are where, and where + 1, of each eight; its rows r, and r + 8.
            const int r = row + group, where = 2 * member;
            Sums<SUMS / 8> predictions;
#pragma unroll 1
            for (int unit = 0; unit < UNITS; unit += 8 * CHUNK) {
                const float *a = x + r * BY_FEATURE + where;
                const float *b = w1 + (unit + group) * BY_FEATURE + where;
                Sums<CHUNK> sums;
#pragma unroll UNROLL
                for (int k = 0; k < DEPTH; k += 8) {
                    const float2 up = pair(a + k), down = pair(a + 8 * BY_FEATURE + k);
                    Split p[4], q[2];
                    p[0] = up.x, p[1] = down.x, p[2] = up.y, p[3] = down.y;
#pragma unroll
                    for (int j = 0; j < CHUNK; ++j) {
                        const float2 w = pair(b + 8 * j * BY_FEATURE + k);
                        q[0] = w.x, q[1] = w.y;
                        sums.add(j, p, q);
                    }
                }
#pragma unroll
                for (int j = 0; j < CHUNK; ++j) {
                    const int u = unit + 8 * j + where;
                    const float2 bias = pair(w1 + INPUT_BIAS + u);
                    const float up[2] = {relu(sums(j, 0) + bias.x), relu(sums(j, 1) + bias.y)};
                    const float down[2] = {relu(sums(j, 2) + bias.x), relu(sums(j, 3) + bias.y)};
                    pair(m.hidden + r * BY_UNIT + u) = make_float2(up[0], up[1]);
                    pair(m.hidden + (r + 8) * BY_UNIT + u) = make_float2(down[0], down[1]);
                    Split p[4], q[2];
                    p[0] = up[0], p[1] = down[0], p[2] = up[1], p[3] = down[1];
#pragma unroll
                    for (int k = 0; k < SUMS / 8; ++k) {
                        const float2 w = pair(w2 + (8 * k + group) * BY_UNIT + u);
                        q[0] = w.x, q[1] = w.y;
                        predictions.add(k, p, q);
                    }
                }
            }

            // loss and its gradient: four lanes share a row
            float d[SUMS / 8][4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int sample = r + 8 * half;
                const bool real = sample < h;
                const float scale = real ? of_a_row : 0;
                const int label = CLASSES ? (int)s.label[now][sample] : 0;
                float largest = LOWEST, total = 0, loss = 0;
#pragma unroll
                for (int i = 0; i < SUMS / 4; ++i) {
                    const int k = i / 2 * 8 + where + i % 2, j = 2 * half + i % 2;
                    d[i / 2][j] = LOWEST;
                    if (k < OUTPUTS) d[i / 2][j] = predictions(i / 2, j) + w1[OUTPUT_BIAS + k];
                    largest = fmaxf(largest, d[i / 2][j]);
                }
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
#pragma unroll
                for (int i = 0; i < SUMS / 4; ++i) {
                    const int k = i / 2 * 8 + where + i % 2;
                    float& z = d[i / 2][2 * half + i % 2];
                    if (k >= OUTPUTS) {
                        z = 0;
                    } else if (CLASSES) {
                        z -= largest;
                        if (k == label) loss = -z;
                        z = expf(z);
                        total += z;
                    } else {
                        z -= s.target[now][sample * OUTPUTS + k];
                        loss += z * z;
                    }
                }
                total = over_row(total);
                loss = over_row(loss);
                if (CLASSES) loss += logf(total);
                const float share = CLASSES ? scale / total : 2 * scale;
                float* to = m.d_predictions + sample * BY_OUTPUT;
#pragma unroll
                for (int i = 0; i < SUMS / 4; ++i) {
                    const int k = i / 2 * 8 + where + i % 2;
                    float& z = d[i / 2][2 * half + i % 2];
                    if (k >= OUTPUTS) continue;
                    z = real ? z * share - (CLASSES && k == label ? scale : 0) : 0;
                    to[k] = z;
                }
                if (member == 0) to[OUTPUTS] = real ? loss * scale : 0;
            }

            // the gradient carried back to the hidden units
#pragma unroll 1
            for (int unit = 0; unit < UNITS; unit += 8 * CHUNK) {
                Sums<CHUNK> sums;
#pragma unroll
                for (int k = 0; k < SUMS / 8; ++k) {
                    const float* b = w2 + (8 * k + where) * BY_UNIT + unit + group;
                    Split p[4], q[2];
                    p[0] = d[k][0], p[1] = d[k][2], p[2] = d[k][1], p[3] = d[k][3];
#pragma unroll
                    for (int j = 0; j < CHUNK; ++j) {
                        q[0] = b[8 * j], q[1] = b[8 * j + BY_UNIT];
                        sums.add(j, p, q);
                    }
                }
#pragma unroll
                for (int i = 0; i < 2 * CHUNK; ++i) {
                    const int j = i / 2, half = i % 2;
                    const int place = (r + 8 * half) * BY_UNIT + unit + 8 * j + where;
                    const float2 out = pair(m.hidden + place);  // this lane's own
                    pair(m.d_hidden + place) = make_float2(out.x > 0 ? sums(j, 2 * half) : 0,
                                                           out.y > 0 ? sums(j, 2 * half + 1) : 0);
                }
            }
        }
        meet(own);

        // All parameters follow their gradients. A tile is 16 units by some features, or 16
        // outputs by some units; the first of a line has the biases, and behind the outputs' the
        // loss.
        constexpr int COLUMNS = 8 * WIDTH;
        constexpr int ACROSS = (FEATURES + COLUMNS - 1) / COLUMNS;
        constexpr int INPUT_TILES = (HIDDEN + 15) / 16 * ACROSS;
        constexpr int ABOVE = (HIDDEN + COLUMNS - 1) / COLUMNS;
        constexpr int TILES = INPUT_TILES + OUTPUTS / 16 * ABOVE + ABOVE;
        // Models begin with different warps, since the first may have a tile more than the last.
#pragma unroll 1
        for (int i = (warp + own) % WARPS; i < TILES; i += WARPS) {
            const bool input = i < INPUT_TILES;
            const int tile = input ? i : i - INPUT_TILES, across = input ? ACROSS : ABOVE;
            const int top = tile / across * 16, left = tile % across * COLUMNS;
            const int by_a = input ? BY_UNIT : BY_OUTPUT, by_b = input ? BY_FEATURE : BY_UNIT;
            const float* a = (input ? m.d_hidden : m.d_predictions) + top + group + member * by_a;
            const float* b = (input ? x : m.hidden) + left + group + member * by_b;
            Sums<WIDTH> sums;
            float bias[2] = {};
#pragma unroll UNROLL
            for (int k = 0; k < ROWS; k += 8) {
                const float* below = a + 4 * by_a;
                const float up[2] = {a[0], below[0]}, down[2] = {a[8], below[8]};
                bias[0] += up[0] + up[1];
                bias[1] += down[0] + down[1];
                Split p[4], q[2];
                p[0] = up[0], p[1] = down[0], p[2] = up[1], p[3] = down[1];
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) {
                    q[0] = b[8 * j], q[1] = b[8 * j + 4 * by_b];
                    sums.add(j, p, q);
                }
                a += 8 * by_a;
                b += 8 * by_b;
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int r = top + group + 8 * half;
                bias[half] = over_row(bias[half]);
                const float other = __shfl_down_sync(0xffffffff, bias[half], 4);  // of row r + 1
                if (!input && left == 0 && r == OUTPUTS && member == 0 && told)
                    losses[(long long)step.number * n_models + model] = bias[half];
                if (r >= (input ? HIDDEN : OUTPUTS)) continue;
                if (left == 0 && member == 0 && r % 2 == 0)
                    follow((input ? INPUT_BIAS : OUTPUT_BIAS) + r,
                           {bias[half], r + 1 < (input ? HIDDEN : OUTPUTS) ? other : 0}, false);
                // Where a pair is cut, what is not real has no gradient.
                const int place = input ? r * BY_FEATURE : OUTPUT_WEIGHT + r * BY_UNIT;
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) {
                    const int column = left + 8 * j + 2 * member;
                    if (column >= (input ? FEATURES : HIDDEN)) continue;
                    follow(place + column, {sums(j, 2 * half), sums(j, 2 * half + 1)}, true);
                }
            }
        }
    }

    __syncthreads();
    if (!told) return;
    if (kept) keep(n_epochs - 1);
    for_each_vector(give_back);
    if (OPTIMIZER == ADAM && t % MODEL_THREADS == 0) {
        number[5] = rates.power1;
        number[6] = rates.power2;
    }
}
