/* How near the keys of runs of 64 tokens may come to queries, by summaries of them. index/summary.py says what a summary is and why
 * the bounds hold.
 *
 * A block's summary lies in memory as floats head[2] (units of spread and mean value), floats unit[parts] and radius[parts], then
 * bytes: the spread of each channel (a standard deviation) [dims], the mean key of each part [parts][dims], the mean value. dims is
 * a multiple of 64.
 *
 * Like attend.c this file includes itself once per instruction set.
 */
#ifndef VL
#define _GNU_SOURCE
#include <math.h>
#include <stdint.h>
#include <string.h>
#include "pool.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define X86 1
#endif

enum { HEAD = 2, GROUP = 4, TOGETHER = 64 }; /* floats in front; rows at a time; blocks that a thread takes at a time */
enum { MAX_ROWS = 128, MOST_BEST = 16, AHEAD = 2, VALUES_AHEAD = 8 }; /* AHEAD: blocks, to be on their way */

static const float FAINT = -20; /* logarithm of a weight, over one that does not matter much itself: a million of them are 0.2 % of it */

typedef struct near {
    const float *q, *squares;    /* [heads][rows][dims]: queries, and their squares */
    const int64_t *blocks;       /* [heads][n] */
    int64_t heads, rows, n, parts, dims;
    const float *length;         /* [heads][rows]: of queries */
    float scale, softcap, sure;  /* sure: standard deviations that are allowed for; below 0: any there can be */
    float *most, *mean;          /* [heads][n][parts][rows]: see alaya_near */
    void (*block)(const struct near *, int64_t, int64_t);
} near;

typedef struct left {
    const float *mean, *many;    /* [heads][n][parts][rows]; [n][parts]: see alaya_left */
    const float *usual;          /* [heads][rows]: what weights are relative to */
    const int64_t *blocks;       /* [heads][n] */
    int64_t rows, n, parts, v_dim, value_at;
    float *out, *lse;            /* [heads][rows][v_dim]; [heads][rows] */
} left;

#define SELF "summary.c"
#include "widths.h"

static void some_blocks(void *data, int64_t item, int64_t worker)
{
    const near *f = data;
    const int64_t groups = (f->n + TOGETHER - 1) / TOGETHER, head = item / groups, from = item % groups * TOGETHER;
    (void)worker;
    for (int64_t b = from; b < from + TOGETHER && b < f->n; b++) f->block(f, head, b);
}

/* Of each part: what none of its keys scores above, scaled and capped; the logarithm of a key's mean weight, as if scores were
 * normal. */
void alaya_near(int64_t threads, const float *q, const float *squares, const float *length, const int64_t *blocks,
                int64_t heads, int64_t rows, int64_t n, int64_t parts, int64_t dims, float scale, float softcap, float sure,
                float *most, float *mean)
{
    near f = {.q = q, .squares = squares, .length = length, .blocks = blocks, .heads = heads, .rows = rows, .n = n,
              .parts = parts, .dims = dims, .scale = scale, .softcap = softcap, .sure = sure, .most = most, .mean = mean,
              .block = block_4};
#ifdef X86
    const int widest = alaya_widest();
    f.block = widest == 16 ? block_16 : widest >= 8 ? block_8 : block_4;
#endif
    if (threads > ALAYA_MAX_THREADS) threads = ALAYA_MAX_THREADS;
    if (heads * n * parts * dims < 1 << 17) threads = 1;
    alaya_run(threads, some_blocks, &f, heads * ((n + TOGETHER - 1) / TOGETHER), 1);
}

/* The parts whose keys have the most weight for some query, in the mean. many: [n][parts], logarithm of how many keys count, -inf: none. Marks them. */
void alaya_best_parts(const float *mean, const float *many, int64_t heads, int64_t rows, int64_t parts, int64_t most,
                      uint8_t *chosen)
{
    int64_t best[MOST_BEST];
    if (most > MOST_BEST) most = MOST_BEST;
    for (int64_t h = 0; h < heads; h++)
        for (int64_t r = 0; r < rows; r++) {
            const float *x = mean + h * parts * rows + r;
            int64_t n = 0;
            for (int64_t p = 0; p < parts; p++) {
                if (many[p] == -INFINITY || (n == most && !(x[p * rows] > x[best[n - 1] * rows]))) continue;
                int64_t place = n < most ? n++ : n - 1;
                for (; place > 0 && x[p * rows] > x[best[place - 1] * rows]; place--) best[place] = best[place - 1];
                best[place] = p;
            }
            for (int64_t i = 0; i < n; i++) chosen[best[i]] = 1;
        }
}

/* Marks the parts that may hold what some query of some head wants. most: as of alaya_near; least: [heads][rows]. */
void alaya_within(const float *most, const float *least, const float *many, int64_t heads, int64_t rows, int64_t parts,
                  uint8_t *chosen)
{
    for (int64_t h = 0; h < heads; h++, least += rows)
        for (int64_t p = 0; p < parts; p++, most += rows) {
            int near = 0;
            for (int64_t r = 0; r < rows; r++) near |= most[r] >= least[r];
            if (near && many[p] != -INFINITY) chosen[p] = 1;
        }
}

/* Attention to the keys of parts, by their mean weight and their block's mean value. usual: [heads][rows], a score that the mean is not
 * far above anywhere; what is far below it does not count. out: [heads][rows][v_dim]; lse: -inf where there is nothing. */
void alaya_left(int64_t threads, const float *mean, const float *many, const float *usual, const int64_t *blocks, int64_t heads, int64_t rows,
                int64_t n, int64_t parts, int64_t v_dim, int64_t value_at, float *out, float *lse)
{
    left f = {mean, many, usual, blocks, rows, n, parts, v_dim, value_at, out, lse};
    void (*one)(void *, int64_t, int64_t) = left_of_head_4;
#ifdef X86
    const int widest = alaya_widest();
    one = widest == 16 ? left_of_head_16 : widest >= 8 ? left_of_head_8 : left_of_head_4;
#endif
    if (heads * n * parts * rows < 1 << 12) threads = 1;
    alaya_run(threads, one, &f, heads, 1);
}

#else /* once per instruction set from here on */
#include "vector.h"

typedef int8_t NAME(vc) __attribute__((vector_size(VL)));

/* out[row] = unit x (whole numbers [dims] . x[row]), or of their squares. */
INLINE void NAME(times)(const int8_t *numbers, float unit, const float *x, int64_t dims, float *out, int R, int squared)
{
    vf sum[GROUP];
    UNROLL for (int r = 0; r < R; r++) sum[r] = (vf){0};
    for (int64_t d = 0; d < dims; d += VL) {
        NAME(vc) some;
        memcpy(&some, numbers + d, sizeof some);
        vf y = __builtin_convertvector(some, vf);
        if (squared) y *= y;
        UNROLL for (int r = 0; r < R; r++) sum[r] += y * loadf(x + r * dims + d);
    }
    UNROLL for (int r = 0; r < R; r++) out[r] = unit * NAME(total)(sum[r]);
}

INLINE void NAME(all_rows)(const near *f, const int8_t *numbers, float unit, const float *x, float *out, int squared)
{
    int64_t r = 0;
    for (; r + GROUP <= f->rows; r += GROUP) NAME(times)(numbers, unit, x + r * f->dims, f->dims, out + r, GROUP, squared);
    for (; r < f->rows; r++) NAME(times)(numbers, unit, x + r * f->dims, f->dims, out + r, 1, squared);
}

static void NAME(block)(const near *f, int64_t head, int64_t b)
{
    const int64_t at = head * f->n + b, from = head * f->rows * f->dims;
    const float *block = (const float *)f->blocks[at], *unit = block + HEAD, *radius = unit + f->parts;
    const int8_t *spread = (const int8_t *)(radius + f->parts), *mean = spread + f->dims;
    float variance[MAX_ROWS], wide[MAX_ROWS];
    if (b + AHEAD < f->n)
        for (int64_t i = 0; i < (int64_t)(sizeof(float) * (size_t)(HEAD + 2 * f->parts)) + f->dims * (1 + f->parts); i += 64)
            __builtin_prefetch((const char *)f->blocks[at + AHEAD] + i);
    NAME(all_rows)(f, spread, block[0] * block[0], f->squares + from, variance, 1);
    for (int64_t r = 0; r < f->rows; r++) wide[r] = f->sure < 0 ? INFINITY : f->sure * sqrtf(variance[r]);
    for (int64_t p = 0; p < f->parts; p++) {
        float score[MAX_ROWS];
        NAME(all_rows)(f, mean + p * f->dims, unit[p], f->q + from, score, 0);
        for (int64_t r = 0; r < f->rows; r++) {
            const float far = f->length[head * f->rows + r] * radius[p], width = wide[r] < far ? wide[r] : far;
            const float most = (score[r] + width + 1e-6f * (far + fabsf(score[r]))) * f->scale;
            const float usual = score[r] * f->scale + variance[r] * f->scale * f->scale / 2;
            f->most[(at * f->parts + p) * f->rows + r] = cap(most, f->softcap);
            f->mean[(at * f->parts + p) * f->rows + r] = cap(usual < most ? usual : most, f->softcap);
        }
    }
}

/* sums[row] += weight[row] x whole numbers [n]; v_dim numbers between sums. */
INLINE void NAME(add)(const int8_t *numbers, const float *weight, float *sums, int64_t n, int R)
{
    int64_t d = 0;
    for (; d + VL <= n; d += VL) {
        NAME(vc) some;
        memcpy(&some, numbers + d, sizeof some);
        const vf y = __builtin_convertvector(some, vf);
        UNROLL for (int r = 0; r < R; r++) storef(sums + r * n + d, loadf(sums + r * n + d) + y * weight[r]);
    }
    for (; d < n; d++)
        for (int r = 0; r < R; r++) sums[r * n + d] += weight[r] * (float)numbers[d];
}

static void NAME(left_of_head)(void *data, int64_t head, int64_t worker)
{
    const left *f = data;
    const int64_t rows = f->rows, wide = f->parts * rows;
    const float *mean = f->mean + head * f->n * wide, *usual = f->usual + head * rows;
    float *out = f->out + head * rows * f->v_dim, *lse = f->lse + head * rows, weight[MAX_ROWS];
    (void)worker;
    for (int64_t r = 0; r < rows; r++) lse[r] = 0;
    memset(out, 0, sizeof(float) * (size_t)(rows * f->v_dim));
    for (int64_t b = 0; b < f->n; b++, mean += wide) {
        int any_weight = 0;
        if (b + VALUES_AHEAD < f->n) {
            const char *later = (const char *)f->blocks[head * f->n + b + VALUES_AHEAD];
            __builtin_prefetch(later);
            for (int64_t i = f->value_at; i < f->value_at + f->v_dim; i += 64) __builtin_prefetch(later + i);
        }
        const char *block = (const char *)f->blocks[head * f->n + b];
        const int8_t *value = (const int8_t *)block + f->value_at;
        const float *many = f->many + b * f->parts;
        int64_t r = 0;
        for (int64_t i = 0; i < rows; i++) weight[i] = 0;
        for (int64_t p = 0; p < f->parts; p++) {
            if (many[p] == -INFINITY) continue;
            int64_t i = 0;
            for (; i + VL <= rows; i += VL)
                storef(weight + i, loadf(weight + i) + vexp(loadf(mean + p * rows + i) + many[p] - loadf(usual + i)));
            any_weight |= i > 0;
            for (; i < rows; i++) {
                const float x = mean[p * rows + i] + many[p] - usual[i];
                if (x > FAINT) weight[i] += expf(x), any_weight = 1;
            }
        }
        if (!any_weight) continue;
        for (int64_t i = 0; i < rows; i++) lse[i] += weight[i], weight[i] *= ((const float *)block)[1];
        for (; r + GROUP <= rows; r += GROUP) NAME(add)(value, weight + r, out + r * f->v_dim, f->v_dim, GROUP);
        for (; r < rows; r++) NAME(add)(value, weight + r, out + r * f->v_dim, f->v_dim, 1);
    }
    for (int64_t r = 0; r < rows; r++) {
        const float sum = lse[r];
        for (int64_t d = 0; d < f->v_dim; d++) out[r * f->v_dim + d] *= sum > 0 ? 1 / sum : 0;
        lse[r] = sum > 0 ? usual[r] + logf(sum) : -INFINITY;
    }
}

#include "vector_end.h"
#endif
