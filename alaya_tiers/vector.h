/* Vectors of VL floats, for files that include themselves once per instruction set. Names are undone by vector_end.h. */
#define NAME2(name, vl) name##_##vl
#define NAME1(name, vl) NAME2(name, vl)
#define NAME(name) NAME1(name, VL)
#define UNROLL _Pragma("GCC unroll 4")
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, (i4){i, j, k, l})
#endif
#ifndef VECTOR_TYPES
#define VECTOR_TYPES
typedef float f4 __attribute__((vector_size(16)));
typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i4 __attribute__((vector_size(16)));

/* A soft-capped score; no cap: 0. */
static inline float cap(float x, float c) { return c > 0 ? c * tanhf(x / c) : x; }
#endif

typedef float NAME(vf) __attribute__((vector_size(4 * VL)));
typedef int32_t NAME(vi) __attribute__((vector_size(4 * VL)));
typedef uint32_t NAME(vu) __attribute__((vector_size(4 * VL)));
typedef uint16_t NAME(vh) __attribute__((vector_size(2 * VL)));
#define vf NAME(vf)
#define vi NAME(vi)
#define vu NAME(vu)
#define vh NAME(vh)

INLINE vf NAME(pick)(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
#define pick NAME(pick)

/* The larger of each pair; of a NaN and y, y. */
INLINE vf NAME(larger)(vf x, vf y)
{
#if VL == 16
    return (vf)_mm512_max_ps((__m512)x, (__m512)y);
#elif VL == 8
    return (vf)_mm256_max_ps((__m256)x, (__m256)y);
#else
    return pick(x > y, x, y);
#endif
}
#define larger NAME(larger)

INLINE vf NAME(loadf)(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }
INLINE void NAME(storef)(float *p, vf x) { memcpy(p, &x, sizeof x); }
#define loadf NAME(loadf)
#define storef NAME(storef)

INLINE f4 NAME(fold)(vf x)
{
    f4 half[2];
#if VL == 16
    f8 eight[2];
    memcpy(eight, &x, sizeof x);
    eight[0] += eight[1];
    memcpy(half, eight, sizeof half);
#elif VL == 8
    memcpy(half, &x, sizeof half);
#else
    half[0] = x, half[1] = (f4){0};
#endif
    return half[0] + half[1];
}
#define fold NAME(fold)

INLINE float NAME(total)(vf x)
{
    f4 part = fold(x);
    return (part[0] + part[1]) + (part[2] + part[3]);
}

INLINE float NAME(largest)(vf x)
{
    f4 part[VL / 4];
    memcpy(part, &x, sizeof x);
    for (int i = 1; i < VL / 4; i++) {
        i4 more = part[i] > part[0];
        part[0] = (f4)((more & (i4)part[i]) | (~more & (i4)part[0]));
    }
    float a = part[0][0] > part[0][1] ? part[0][0] : part[0][1], b = part[0][2] > part[0][3] ? part[0][2] : part[0][3];
    return a > b ? a : b;
}

/* exp to about 1e-7 relative; 0 below -87. NaN stays NaN. */
INLINE vf NAME(vexp)(vf x)
{
    vi tiny = x < -87.0f;
    vf big = x * 1.44269504f + 12582912.0f, n = big - 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = ((((1.3981999507e-3f * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r + 1.6666665459e-1f) * r + 0.5f);
    p = p * r * r + r + 1.0f;
    p *= (vf)(((vu)big << 23) + 0x3f800000u); /* 2^n: n is in the low bits of big */
    return (vf)(~tiny & (vi)p);
}
#define vexp NAME(vexp)

/* Whether a comparison held anywhere. */
INLINE int NAME(any)(vi mask)
{
#if VL == 16
    return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif VL == 8
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}
#define any NAME(any)

/* A bit for each lane where x >= y. */
INLINE uint32_t NAME(at_least)(vf x, vf y)
{
#if VL == 16
    return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_GE_OQ);
#elif VL == 8
    return (uint32_t)_mm256_movemask_ps((__m256)(x >= y));
#else
    const vi mask = x >= y;
    uint32_t found = 0;
    for (int i = 0; i < VL; i++) found |= (uint32_t)(mask[i] & 1) << i;
    return found;
#endif
}
