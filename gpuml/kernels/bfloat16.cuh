// bfloat16 as the upper half of a float32.

__device__ float from_bfloat16(unsigned short x) { return __uint_as_float((unsigned)x << 16); }
__device__ unsigned short to_bfloat16(float x)
{
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // not a number
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;      // to nearest, ties to even
}
