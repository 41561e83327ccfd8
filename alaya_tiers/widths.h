/* Includes the file SELF once per instruction set, for vectors of VL = 16, 8 and 4 floats. VNNI: its widest code multiplies bytes. */
#ifdef X86
#ifdef __clang__
#ifdef VNNI
#pragma clang attribute push(__attribute__((target("avx512bw,avx512dq,avx512vl,avx512vnni,fma,f16c"))), apply_to = function)
#else
#pragma clang attribute push(__attribute__((target("avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#endif
#else
#pragma GCC push_options
#ifdef VNNI
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#endif
#define VL 16
#include SELF
#undef VL
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define VL 8
#include SELF
#undef VL
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#define VL 4
#include SELF
#undef VL
