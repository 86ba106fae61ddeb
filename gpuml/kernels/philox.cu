// Random numbers by counting: Philox4x64 with ten rounds, the stream of numpy.random.Philox.
//
// state: two words of a key, and the number of the draw; nothing here changes it. Each thread
// takes a counter (i + 1, draw, 0, 0), and its four words are the numbers 4 i to 4 i + 3. Salmon,
// Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3. SC 2011.
//
// Launch: philox or philox_normal, with any number of blocks and threads.

#ifndef NUMBER
#define NUMBER float
#endif

using Number = NUMBER;
using Word = unsigned long long;

__device__ void random_words(Word first, const Word* state, Word words[4])
{
    Word a = first, b = state[2], c = 0, d = 0, key = state[0], key2 = state[1];
    for (int round = 0; round < 10; ++round) {
        const Word high = __umul64hi(0xD2E7470EE14C6C93ull, a), low = 0xD2E7470EE14C6C93ull * a;
        const Word high2 = __umul64hi(0xCA5A826395121157ull, c), low2 = 0xCA5A826395121157ull * c;
        a = high2 ^ b ^ key, b = low2, c = high ^ d ^ key2, d = low;
        key += 0x9E3779B97F4A7C15ull, key2 += 0xBB67AE8584CAA73Bull;
    }
    words[0] = a, words[1] = b, words[2] = c, words[3] = d;
}

// From 0 to less than 1, in steps of 2^-24 or 2^-53, so exactly.
__device__ void unit(Word word, float& number) { number = (word >> 40) * 0x1p-24f; }
__device__ void unit(Word word, double& number) { number = (word >> 11) * 0x1p-53; }

// out: n numbers from -1 to less than 1.
extern "C" __global__
void philox(const Word* state, Number* out, long long n)
{
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; 4 * i < n;
         i += (long long)gridDim.x * blockDim.x) {
        Word words[4];
        random_words(i + 1, state, words);
        for (int j = 0; j < 4 && 4 * i + j < n; ++j) {
            Number number;
            unit(words[j], number);
            out[4 * i + j] = 2 * number - 1;
        }
    }
}

// out: n numbers, multiplied by `keep` (not read if that is 0), plus normal ones times `scale`.
// Box, Muller: A Note on the Generation of Random Normal Deviates. 1958.
extern "C" __global__
void philox_normal(const Word* state, Number* out, long long n, Number keep, Number scale)
{
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; 4 * i < n;
         i += (long long)gridDim.x * blockDim.x) {
        Word words[4];
        random_words(i + 1, state, words);
        for (int j = 0; j < 4 && 4 * i + j < n; ++j) {
            // Of 53 bits, so that the tail is long: 8.5 standard deviations.
            const Number share = ((Number)(words[j / 2 * 2] >> 11) + 1) * (Number)0x1p-53;
            Number turn;
            unit(words[j / 2 * 2 + 1], turn);
            const Number radius = sqrt(-2 * log(share)), angle = 2 * turn;
            const Number normal = radius * (j % 2 ? sinpi(angle) : cospi(angle));
            Number& number = out[4 * i + j];
            number = (keep == 0 ? 0 : keep * number) + scale * normal;
        }
    }
}
