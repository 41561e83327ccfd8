/* Which keys matter: a scan of low-bit codes of keys that finds every one that may be within reach of the best score, and
 * estimates the attention of all others. index/codes.py says what a code is and why the bounds hold.
 *
 * A block of codes lies in memory as floats head[8], the mean key [dims] and the mean value [v_dim] in 8 bits, a level [tokens] in 4
 * bits, and from the next multiple of 64 bytes on the codes. A token's scale is low + step x level; its error is at most ratio x
 * scale + slack long, its code norm x scale. Levels: 64 tokens in 32 bytes, the first 32 in the low halves. Codes: 64 tokens x 4
 * dims together (8 bits), 64 tokens x 8 dims (4 bits, the first four dims in the low halves); they stand for c - 127.5 and c - 7.5.
 * tokens is a multiple of 64, dims of 8.
 *
 * Pieces of a head's blocks are scanned by threads. First comes, for each query, the few blocks whose mean keys score best: what
 * is found there is a bar for all others, which most keys then fail at once. Then the last piece, and the others in waves, each as
 * many as all before, against the best score in those: whatever the number of threads. That is the first call; it names the key
 * with the best score, so that the caller can look what its score is exactly. The second call drops what the best of all pieces,
 * or of what the caller knows, rules out.
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

enum { HEAD = 8, RATIO = 0, SLACK, NORM, LOW, STEP, K_UNIT, V_UNIT };
enum { LANES = 64, GROUP = 4, MAX_ROWS = 128 }; /* tokens coded together; rows at a time */
enum { PIECE_TOKENS = 1 << 13 }; /* tokens a thread scans at a time */
enum { MEANS_AHEAD = 8 }; /* blocks: what lies far apart no processor fetches by itself */
enum { SCOUTED = 512, MOST_SCOUTS = 32 }; /* one of so many blocks is looked into first; at most so many for a query */

typedef struct {
    int32_t token;       /* number of the block x tokens of a block + offset in it */
    float width, norm;   /* of the key's error, and of its code */
} hit;

typedef struct scan {
    const float *q;                 /* [heads][rows][dims], rotated */
    const int64_t *blocks;          /* [heads][n] */
    const int32_t *first, *count;   /* [n]: which tokens of a block are asked for */
    const float *seed;              /* [heads][rows]: a score that is known to be there, scaled and capped; -inf: none */
    int64_t heads, rows, n, dims, v_dim, tokens, bits, budget;
    float scale, softcap, sure;
    const float *reach;             /* [heads] */
    int32_t *found;                 /* [heads][n * tokens] */
    int64_t *n_found;               /* [heads] */
    float *top, *mass, *lse;        /* [heads][rows]; [heads][rows][v_dim]; [heads][rows] */
    int32_t *best;                  /* [heads][rows]: the token with the best score, -1: none */
    int64_t per_piece, pieces;      /* blocks of a piece; pieces of a head */
    int64_t codes_at;               /* of a block, in bytes */
    int64_t parts;                  /* of a query: 2 where bounds must be tight, else 1 */
    int8_t *q8;                     /* [heads][rows][2][dims]: q = unit x (128 high + low), -64 <= low < 64; or unit x high */
    int32_t *q_sum;                 /* [heads][rows]: sum of those integers */
    float *q_unit, *q_norm, *q_error; /* [heads][rows]; error: what the rounding of q costs per unit of a code's norm */
    hit *hits;                      /* [heads][n * tokens] */
    float *scores;                  /* [heads][n * tokens][rows]: of the hits, unscaled */
    int64_t *n_hits;                /* [heads][pieces] */
    float *bar;                     /* [heads][rows]: a score there certainly is, unscaled */
    float *piece_top;               /* [heads][pieces][rows] */
    float *piece_mass;              /* [heads][pieces][rows][v_dim + 2]: sum of weighted values, largest score, weight */
    float *offset;                  /* [heads][n][rows]: the score of a block's mean key, unscaled */
    void (*means)(const struct scan *, int64_t, int64_t);
    void (*scout)(const struct scan *, int64_t);
    void (*piece)(const struct scan *, int64_t, int64_t);
    void (*add)(const struct scan *, const float *, const float *, float *);
    void (*weigh)(const struct scan *, float (*)[LANES], int64_t, float *, float *);
} scan;

/* Pieces of each head, counted from the last one backwards: some threads' work until all are done. */
typedef struct {
    const scan *of;
    int64_t done, next;
} wave;

static const float LOG2_E = 1.44269504f;

/* The smallest unscaled score whose scaled and capped one is at least x. */
static float uncap(float x, float scale, float c)
{
    if (c > 0) x = x <= -c ? -INFINITY : x >= c ? INFINITY : c * atanhf(x / c);
    return x / scale;
}

static float bound(const scan *f, int64_t hr, hit h)
{
    return f->sure * f->q_norm[hr] * h.width + f->q_error[hr] * h.norm;
}

/* Weighted values of the blocks so far were relative to the score ``most`` and become so to ``high``. Returns the factor. */
static float shrink(const scan *f, float *sum, float most, float high)
{
    const float by = most == -INFINITY ? 0 : expf(most - high);
    for (int64_t d = 0; d < f->v_dim; d++) sum[d] *= by;
    sum[f->v_dim + 1] *= by;
    return by;
}

static const float *block_of(const scan *f, int64_t head, int64_t b) { return (const float *)f->blocks[head * f->n + b]; }

/* A block's mean key and what stands before it are on their way. */
static void fetch_mean(const scan *f, const float *block)
{
    for (int64_t at = 0; at < (int64_t)sizeof(float) * HEAD + f->dims; at += 64) __builtin_prefetch((const char *)block + at);
}

static const int8_t *mean_k_of(const float *block) { return (const int8_t *)(block + HEAD); }

static const int8_t *mean_v_of(const scan *f, const float *block) { return mean_k_of(block) + f->dims; }

static const uint8_t *levels_of(const scan *f, const float *block)
{
    return (const uint8_t *)mean_v_of(f, block) + f->v_dim;
}

#define SELF "scan.c"
#define VNNI
#include "widths.h"

static void means_of_piece(void *data, int64_t item, int64_t worker)
{
    const scan *f = data;
    (void)worker;
    f->means(f, item / f->pieces, item % f->pieces);
}

static void scout_head(void *data, int64_t head, int64_t worker)
{
    const scan *f = data;
    (void)worker;
    f->scout(f, head);
}

static void one_of_wave(void *data, int64_t item, int64_t worker)
{
    const wave *w = data;
    const int64_t size = w->next - w->done;
    (void)worker;
    w->of->piece(w->of, item / size, w->of->pieces - 1 - w->done - item % size);
}

/* The best score of a row in a wave is a bar for the next one. */
static void raise_bars(const wave *w)
{
    const scan *f = w->of;
    for (int64_t hr = 0; hr < f->heads * f->rows; hr++)
        for (int64_t i = w->done; i < w->next; i++) {
            const float top = f->piece_top[(hr / f->rows * f->pieces + f->pieces - 1 - i) * f->rows + hr % f->rows];
            const float sure = top == -INFINITY ? top : uncap(top, f->scale, f->softcap);
            if (sure > f->bar[hr]) f->bar[hr] = sure;
        }
}

/* What turned out not to matter goes back into the estimate, block by block: scores in the present one, up to LANES at a time, and
 * the weights of those before. */
typedef struct {
    int64_t block, n;
    float scores[MAX_ROWS][LANES], weight[MAX_ROWS];
} dropped;

static void put_back(const scan *f, int64_t head, dropped *d, float *sums)
{
    if (d->n) f->weigh(f, d->scores, d->n, d->weight, sums), d->n = 0;
    if (d->block >= 0) f->add(f, block_of(f, head, d->block), d->weight, sums);
    memset(d->weight, 0, sizeof(float) * (size_t)f->rows);
}

static void drop(const scan *f, int64_t head, int32_t token, const float *scores, dropped *d, float *sums)
{
    const int64_t block = token / f->tokens;
    if (block != d->block) put_back(f, head, d, sums), d->block = block;
    else if (d->n == LANES) f->weigh(f, d->scores, d->n, d->weight, sums), d->n = 0;
    for (int64_t r = 0; r < f->rows; r++) d->scores[r][d->n] = scores[r];
    d->n++;
}

/* The best score of a row in all pieces, or what is known besides. */
static float top_of(const scan *f, int64_t head, int64_t r)
{
    float top = f->seed[head * f->rows + r];
    for (int64_t p = 0; p < f->pieces; p++) {
        float x = f->piece_top[(head * f->pieces + p) * f->rows + r];
        if (x > top) top = x;
    }
    return top;
}

/* The hits with the best scores of a head, row by row. */
static void best_of_head(void *data, int64_t head, int64_t worker)
{
    const scan *f = data;
    float best[MAX_ROWS];
    int32_t *found = f->best + head * f->rows;
    (void)worker;
    for (int64_t r = 0; r < f->rows; r++) best[r] = -INFINITY, found[r] = -1;
    for (int64_t p = 0; p < f->pieces; p++) {
        int64_t from = (head * f->n + p * f->per_piece) * f->tokens;
        for (int64_t i = from; i < from + f->n_hits[head * f->pieces + p]; i++)
            for (int64_t r = 0; r < f->rows; r++)
                if (f->scores[i * f->rows + r] > best[r]) best[r] = f->scores[i * f->rows + r], found[r] = f->hits[i].token;
    }
}

/* The largest but nth of n numbers, which are left in another order. */
static float largest_but(float *x, int64_t n, int64_t nth)
{
    for (int64_t low = 0, high = n - 1; low < high;) {
        const float pivot = x[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i > j) break;
            const float other = x[i];
            x[i++] = x[j], x[j--] = other;
        }
        if (nth > j && nth < i) break;
        if (nth <= j) high = j;
        else low = i;
    }
    return x[nth];
}

/* All pieces of a head: its best score, the hits it leaves, the estimate of the rest. */
static void finish_head(void *data, int64_t head, int64_t worker)
{
    const scan *f = data;
    int64_t width = f->v_dim + 2, at = head * f->rows, n = 0;
    float *sums = f->piece_mass + head * f->pieces * f->rows * width, limit[MAX_ROWS];
    (void)worker;
    for (int64_t r = 0; r < f->rows; r++) {
        float top = f->top[at + r] = top_of(f, head, r);
        limit[r] = top == -INFINITY ? -INFINITY : uncap(top - f->reach[head], f->scale, f->softcap);
    }
    for (int64_t p = 1; p < f->pieces; p++)
        for (int64_t r = 0; r < f->rows; r++) {
            float *a = sums + r * width, *b = sums + (p * f->rows + r) * width;
            float top = a[f->v_dim] > b[f->v_dim] ? a[f->v_dim] : b[f->v_dim];
            if (top == -INFINITY) continue;
            float x = expf(a[f->v_dim] - top), y = expf(b[f->v_dim] - top);
            for (int64_t d = 0; d < f->v_dim; d++) a[d] = x * a[d] + y * b[d];
            a[f->v_dim + 1] = x * a[f->v_dim + 1] + y * b[f->v_dim + 1];
            a[f->v_dim] = top;
        }
    int64_t base = head * f->n * f->tokens;
    dropped back;
    back.block = -1, back.n = 0;
    for (int64_t p = 0; p < f->pieces; p++) {
        int64_t from = base + p * f->per_piece * f->tokens;
        for (int64_t i = from; i < from + f->n_hits[head * f->pieces + p]; i++) {
            const float *scores = f->scores + i * f->rows;
            int near = 0;
            for (int64_t r = 0; r < f->rows; r++)
                near |= scores[r] + bound(f, at + r, f->hits[i]) >= limit[r];
            if (!near) {
                drop(f, head, f->hits[i].token, scores, &back, sums);
                continue;
            }
            f->found[base + n] = f->hits[i].token;
            if (base + n != i) memmove(f->scores + (base + n) * f->rows, scores, sizeof(float) * (size_t)f->rows);
            n++;
        }
    }
    if (n > f->budget) { /* the best of any row; hits are no longer needed: their memory holds the keys to sort */
        float *keys = (float *)(f->hits + base), least;
        for (int64_t i = 0; i < n; i++) {
            keys[i] = -INFINITY;
            for (int64_t r = 0; r < f->rows; r++) {
                float x = cap(f->scores[(base + i) * f->rows + r] * f->scale, f->softcap) - f->top[at + r];
                if (x > keys[i]) keys[i] = x;
            }
            keys[n + i] = keys[i];
        }
        least = f->budget ? largest_but(keys + n, n, f->budget - 1) : INFINITY;
        int64_t kept = 0;
        for (int64_t i = 0; i < n; i++) {
            if (keys[i] >= least && kept < f->budget) f->found[base + kept++] = f->found[base + i];
            else drop(f, head, f->found[base + i], f->scores + (base + i) * f->rows, &back, sums);
        }
        n = kept;
    }
    put_back(f, head, &back, sums);
    f->n_found[head] = n;
    for (int64_t r = 0; r < f->rows; r++) {
        float *sum = sums + r * width, weight = sum[f->v_dim + 1];
        for (int64_t d = 0; d < f->v_dim; d++) f->mass[(at + r) * f->v_dim + d] = weight > 0 ? sum[d] / weight : 0;
        f->lse[at + r] = weight > 0 ? sum[f->v_dim] + logf(weight) : -INFINITY;
    }
}

/* Queries as integers of 15 bits in two parts, or of 8 in one; their norms, and what the rounding can cost. */
static void round_queries(scan *f)
{
    const int largest = f->parts == 1 ? 127 : 16191; /* 126 x 128 + 63 */
    for (int64_t hr = 0; hr < f->heads * f->rows; hr++) {
        const float *q = f->q + hr * f->dims;
        float most = 0, norm = 0, lost = 0;
        for (int64_t d = 0; d < f->dims; d++) most = fabsf(q[d]) > most ? fabsf(q[d]) : most;
        const float whole = most > 0 ? most : 1; /* squares are of shares of it: others would vanish for small queries */
        float unit = most > 1e-33f ? most / (float)largest : 0;
        int8_t *high = f->q8 + hr * 2 * f->dims, *low = high + f->dims;
        f->q_sum[hr] = 0;
        for (int64_t d = 0; d < f->dims; d++) {
            int x = (int)(unit > 0 ? lrintf(q[d] / unit) : 0), h = f->parts == 1 ? x : (x + 64) >> 7;
            float e = (q[d] - unit * (float)x) / whole;
            high[d] = (int8_t)h, low[d] = (int8_t)(x - 128 * h);
            f->q_sum[hr] += x;
            norm += q[d] / whole * (q[d] / whole);
            lost += e * e;
        }
        f->q_unit[hr] = unit;
        f->q_norm[hr] = whole * sqrtf(norm) * 1.00001f;
        f->q_error[hr] = whole * sqrtf(lost) * f->sure * 1.00001f;
    }
}

static int64_t round_up(int64_t n) { return (n + 63) / 64 * 64; }

/* Where everything is that lasts from the first call to the second; hits and scores are touched as far as there are some.
 * Returns the bytes needed. */
static int64_t lay_out(scan *f, char *room)
{
    const int64_t all = f->heads * f->n * f->tokens, hr = f->heads * f->rows;
    f->per_piece = PIECE_TOKENS / f->tokens > 1 ? PIECE_TOKENS / f->tokens : 1;
    f->pieces = f->n > f->per_piece ? (f->n + f->per_piece - 1) / f->per_piece : 1;
    const int64_t pieces = f->heads * f->pieces;
    char *at = room;
#define TAKE(name, type, count) f->name = (type *)at, at += round_up((int64_t)sizeof(type) * (count))
    TAKE(q8, int8_t, hr * f->dims * 2);
    TAKE(q_sum, int32_t, hr);
    TAKE(q_unit, float, hr);
    TAKE(q_norm, float, hr);
    TAKE(q_error, float, hr);
    TAKE(n_hits, int64_t, pieces);
    TAKE(bar, float, hr);
    TAKE(offset, float, f->heads * f->n * f->rows);
    TAKE(piece_top, float, pieces * f->rows);
    TAKE(piece_mass, float, pieces * f->rows * (f->v_dim + 2));
    TAKE(found, int32_t, all);
    TAKE(hits, hit, all);
    TAKE(scores, float, all * f->rows);
#undef TAKE
    return at - room;
}

/* Bytes that a scan needs for its own. */
int64_t alaya_scan_room(int64_t heads, int64_t rows, int64_t n, int64_t dims, int64_t v_dim, int64_t tokens)
{
    scan f = {.heads = heads, .rows = rows, .n = n, .dims = dims, .v_dim = v_dim, .tokens = tokens};
    return lay_out(&f, (char *)64);
}

/* The first call (finish = 0) leaves best, the second the rest; both want the same room. Returns where found begins in it. */
int64_t alaya_scan(int64_t threads, int64_t finish, const float *q, const int64_t *blocks, const int32_t *first,
                   const int32_t *count, const float *seed, int64_t heads, int64_t rows, int64_t n, int64_t dims,
                   int64_t v_dim, int64_t tokens, int64_t bits, int64_t codes_at, int64_t budget, float scale,
                   float softcap, float sure, const float *reach, int32_t *best, int64_t *n_found, float *top, float *mass,
                   float *lse, char *room)
{
    scan s = {.q = q, .blocks = blocks, .first = first, .count = count, .seed = seed, .heads = heads, .rows = rows,
               .n = n, .dims = dims, .v_dim = v_dim, .tokens = tokens, .bits = bits, .codes_at = codes_at,
               .budget = budget, .scale = scale, .softcap = softcap, .reach = reach, .sure = sure, .best = best,
               .n_found = n_found, .top = top, .mass = mass, .lse = lse, .parts = sure < 1 ? 1 : 2,
               .means = means_4, .scout = scout_4, .piece = scan_piece_4, .add = add_4, .weigh = weigh_4}, *f = &s;
#ifdef X86
    int widest = alaya_widest();
    if (widest == 16 && __builtin_cpu_supports("avx512vnni")) f->means = means_16, f->scout = scout_16, f->piece = scan_piece_16, f->add = add_16, f->weigh = weigh_16;
    else if (widest >= 8) f->means = means_8, f->scout = scout_8, f->piece = scan_piece_8, f->add = add_8, f->weigh = weigh_8;
#endif
    lay_out(f, room);
    if (threads > ALAYA_MAX_THREADS) threads = ALAYA_MAX_THREADS;
    if (heads * n * tokens * dims < 1 << 17) threads = 1;
    if (finish) {
        alaya_run(threads, finish_head, &s, heads, 1);
    } else {
        round_queries(f);
        alaya_run(threads, means_of_piece, &s, heads * f->pieces, 1);
        alaya_run(threads, scout_head, &s, heads, 1);
        for (wave w = {f, 0, 1}; w.done < f->pieces; w.done = w.next, w.next = 2 * w.done) {
            if (w.next > f->pieces) w.next = f->pieces;
            alaya_run(threads, one_of_wave, &w, heads * (w.next - w.done), 1);
            raise_bars(&w);
        }
        alaya_run(threads, best_of_head, &s, heads, 1);
    }
    return (char *)f->found - room;
}

#else /* once per instruction set from here on */
#include "vector.h"

typedef uint8_t NAME(vb) __attribute__((vector_size(VL)));
typedef int8_t NAME(vc) __attribute__((vector_size(VL)));

INLINE vf NAME(load8)(const int8_t *p)
{
    NAME(vc) x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, vf);
}

/* Scales of LANES tokens. */
INLINE void NAME(unpack)(const uint8_t *levels, float low, float step, float *scales)
{
    for (int i = 0; i < LANES / 2; i += VL) {
        NAME(vb) x;
        memcpy(&x, levels + i, sizeof x);
        const vi both = __builtin_convertvector(x, vi);
        storef(scales + i, low + step * __builtin_convertvector(both & 15, vf));
        storef(scales + LANES / 2 + i, low + step * __builtin_convertvector(both >> 4, vf));
    }
}

/* out[row][lane] = R queries, in P parts each, times the codes of LANES tokens, which lie 127.5 (with 4 bits 7.5) too high. */
INLINE void NAME(dots)(const uint8_t *codes, const int8_t *q, const int32_t *q_sum, int64_t dims, int bits, int R, int P,
                       float (*out)[LANES])
{
    const int32_t above = bits == 8 ? 127 : 7; /* and a half: taken off below, or it would not be a whole number */
#if VL == 16
    const __m512i low4 = _mm512_set1_epi8(15);
    __m512i sum[GROUP][4];
    UNROLL for (int i = 0; i < R * P; i++) UNROLL for (int g = 0; g < 4; g++) sum[i][g] = _mm512_setzero_si512();
    for (int64_t d = 0; d < dims; d += 8, codes += bits * LANES) {
        __m512i c[2][4];
        UNROLL for (int g = 0; g < 4; g++) {
            const __m512i first = _mm512_loadu_si512(codes + g * 64);
            c[0][g] = bits == 8 ? first : _mm512_and_si512(first, low4);
            c[1][g] = bits == 8 ? _mm512_loadu_si512(codes + g * 64 + 4 * LANES)
                                : _mm512_and_si512(_mm512_srli_epi16(first, 4), low4);
        }
        UNROLL for (int half = 0; half < 2; half++)
            UNROLL for (int i = 0; i < R * P; i++) {
                int32_t four;
                memcpy(&four, q + (2 * (i / P) + i % P) * dims + d + 4 * half, 4);
                UNROLL for (int g = 0; g < 4; g++)
                    sum[i][g] = _mm512_dpbusd_epi32(sum[i][g], c[half][g], _mm512_set1_epi32(four));
            }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int g = 0; g < 4; g++) {
        __m512i x = P == 1 ? sum[r][g] : _mm512_add_epi32(_mm512_slli_epi32(sum[2 * r][g], 7), sum[2 * r + 1][g]);
        x = _mm512_sub_epi32(x, _mm512_set1_epi32(q_sum[r] * above));
        _mm512_storeu_ps(out[r] + g * 16, _mm512_sub_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(0.5f * (float)q_sum[r])));
    }
#elif VL == 8
    const __m256i even = _mm256_set1_epi32(0x00ff00ff), low4 = _mm256_set1_epi8(15);
    for (int g = 0; g < LANES; g += 16, codes += 64) {
        __m256i sum[GROUP][2];
        UNROLL for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
        for (int64_t d = 0; d < dims; d += 4) {
            const uint8_t *at = codes + (bits == 8 ? d / 4 : d / 8) * 4 * LANES;
            __m256i c[2][2]; /* of 8 tokens each: numbers 0 and 2, numbers 1 and 3, in 16 bits */
            UNROLL for (int i = 0; i < 2; i++) {
                __m256i x = _mm256_loadu_si256((const __m256i *)(at + 32 * i));
                if (bits == 4) x = _mm256_and_si256(d % 8 < 4 ? x : _mm256_srli_epi16(x, 4), low4);
                c[0][i] = _mm256_and_si256(x, even), c[1][i] = _mm256_and_si256(_mm256_srli_epi16(x, 8), even);
            }
            UNROLL for (int r = 0; r < R; r++) {
                const int8_t *high = q + 2 * r * dims + d, *low = high + dims;
                UNROLL for (int odd = 0; odd < 2; odd++) {
                    const int32_t x = P == 1 ? high[odd] : 128 * high[odd] + low[odd];
                    const int32_t y = P == 1 ? high[odd + 2] : 128 * high[odd + 2] + low[odd + 2];
                    const __m256i pair = _mm256_set1_epi32((int32_t)((uint32_t)y << 16 | (x & 0xffff)));
                    UNROLL for (int i = 0; i < 2; i++)
                        sum[r][i] = _mm256_add_epi32(sum[r][i], _mm256_madd_epi16(c[odd][i], pair));
                }
            }
        }
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int i = 0; i < 2; i++) {
            const __m256i x = _mm256_sub_epi32(sum[r][i], _mm256_set1_epi32(q_sum[r] * above));
            const __m256 half = _mm256_set1_ps(0.5f * (float)q_sum[r]);
            _mm256_storeu_ps(out[r] + g + 8 * i, _mm256_sub_ps(_mm256_cvtepi32_ps(x), half));
        }
    }
#else
    for (int r = 0; r < R; r++, q += 2 * dims) {
        int32_t acc[LANES] = {0};
        for (int64_t d = 0; d < dims; d++) {
            int32_t x = P == 1 ? q[d] : 128 * q[d] + q[dims + d];
            const uint8_t *c = codes + (bits == 8 ? d / 4 : d / 8) * 4 * LANES + d % 4;
            if (bits == 8) for (int i = 0; i < LANES; i++) acc[i] += c[i * 4] * x;
            else for (int i = 0; i < LANES; i++) acc[i] += (d % 8 < 4 ? c[i * 4] & 15 : c[i * 4] >> 4) * x;
        }
        for (int i = 0; i < LANES; i++) out[r][i] = (float)(acc[i] - q_sum[r] * above) - 0.5f * (float)q_sum[r];
    }
#endif
}

/* Functions of their own: inlined into one, their sums would not stay in registers, and take twice the time. */
#define DOTS(name, bits, R, P) \
    static NOINLINE void NAME(name)(const uint8_t *codes, const int8_t *q, const int32_t *q_sum, int64_t dims, \
                                    float (*out)[LANES]) \
    { NAME(dots)(codes, q, q_sum, dims, bits, R, P, out); }
DOTS(dots_4_row, 4, 1, 1)
DOTS(dots_4_group, 4, GROUP, 1)
DOTS(dots_4_row_exact, 4, 1, 2)
DOTS(dots_4_pair_exact, 4, GROUP / 2, 2) /* two parts of four rows do not fit the registers */
DOTS(dots_8_row, 8, 1, 1)
DOTS(dots_8_group, 8, GROUP, 1)
DOTS(dots_8_row_exact, 8, 1, 2)
DOTS(dots_8_pair_exact, 8, GROUP / 2, 2)
#undef DOTS

/* The same for one row, or for GROUP. */
static void NAME(dots_row)(const scan *f, const uint8_t *codes, const int8_t *q, const int32_t *q_sum, float (*out)[LANES])
{
    if (f->parts == 1) (f->bits == 4 ? NAME(dots_4_row) : NAME(dots_8_row))(codes, q, q_sum, f->dims, out);
    else (f->bits == 4 ? NAME(dots_4_row_exact) : NAME(dots_8_row_exact))(codes, q, q_sum, f->dims, out);
}

static void NAME(dots_group)(const scan *f, const uint8_t *codes, const int8_t *q, const int32_t *q_sum, float (*out)[LANES])
{
    const int half = GROUP / 2;
    if (f->parts == 1)
        (f->bits == 4 ? NAME(dots_4_group) : NAME(dots_8_group))(codes, q, q_sum, f->dims, out);
    else
        for (int r = 0; r < GROUP; r += half, q += half * 2 * f->dims)
            (f->bits == 4 ? NAME(dots_4_pair_exact) : NAME(dots_8_pair_exact))(codes, q, q_sum + r, f->dims, out + r);
}

INLINE vf NAME(vcap)(vf x, float c)
{
    if (!(c > 0)) return x;
    vf a = x / c, e = vexp(-2.0f * pick(a < 0.0f, -a, a)), y = (1.0f - e) / (1.0f + e) * c;
    return pick(x == -INFINITY, x, pick(a < 0.0f, -y, y)); /* what is hidden stays so */
}

/* What one thread knows while it scans a piece; scores unscaled, but for most. */
typedef struct {
    float sure[MAX_ROWS];    /* the best score there certainly is */
    float limit[MAX_ROWS];   /* what a key must be able to reach */
    float most[MAX_ROWS];    /* the largest in the estimate so far, scaled and capped: its weights are relative to it */
    float loud[MAX_ROWS];    /* that, unscaled */
    float faint[MAX_ROWS];   /* below this the estimate changes by less than 1e-13 of the largest */
    float wide[MAX_ROWS], slack[MAX_ROWS]; /* of the present block: an error is at most wide x scale + slack */
    vf weight[MAX_ROWS];     /* of the present block, in the estimate: a sum for each lane */
} NAME(bars);

/* A score of the estimate is larger than all before: weights so far shrink. */
static void NAME(raise)(const scan *f, NAME(bars) *k, int64_t r, float x, float *sum)
{
    const float high = cap(x * f->scale, f->softcap);
    k->weight[r] *= shrink(f, sum, k->most[r], high);
    k->most[r] = high;
    k->loud[r] = x;
    k->faint[r] = uncap(high - 30.0f, f->scale, f->softcap);
}

INLINE vf NAME(highest)(const float *x)
{
    vf top = loadf(x);
    for (int i = VL; i < LANES; i += VL) top = larger(loadf(x + i), top);
    return top;
}

/* 2^x to about 1e-4 relative: enough for an estimate. Nothing far below 2^-126. */
INLINE vf NAME(power)(vf x)
{
#if VL == 16
    const vf r = (vf)_mm512_reduce_ps((__m512)x, 1); /* x less the largest whole number that is not above it */
    const vf p = ((0.07802371f * r + 0.22606678f) * r + 0.69583451f) * r + 0.99992503f;
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    x = larger(x, (vf){0} - 126.0f);
    vf big = x + 12582912.0f, r = x - (big - 12582912.0f);
    vf p = ((0.0558263180f * r + 0.2402265070f) * r + 0.6931471806f) * r + 1.0f;
    return p * (vf)(((vu)big << 23) + 0x3f800000u);
#endif
}

/* There certainly is a score so high. */
INLINE void NAME(set_bar)(const scan *f, NAME(bars) *k, int64_t head, int64_t r, float sure)
{
    k->sure[r] = sure;
    k->limit[r] = sure == -INFINITY ? sure : uncap(cap(sure * f->scale, f->softcap) - f->reach[head], f->scale, f->softcap);
}

/* What of LANES tokens from t on may be near enough goes to the hits, and out of x. near: a bit for each that is, by what was
 * known before. Returns how many hits there are now. */
static int64_t NAME(keep)(const scan *f, NAME(bars) *k, int64_t head, int64_t b, int32_t t, uint64_t near,
                          const float *scales, float (*x)[LANES], int64_t base, int64_t hits)
{
    const float *block = block_of(f, head, b);
    const int64_t rows = f->rows;
    for (uint64_t left = near; left; left &= left - 1) {
        const int i = __builtin_ctzll(left);
        for (int64_t r = 0; r < rows; r++) {
            const float sure = x[r][i] - (k->wide[r] * scales[i] + k->slack[r]);
            if (sure > k->sure[r]) NAME(set_bar)(f, k, head, r, sure);
        }
    }
    for (; near; near &= near - 1) {
        const int i = __builtin_ctzll(near);
        int still = 0;
        for (int64_t r = 0; r < rows; r++) still |= x[r][i] + (k->wide[r] * scales[i] + k->slack[r]) >= k->limit[r];
        if (!still) continue;
        f->hits[base + hits] = (hit){
            (int32_t)(b * f->tokens + t + i), block[RATIO] * scales[i] + block[SLACK], block[NORM] * scales[i]};
        for (int64_t r = 0; r < rows; r++) f->scores[(base + hits) * rows + r] = x[r][i], x[r][i] = -INFINITY;
        hits++;
    }
    return hits;
}

INLINE void NAME(add_rows)(const scan *f, const float *block, const float *weight, float *sums, int R)
{
    const int8_t *mean_v = mean_v_of(f, block);
    const int64_t width = f->v_dim + 2;
    float times[GROUP];
    int64_t d = 0;
    for (int r = 0; r < R; r++) times[r] = weight[r] * block[V_UNIT], sums[r * width + f->v_dim + 1] += weight[r];
    for (; d + VL <= f->v_dim; d += VL) {
        const vf value = NAME(load8)(mean_v + d);
        UNROLL for (int r = 0; r < R; r++) storef(sums + r * width + d, loadf(sums + r * width + d) + times[r] * value);
    }
    for (; d < f->v_dim; d++)
        for (int r = 0; r < R; r++) sums[r * width + d] += times[r] * (float)mean_v[d];
}

/* The mean value of a block, so often for each row, into its sums. */
static void NAME(add)(const scan *f, const float *block, const float *weight, float *sums)
{
    int64_t r = 0;
    for (; r + GROUP <= f->rows; r += GROUP) NAME(add_rows)(f, block, weight + r, sums + r * (f->v_dim + 2), GROUP);
    for (; r < f->rows; r++) NAME(add_rows)(f, block, weight + r, sums + r * (f->v_dim + 2), 1);
}

/* Weights of n scores of each row, unscaled, one block's, into its sums. What lies behind them in x is overwritten. */
static void NAME(weigh)(const scan *f, float (*x)[LANES], int64_t n, float *weight, float *sums)
{
    const int64_t padded = (n + VL - 1) / VL * VL;
    for (int64_t r = 0; r < f->rows; r++) {
        float *sum = sums + r * (f->v_dim + 2), *most = sum + f->v_dim;
        vf top = (vf){0} - INFINITY, total = {0};
        for (int64_t i = n; i < padded; i++) x[r][i] = -INFINITY;
        for (int64_t i = 0; i < padded; i += VL) {
            const vf score = NAME(vcap)(loadf(x[r] + i) * f->scale, f->softcap);
            storef(x[r] + i, score);
            top = larger(score, top);
        }
        const float high = NAME(largest)(top);
        if (high < *most - 30.0f || high == -INFINITY) continue;
        if (high > *most) {
            weight[r] *= shrink(f, sum, *most, high);
            *most = high;
        }
        for (int64_t i = 0; i < padded; i += VL) total += NAME(power)((loadf(x[r] + i) - *most) * LOG2_E);
        weight[r] += NAME(total)(total);
    }
}

INLINE void NAME(means_of)(const scan *f, const float *block, const float *q, int R, float *out)
{
    const int8_t *mean_k = mean_k_of(block);
    vf sum[GROUP];
    int64_t d = 0;
    UNROLL for (int r = 0; r < R; r++) sum[r] = (vf){0};
    for (; d + VL <= f->dims; d += VL) {
        const vf key = NAME(load8)(mean_k + d);
        UNROLL for (int r = 0; r < R; r++) sum[r] += loadf(q + r * f->dims + d) * key;
    }
    UNROLL for (int r = 0; r < R; r++) {
        out[r] = NAME(total)(sum[r]);
        for (int64_t i = d; i < f->dims; i++) out[r] += q[r * f->dims + i] * (float)mean_k[i];
        out[r] *= block[K_UNIT];
    }
}

/* Scores of the mean keys of a piece's blocks. */
static void NAME(means)(const scan *f, int64_t head, int64_t piece)
{
    const int64_t rows = f->rows;
    const float *q = f->q + head * rows * f->dims;
    int64_t last = (piece + 1) * f->per_piece;
    if (last > f->n) last = f->n;
    for (int64_t b = piece * f->per_piece; b < last; b++) {
        const float *block = block_of(f, head, b);
        float *offset = f->offset + (head * f->n + b) * rows;
        int64_t r = 0;
        if (b + MEANS_AHEAD < f->n) fetch_mean(f, block_of(f, head, b + MEANS_AHEAD));
        for (; r + GROUP <= rows; r += GROUP) NAME(means_of)(f, block, q + r * f->dims, GROUP, offset + r);
        for (; r < rows; r++) NAME(means_of)(f, block, q + r * f->dims, 1, offset + r);
    }
}

/* What a row's scores with a block may be off: at most wide x scale + slack. */
INLINE void NAME(error_of)(const scan *f, int64_t hr, const float *block, float *wide, float *slack)
{
    const float norm = f->sure * f->q_norm[hr];
    *wide = norm * block[RATIO] + f->q_error[hr] * block[NORM];
    *slack = norm * block[SLACK];
}

INLINE void NAME(errors_of)(const scan *f, int64_t head, const float *block, float *wide, float *slack)
{
    for (int64_t r = 0; r < f->rows; r++) NAME(error_of)(f, head * f->rows + r, block, wide + r, slack + r);
}

/* Scales of LANES tokens of a block from t on, and their scores but for the block's offset, each row's in units of its own. */
INLINE void NAME(products)(const scan *f, int64_t head, const float *block, int64_t t, float *scales, float (*x)[LANES])
{
    const int64_t rows = f->rows, at = head * rows;
    const uint8_t *c = (const uint8_t *)block + f->codes_at + t / LANES * (f->dims * f->bits / 8 * LANES);
    const int8_t *q8 = f->q8 + at * 2 * f->dims;
    int64_t r = 0;
    NAME(unpack)(levels_of(f, block) + t / 2, block[LOW], block[STEP], scales);
    for (; r + GROUP <= rows; r += GROUP) NAME(dots_group)(f, c, q8 + r * 2 * f->dims, f->q_sum + at + r, x + r);
    for (; r < rows; r++) NAME(dots_row)(f, c, q8 + r * 2 * f->dims, f->q_sum + at + r, x + r);
}

/* Raise a row's bar to the best score there certainly is in a block. */
INLINE void NAME(look_into)(const scan *f, int64_t head, int64_t r, int64_t b)
{
    const int64_t hr = head * f->rows + r, code_bytes = f->dims * f->bits / 8 * LANES;
    const float *block = block_of(f, head, b), offset = f->offset[(head * f->n + b) * f->rows + r];
    const uint8_t *codes = (const uint8_t *)block + f->codes_at;
    const int32_t from = f->first[b], to = from + f->count[b];
    float wide, slack;
    NAME(error_of)(f, hr, block, &wide, &slack);
    for (int32_t t = from / LANES * LANES; t < to; t += LANES) {
        float x[1][LANES], scales[LANES];
        NAME(unpack)(levels_of(f, block) + t / 2, block[LOW], block[STEP], scales);
        NAME(dots_row)(f, codes + t / LANES * code_bytes, f->q8 + hr * 2 * f->dims, f->q_sum + hr, x);
        for (int i = from > t ? from - t : 0; i < LANES && t + i < to; i++) {
            float sure = x[0][i] * f->q_unit[hr] * scales[i] + offset - (wide * scales[i] + slack);
            if (sure > f->bar[hr]) f->bar[hr] = sure;
        }
    }
}

/* The best score there certainly is, of each row, in the blocks whose mean keys score best. */
static void NAME(scout)(const scan *f, int64_t head)
{
    const int64_t rows = f->rows, at = head * rows, most = 1 + f->n / SCOUTED < MOST_SCOUTS ? 1 + f->n / SCOUTED : MOST_SCOUTS;
    for (int64_t r = 0; r < rows; r++) {
        const float *offset = f->offset + head * f->n * rows + r;
        int64_t best[MOST_SCOUTS], n = 0;
        f->bar[at + r] = -INFINITY;
        for (int64_t b = 0; b < f->n; b++) {
            if (f->count[b] <= 0 || (n == most && !(offset[b * rows] > offset[best[n - 1] * rows]))) continue;
            int64_t place = n < most ? n++ : n - 1;
            for (; place > 0 && offset[b * rows] > offset[best[place - 1] * rows]; place--) best[place] = best[place - 1];
            best[place] = b;
        }
        for (int64_t i = 0; i < n; i++) NAME(look_into)(f, head, r, best[i]);
    }
}

static void NAME(scan_piece)(const scan *f, int64_t head, int64_t piece)
{
    const int64_t rows = f->rows, at = head * rows, width = f->v_dim + 2;
    int64_t last = (piece + 1) * f->per_piece, hits = 0;
    int64_t base = (head * f->n + piece * f->per_piece) * f->tokens;
    float *sums = f->piece_mass + (head * f->pieces + piece) * rows * width;
    NAME(bars) k;
    if (last > f->n) last = f->n;
    for (int64_t r = 0; r < rows; r++) {
        const float seed = f->seed[at + r];
        memset(sums + r * width, 0, sizeof(float) * (size_t)width);
        k.most[r] = k.loud[r] = k.faint[r] = -INFINITY;
        float sure = seed == -INFINITY ? seed : uncap(seed, f->scale, f->softcap);
        NAME(set_bar)(f, &k, head, r, f->bar[at + r] > sure ? f->bar[at + r] : sure);
    }
    for (int64_t b = piece * f->per_piece; b < last; b++) {
        const float *block = block_of(f, head, b), *offset = f->offset + (head * f->n + b) * rows;
        const int32_t from = f->first[b], to = from + f->count[b];
        NAME(errors_of)(f, head, block, k.wide, k.slack);
        for (int64_t r = 0; r < rows; r++) k.weight[r] = (vf){0};
        for (int32_t t = from / LANES * LANES; t < to; t += LANES) {
            float x[MAX_ROWS][LANES], scales[LANES];
            vf tops[MAX_ROWS];
            uint64_t near = 0;
            NAME(products)(f, head, block, t, scales, x);
            for (int64_t r = 0; r < rows; r++) {
                const float unit = f->q_unit[at + r], limit = k.limit[r], wide = k.wide[r], slack = k.slack[r];
                vf top = (vf){0} - INFINITY;
                for (int i = 0; i < LANES; i += VL) {
                    const vf scale = loadf(scales + i), score = loadf(x[r] + i) * unit * scale + offset[r];
                    storef(x[r] + i, score);
                    near |= (uint64_t)NAME(at_least)(score + (wide * scale + slack), (vf){0} + limit) << i;
                    top = larger(score, top);
                }
                tops[r] = top;
            }
            if (t < from) near &= ~(uint64_t)0 << (from - t);
            if (t + LANES > to) near &= ~(uint64_t)0 >> (t + LANES - to);
            if (t < from || t + LANES > to)
                for (int64_t r = 0; r < rows; r++)
                    for (int i = 0; i < LANES; i++)
                        if (t + i < from || t + i >= to) x[r][i] = -INFINITY;
            if (near) hits = NAME(keep)(f, &k, head, b, t, near, scales, x, base, hits);
            for (int64_t r = 0; r < rows; r++) {
                vf weight = {0};
                if (!any(tops[r] > k.faint[r])) continue;
                if (any(tops[r] > k.loud[r])) { /* the largest may have gone to the hits */
                    vf top = NAME(highest)(x[r]);
                    if (!any(top > k.faint[r])) continue;
                    if (any(top > k.loud[r])) NAME(raise)(f, &k, r, NAME(largest)(top), sums + r * width);
                }
                const float unit = f->scale * LOG2_E, most = k.most[r] * LOG2_E;
                if (f->softcap > 0)
                    for (int i = 0; i < LANES; i += VL)
                        weight += NAME(power)(NAME(vcap)(loadf(x[r] + i) * f->scale, f->softcap) * LOG2_E - most);
                else
                    for (int i = 0; i < LANES; i += VL) weight += NAME(power)(loadf(x[r] + i) * unit - most);
                k.weight[r] += weight;
            }
        }
        float weight[MAX_ROWS];
        for (int64_t r = 0; r < rows; r++) weight[r] = NAME(total)(k.weight[r]);
        NAME(add)(f, block, weight, sums);
    }
    for (int64_t r = 0; r < rows; r++) {
        sums[r * width + f->v_dim] = k.most[r];
        f->piece_top[(head * f->pieces + piece) * rows + r] =
            k.sure[r] == -INFINITY ? k.sure[r] : cap(k.sure[r] * f->scale, f->softcap);
    }
    f->n_hits[head * f->pieces + piece] = hits;
}

#include "vector_end.h"
#endif
