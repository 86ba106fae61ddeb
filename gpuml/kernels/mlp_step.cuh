// What the kernels that train perceptrons share: the optimizers' rules, copies in the background,
// and products of small tiles on tensor cores.

constexpr float LOWEST = -3.402823466e38f;

// Unlike fmaxf it lets NaN pass, so that the loss shows it.
__device__ float relu(float x) { return x < 0 ? 0 : x; }

enum { GRADIENT_DESCENT, MOMENTUM, ADAM };

// What an optimizer needs beside the parameters and their gradient.
struct Rates {
    float learning_rate, momentum, beta1, beta2, epsilon, weight_decay;
    float power1, power2;  // of Adam: beta1 and beta2 to the number of steps so far
};

template <int RULE>
__device__ void next_step(Rates& rates)
{
    if (RULE != ADAM) return;
    rates.power1 *= rates.beta1;
    rates.power2 *= rates.beta2;
}

// One parameter's step. `first` and `second` are its velocity, or its two running averages.
template <int RULE>
__device__ void update(float& parameter, float gradient, float& first, float& second,
                       bool decays, const Rates& rates)
{
    float decay = decays ? rates.weight_decay : 0;
    if (RULE == ADAM) {
        parameter -= rates.learning_rate * decay * parameter;
        first = first * rates.beta1 + gradient * (1 - rates.beta1);
        second = second * rates.beta2 + gradient * gradient * (1 - rates.beta2);
        float root = sqrtf(second) / sqrtf(1 - rates.power2) + rates.epsilon;
        parameter -= first / root * (rates.learning_rate / (1 - rates.power1));
        return;
    }
    gradient += decay * parameter;
    if (RULE == MOMENTUM) gradient = first = rates.momentum * first + gradient;
    parameter -= rates.learning_rate * gradient;
}

// Copies from global to shared memory that go on while the thread does other work. Of `real` bytes;
// what is left of BYTES becomes zero.
template <int BYTES>
__device__ void copy_behind(void* to, const void* from, int real = BYTES)
{
    unsigned there = (unsigned)__cvta_generic_to_shared(to);
    if (BYTES == 16)  // by way of the L2 cache only: another block may have written it just now
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(there), "l"(from),
                     "r"(real) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(there), "l"(from),
                     "n"(BYTES), "r"(real) : "memory");
}

__device__ void end_of_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int GROUPS>
__device__ void wait_for_all_but()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// A float32 as the sum of two numbers of tf32: that nearest to it, and the rest. Tensor cores
// ignore the bits that tf32 lacks. (The instruction that converts is many times slower than this.)
struct Split {
    unsigned high, low;
    __device__ void operator=(float x)
    {
        high = (__float_as_uint(x) + 0x1000) & 0xffffe000;
        low = __float_as_uint(x - __uint_as_float(high));
    }
};

__device__ void tensor_product(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                               unsigned b0, unsigned b1)
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
                 "{%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A matrix in shared memory: element (i, j) is at data[i * down + j * across].
struct View {
    const float* data;
    int down, across;
    __device__ float operator()(int i, int j) const { return data[i * down + j * across]; }
};

// One warp's part of a b: 16 rows, 8 HALVES columns, `terms` terms (a multiple of 8) of each sum.
//
// Each float32 is split into two numbers of tf32, and three of the four products are summed, apart
// from each other: the error is about that of float32 (Markidis et al., IPDPS Workshops 2018).
template <int HALVES>
struct Tile {
    float part[3][HALVES][4];  // high high, low high, high low

    __device__ void clear()
    {
#pragma unroll
        for (int i = 0; i < 12 * HALVES; ++i) part[i / 4 / HALVES][i / 4 % HALVES][i % 4] = 0;
    }

    __device__ void add(View a, View b, int terms)
    {
        const int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
#pragma unroll 2
        for (int k = member; k < terms; k += 8) {
            Split x[4], y[2];
            x[0] = a(group, k);
            x[1] = a(group + 8, k);
            x[2] = a(group, k + 4);
            x[3] = a(group + 8, k + 4);
#pragma unroll
            for (int half = 0; half < HALVES; ++half) {
                y[0] = b(k, group + 8 * half);
                y[1] = b(k + 4, group + 8 * half);
                tensor_product(part[1][half], x[0].low, x[1].low, x[2].low, x[3].low, y[0].high,
                               y[1].high);
                tensor_product(part[2][half], x[0].high, x[1].high, x[2].high, x[3].high, y[0].low,
                               y[1].low);
                tensor_product(part[0][half], x[0].high, x[1].high, x[2].high, x[3].high, y[0].high,
                               y[1].high);
            }
        }
    }

    // Element i of this lane: its value, its row and its column.
    __device__ float value(int i) const
    {
        return part[0][i / 4][i % 4] + (part[1][i / 4][i % 4] + part[2][i / 4][i % 4]);
    }
    __device__ static int row(int i) { return threadIdx.x % 32 / 4 + i % 4 / 2 * 8; }
    __device__ static int column(int i) { return i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }
};
