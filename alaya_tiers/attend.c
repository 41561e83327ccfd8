/* Attention of a few rows over scattered blocks of rows [k | v], and the copies that fill such blocks.
 *
 * The work is cut into pieces: a range of the visible tokens of one head. A piece walks its tokens tile by tile: scores
 * of all rows in one pass over the tile's keys, running maximum, exp, then its values; each byte of K and V comes from
 * memory once. It leaves (acc, max, sum) per row; whoever finishes the last piece of a head merges the head.
 *
 * The middle of this file includes itself once per instruction set (VL floats to a vector), chosen at run time.
 * Threads are torch's own where that is safe and fast, else a small pool: docs/decisions/001-compiled-kernel.md.
 */
#ifndef VL
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include "pool.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define X86 1
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() ((void)0)
#endif

enum { F32, BF16, F16 };
enum { TILE = 64, TILE_BYTES = 1 << 15 }; /* a tile: at most so many tokens, at most so many bytes if 16 tokens fit */
enum { NEAR = 4 }; /* tokens */
#define FETCH_FAR(p) __builtin_prefetch((p), 0, 2)  /* a tile ahead, into L2: into L1 it is half as fast */
#define FETCH_NEAR(p) __builtin_prefetch((p), 0, 3) /* NEAR tokens ahead, from L2 into L1: 1.1x, see decisions/001 */
enum { PIECES = 8 };      /* pieces per thread, so that a thread that loses its core does not hold up the others */
enum { PIECE_BYTES = 1 << 16, THREAD_BYTES = 1 << 17, MAX_THREADS = ALAYA_MAX_THREADS, PATIENCE = 4000 };

/* Numbers of a row: its first k_dim are the key, v_dim from v_at on the value. They follow each other, or overlap (MLA). */
static int64_t row_of(int64_t k_dim, int64_t v_dim, int64_t v_at) { return k_dim > v_at + v_dim ? k_dim : v_at + v_dim; }

typedef struct { int32_t block, first, count, position; int64_t before; } span; /* before: tokens in earlier spans */

typedef struct job {
    const float *q;
    const int64_t *addresses;
    const int32_t *lo, *hi;
    int64_t heads, rows, blocks, address_stride, k_dim, v_dim, v_at, k_pad, v_pad, row_bytes, itemsize;
    int32_t dtype, tile; /* tile: tokens */
    float scale, softcap;
    float *out, *lse, *top; /* top: the largest score, if asked for */
    span *spans;
    int64_t n_spans, tokens, pieces, per_piece, stride; /* stride: floats of one piece's result */
    float *results, *scratch;                           /* scratch: scratch_floats for each worker */
    int64_t scratch_floats;
    atomic_int *missing;                                /* pieces of each head still to do */
    void (*piece)(const struct job *, int64_t, int64_t, int64_t, float *, float *);
} job;

typedef struct {
    const char *row[TILE + NEAR];
    int32_t position[TILE], n, low, high;
} tile;

typedef struct { int64_t span, offset, left; const int64_t *addresses; } cursor;

/* The next tokens of a piece; short of a multiple of 4 the last one is repeated, at a position nobody sees. */
static void next_tile(const job *j, cursor *c, tile *t)
{
    int n = 0;
    t->low = INT32_MAX;
    t->high = INT32_MIN;
    while (n < j->tile && c->left > 0) {
        const span *s = &j->spans[c->span];
        const char *base = (const char *)c->addresses[s->block] + (s->first + c->offset) * j->row_bytes;
        int64_t take = s->count - c->offset;
        if (take > j->tile - n) take = j->tile - n;
        if (take > c->left) take = c->left;
        int32_t position = s->position + (int32_t)c->offset;
        if (position < t->low) t->low = position;
        if (position + take - 1 > t->high) t->high = position + (int32_t)take - 1;
        for (int64_t i = 0; i < take; i++, n++) {
            t->row[n] = base + i * j->row_bytes;
            t->position[n] = position + (int32_t)i;
        }
        c->left -= take;
        c->offset += take;
        if (c->offset == s->count) c->span++, c->offset = 0;
    }
    t->n = n;
    for (; n % 4; n++) t->row[n] = t->row[n - 1], t->position[n] = INT32_MIN;
    for (; n < j->tile + NEAR; n++) t->row[n] = n ? t->row[n - 1] : NULL; /* only fetched ahead, which never faults */
}

static cursor seek(const job *j, int64_t head, int64_t first, int64_t last)
{
    int64_t a = 0, b = j->n_spans;
    while (b - a > 1) {
        int64_t mid = (a + b) / 2;
        if (j->spans[mid].before <= first) a = mid; else b = mid;
    }
    return (cursor){a, first - j->spans[a].before, last - first, j->addresses + head * j->address_stride};
}

#define SELF "attend.c"
#include "widths.h"

/* Work for several threads: items are claimed one by one; a worker's number picks its scratch. */
typedef struct batch {
    void (*one)(void *job, int64_t item, int64_t worker);
    void *job;
    int64_t items;
    atomic_llong next_item;
    atomic_int workers, running; /* numbers given out; pool threads inside, written under the lock */
    int64_t wanted;              /* pool threads that may still join */
    struct batch *next;
    pthread_t caller;
    int64_t began, ended; /* ns; ended: when no item was left for the caller */
} batch;

/* Open batches, newest first. A batch lives on its caller's stack: the caller takes it off the list when the items have
 * run out, so that no thread can join any more, and waits for those inside. */
static batch *open_batches;
static int64_t pool_threads;
static atomic_int shunned; /* calls for which the pool is preferred to OpenMP's threads */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t opened = PTHREAD_COND_INITIALIZER, left = PTHREAD_COND_INITIALIZER;

static void work(batch *b)
{
    int64_t worker = atomic_fetch_add(&b->workers, 1), item;
    while ((item = atomic_fetch_add(&b->next_item, 1)) < b->items) b->one(b->job, item, worker);
}

static void close_batch(batch *b)
{
    for (batch **p = &open_batches; *p; p = &(*p)->next)
        if (*p == b) {
            *p = b->next;
            return;
        }
}

static void *pool_thread(void *unused)
{
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!open_batches) pthread_cond_wait(&opened, &lock);
        batch *b = open_batches;
        b->running++;
        if (--b->wanted == 0) close_batch(b);
        pthread_mutex_unlock(&lock);
        work(b);
        pthread_mutex_lock(&lock);
        if (--b->running == 0) pthread_cond_broadcast(&left);
    }
    return unused;
}

static void run_pool(batch *b, int64_t threads)
{
    pthread_t id;
    atomic_fetch_sub(&shunned, 1);
    b->wanted = threads - 1;
    pthread_mutex_lock(&lock);
    while (pool_threads < threads - 1 && !pthread_create(&id, NULL, pool_thread, NULL)) {
        pthread_detach(id);
        pool_threads++;
    }
    b->next = open_batches;
    open_batches = b;
    for (int64_t i = 1; i < threads; i++) pthread_cond_signal(&opened);
    pthread_mutex_unlock(&lock);
    work(b);
    pthread_mutex_lock(&lock);
    close_batch(b);
    pthread_mutex_unlock(&lock);
    for (int i = 0; i < PATIENCE && b->running; i++) PAUSE();
    pthread_mutex_lock(&lock);
    while (b->running) pthread_cond_wait(&left, &lock);
    pthread_mutex_unlock(&lock);
}

static int64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static void work_borrowed(void *data)
{
    batch *b = data;
    work(b);
    if (pthread_equal(pthread_self(), b->caller)) b->ended = now();
}

/* OpenMP's threads spin for milliseconds after each operation of torch, on cores that a thread of ours would not get:
 * best to use those very threads. But a parallel region ends only when each of its threads has had a core. When that
 * took long, somebody else wants the cores, and the pool serves the next calls: there nobody waits for a late thread.
 */
typedef void parallel_fn(void (*body)(void *), void *data, unsigned threads, unsigned flags);
static parallel_fn *borrowed; /* GOMP_parallel of the OpenMP runtime that torch uses */
enum { SHUN_CALLS = 64, LATE_NS = 1000000 };

void alaya_borrow(parallel_fn *gomp_parallel) { borrowed = gomp_parallel; }

static void run_borrowed(batch *b, int64_t threads)
{
    b->caller = pthread_self();
    b->began = now();
    borrowed(work_borrowed, b, (unsigned)threads, 0);
    if (now() - b->ended > LATE_NS + (b->ended - b->began) / 4) atomic_store(&shunned, SHUN_CALLS);
}

void alaya_run(int64_t threads, void (*one)(void *, int64_t, int64_t), void *j, int64_t items, int may_borrow)
{
    batch b = {.one = one, .job = j, .items = items};
    if (threads > items) threads = items;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads <= 1) work(&b);
    else if (may_borrow && borrowed && atomic_load(&shunned) <= 0) run_borrowed(&b, threads);
    else run_pool(&b, threads);
}

/* A child of fork has none of its parent's threads, nor OpenMP's, and perhaps a lock that one of them held. */
static void forget_threads(void)
{
    open_batches = NULL;
    pool_threads = 0;
    borrowed = NULL;
    lock = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    opened = left = (pthread_cond_t)PTHREAD_COND_INITIALIZER;
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_threads); }

/* Which tokens any row sees, as spans. Rows with equal ranges in a row cost nothing; returns the number of tokens. */
static void find_spans(job *j, const int32_t *starts, const int32_t *counts)
{
    for (int64_t b = 0; b < j->blocks; b++) {
        int32_t first = INT32_MAX, last = INT32_MIN, end = starts[b] + counts[b];
        for (int64_t r = 0; r < j->rows; r++) {
            if (r && j->lo[r] == j->lo[r - 1] && j->hi[r] == j->hi[r - 1]) continue;
            int32_t low = j->lo[r] > starts[b] ? j->lo[r] : starts[b], high = j->hi[r] < end ? j->hi[r] : end;
            if (low >= high) continue;
            if (low < first) first = low;
            if (high > last) last = high;
        }
        if (first >= last) continue;
        j->spans[j->n_spans++] = (span){(int32_t)b, first - starts[b], last - first, first, j->tokens};
        j->tokens += last - first;
    }
}

/* out and lse of one head from its pieces' (acc, max, sum). */
static void merge_head(const job *j, int64_t head)
{
    for (int64_t r = 0; r < j->rows; r++) {
        float *out = j->out + (head * j->rows + r) * j->v_dim, top = -INFINITY, sum = 0;
        const float *piece = j->results + head * j->pieces * j->stride;
        memset(out, 0, sizeof(float) * j->v_dim);
        for (int64_t p = 0; p < j->pieces; p++) {
            float max = piece[p * j->stride + j->rows * j->v_pad + 2 * r];
            if (max > top) top = max;
        }
        for (int64_t p = 0; p < j->pieces; p++, piece += j->stride) {
            const float *acc = piece + r * j->v_pad, *state = piece + j->rows * j->v_pad + 2 * r;
            float weight = state[0] == -INFINITY ? 0.0f : expf(state[0] - top);
            if (weight == 0.0f && state[1] == state[1]) continue;
            sum += weight * state[1];
            for (int64_t d = 0; d < j->v_dim; d++) out[d] += weight * acc[d];
        }
        if (sum != 0)
            for (int64_t d = 0; d < j->v_dim; d++) out[d] /= sum;
        j->lse[head * j->rows + r] = sum != 0 ? top + logf(sum) : -INFINITY;
        if (j->top) j->top[head * j->rows + r] = top;
    }
}

static void one_piece(void *data, int64_t item, int64_t worker)
{
    job *j = data;
    int64_t head = item / j->pieces, first = item % j->pieces * j->per_piece, last = first + j->per_piece;
    if (last > j->tokens) last = j->tokens;
    j->piece(j, head, first, last, j->results + item * j->stride, j->scratch + worker * j->scratch_floats);
    if (atomic_fetch_sub(&j->missing[head], 1) == 1) merge_head(j, head);
}

static int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* Cut the visible tokens of every head into pieces. */
static int64_t plan(job *j, int64_t threads)
{
    int64_t fit = TILE_BYTES / j->row_bytes / 16 * 16;
    j->tile = (int32_t)(fit < 16 ? 16 : fit > TILE ? TILE : fit);
    int64_t bytes = j->tokens * j->row_bytes, wanted = up(threads * PIECES, j->heads) / j->heads;
    if (j->heads * bytes < THREAD_BYTES) threads = 1;
    if (wanted > bytes / PIECE_BYTES) wanted = bytes / PIECE_BYTES;
    if (wanted < 1 || threads == 1) wanted = 1;
    j->per_piece = up(j->tokens / wanted + 1, TILE);
    j->pieces = (j->tokens + j->per_piece - 1) / j->per_piece;
    j->stride = up(j->rows * (j->v_pad + 2), 16);
    j->scratch_floats = up(j->rows * (j->k_pad + TILE), 16);
    return threads;
}

int alaya_widest(void)
{
#ifdef X86
    if (ALAYA_MOST >= 16 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return 16;
    if (ALAYA_MOST >= 8 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 8;
#endif
    return 4;
}

static void (*best_piece(void))(const job *, int64_t, int64_t, int64_t, float *, float *)
{
#ifdef X86
    int widest = alaya_widest();
    if (widest >= 8) return widest == 16 ? attend_piece_16 : attend_piece_8;
#endif
    return attend_piece_4;
}

/* Returns 0, or -1 when memory ran out. softcap 0 is none. */
int alaya_attend_blocks(int64_t threads, const float *q, const int64_t *addresses,
                 const int32_t *starts, const int32_t *counts, const int32_t *lo, const int32_t *hi, int64_t heads,
                 int64_t rows, int64_t blocks, int64_t address_stride, int64_t k_dim, int64_t v_dim, int64_t v_at, int32_t dtype,
                 float scale, float softcap, float *out, float *lse, float *top)
{
    int64_t itemsize = dtype == F32 ? 4 : 2;
    job j = {.q = q, .addresses = addresses, .address_stride = address_stride, .lo = lo, .hi = hi,
             .heads = heads, .rows = rows, .blocks = blocks,
             .k_dim = k_dim, .v_dim = v_dim, .v_at = v_at, .k_pad = up(k_dim, 16), .v_pad = up(v_dim, 16), .dtype = dtype,
             .row_bytes = row_of(k_dim, v_dim, v_at) * itemsize, .itemsize = itemsize, .scale = scale, .softcap = softcap,
             .out = out, .lse = lse, .top = top, .piece = best_piece()};
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (!(j.spans = malloc(sizeof(span) * (size_t)(blocks + 1)))) return -1;
    find_spans(&j, starts, counts);
    threads = plan(&j, threads);
    size_t floats = (size_t)(heads * j.pieces * j.stride + threads * j.scratch_floats);
    j.results = j.tokens ? aligned_alloc(64, up(floats * sizeof(float) + heads * sizeof(atomic_int), 64)) : NULL;
    if (j.results) {
        j.scratch = j.results + heads * j.pieces * j.stride;
        j.missing = (atomic_int *)(j.results + floats);
        for (int64_t h = 0; h < heads; h++) atomic_init(&j.missing[h], (int)j.pieces);
        alaya_run(threads, one_piece, &j, heads * j.pieces, 1);
    } else {
        memset(out, 0, sizeof(float) * heads * rows * v_dim);
        for (int64_t i = 0; i < heads * rows; i++) lse[i] = -INFINITY;
        for (int64_t i = 0; top && i < heads * rows; i++) top[i] = -INFINITY;
    }
    int failed = j.tokens && !j.results;
    free(j.results);
    free(j.spans);
    return failed ? -1 : 0;
}

/* Attention of each head over tokens of its own: addresses[first[h] .. first[h + 1]) are their rows. */
typedef struct { job *heads; const int64_t *before; int64_t n; } lists; /* before: items of earlier heads */

static void one_list_piece(void *data, int64_t item, int64_t worker)
{
    lists *l = data;
    int64_t h = 0;
    while (l->before[h + 1] <= item) h++;
    one_piece(&l->heads[h], item - l->before[h], worker);
}

/* Returns 0, or -1 when memory ran out. */
int alaya_attend_lists(int64_t threads, const float *q, const int64_t *addresses, const int64_t *first, int64_t heads,
                       int64_t rows, int64_t k_dim, int64_t v_dim, int64_t v_at, int32_t dtype, float scale, float softcap,
                       float *out, float *lse)
{
    int64_t tokens = first[heads], most = 0, itemsize = dtype == F32 ? 4 : 2, pieces = 0, scratch;
    for (int64_t h = 0; h < heads; h++)
        if (first[h + 1] - first[h] > most) most = first[h + 1] - first[h];
    job shape = {.heads = 1, .rows = rows, .k_dim = k_dim, .v_dim = v_dim, .v_at = v_at, .k_pad = up(k_dim, 16), .v_pad = up(v_dim, 16),
                 .dtype = dtype, .row_bytes = row_of(k_dim, v_dim, v_at) * itemsize, .itemsize = itemsize, .scale = scale,
                 .softcap = softcap, .tokens = most, .piece = best_piece()};
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    threads = plan(&shape, threads);
    scratch = shape.scratch_floats;
    int32_t *limits = malloc(sizeof(int32_t) * (size_t)rows * 2);
    job *jobs = malloc(sizeof(job) * (size_t)heads);
    int64_t *before = malloc(sizeof(int64_t) * (size_t)(heads + 1));
    span *spans = malloc(sizeof(span) * (size_t)(tokens + 1));
    for (int64_t h = 0; h < heads; h++) pieces += (first[h + 1] - first[h] + shape.per_piece - 1) / shape.per_piece;
    size_t floats = (size_t)(pieces * shape.stride + threads * scratch);
    float *results = aligned_alloc(64, up(floats * sizeof(float) + heads * sizeof(atomic_int) + 64, 64));
    int failed = !limits || !jobs || !before || !spans || !results;
    if (!failed) {
        for (int64_t r = 0; r < rows; r++) limits[r] = 0, limits[rows + r] = INT32_MAX;
        before[0] = 0;
        for (int64_t h = 0; h < heads; h++) {
            job *j = &jobs[h];
            *j = shape;
            j->tokens = j->n_spans = first[h + 1] - first[h];
            j->q = q + h * rows * k_dim, j->out = out + h * rows * v_dim, j->lse = lse + h * rows;
            j->addresses = addresses + first[h], j->spans = spans + first[h];
            j->lo = limits, j->hi = limits + rows;
            for (int64_t i = 0; i < j->tokens; i++) j->spans[i] = (span){(int32_t)i, 0, 1, (int32_t)i, i};
            j->pieces = (j->tokens + shape.per_piece - 1) / shape.per_piece;
            j->results = results + before[h] * shape.stride, j->scratch = results + pieces * shape.stride;
            j->missing = (atomic_int *)(results + floats) + h;
            atomic_init(j->missing, (int)j->pieces);
            before[h + 1] = before[h] + j->pieces;
            if (!j->pieces) {
                memset(j->out, 0, sizeof(float) * (size_t)(rows * v_dim));
                for (int64_t r = 0; r < rows; r++) j->lse[r] = -INFINITY;
            }
        }
        lists l = {jobs, before, heads};
        alaya_run(threads, one_list_piece, &l, pieces, 1);
    }
    free(results), free(spans), free(before), free(jobs), free(limits);
    return failed ? -1 : 0;
}

typedef struct { const int64_t *src, *dst, *bytes; } copies;

static void one_copy(void *data, int64_t item, int64_t worker)
{
    const copies *c = data;
    (void)worker;
    memcpy((void *)c->dst[item], (const void *)c->src[item], (size_t)c->bytes[item]);
}

void alaya_copy_blocks(int64_t threads, const int64_t *src, const int64_t *dst, const int64_t *bytes,
                int64_t n)
{
    copies c = {src, dst, bytes};
    alaya_run(threads, one_copy, &c, n, 0);
}

typedef struct {
    const char *k, *v;
    const int64_t *addresses;
    int64_t n, k_head, k_token, v_head, v_token, k_bytes, v_bytes;
} writes;

static void one_write(void *data, int64_t head, int64_t worker)
{
    const writes *w = data;
    char *to = (char *)w->addresses[head];
    (void)worker;
    for (int64_t t = 0; t < w->n; t++, to += w->k_bytes + w->v_bytes) {
        memcpy(to, w->k + head * w->k_head + t * w->k_token, (size_t)w->k_bytes);
        memcpy(to + w->k_bytes, w->v + head * w->v_head + t * w->v_token, (size_t)w->v_bytes);
    }
}

/* All strides and sizes in bytes. */
void alaya_write_rows(int64_t threads, const char *k, const char *v, const int64_t *addresses,
                 int64_t heads, int64_t n, int64_t k_head, int64_t k_token, int64_t v_head, int64_t v_token,
                 int64_t k_bytes, int64_t v_bytes)
{
    writes w = {k, v, addresses, n, k_head, k_token, v_head, v_token, k_bytes, v_bytes};
    alaya_run(threads, one_write, &w, heads, 0);
}

#else /* once per instruction set from here on */

#include "vector.h"
#if VL == 8
#define ROWS 2 /* rows at a time: what 16 registers hold */
#else
#define ROWS 4
#endif

/* VL numbers of any storage dtype, exactly, as floats. */
INLINE vf NAME(load)(const char *p, int dtype)
{
    vf x;
    if (dtype == F32) {
        memcpy(&x, p, sizeof x);
        return x;
    }
    vh h;
    memcpy(&h, p, sizeof h);
#if VL == 16
    if (dtype == F16) return (vf)_mm512_cvtph_ps((__m256i)h);
    vi wide = (vi)_mm512_cvtepu16_epi32((__m256i)h);
#elif VL == 8
    if (dtype == F16) return (vf)_mm256_cvtph_ps((__m128i)h);
    vi wide = (vi)_mm256_cvtepu16_epi32((__m128i)h);
#else
    vi wide = __builtin_convertvector(h, vi);
#endif
    if (dtype == BF16) return (vf)(wide << 16);
    vi magnitude = wide & 0x7fff, special = magnitude >= 0x7c00;
    vf value = (vf)(magnitude << 13) * 0x1p112f;
    return (vf)((vi)pick(special, (vf)((magnitude << 13) | 0x7f800000), value) | ((wide & 0x8000) << 16));
}
#define load NAME(load)

/* The last n < VL numbers of a row, then zeros. */
INLINE vf NAME(load_tail)(const char *p, int64_t n, int dtype)
{
#if VL == 16
    if (dtype == F32) return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
    vh h = (vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
    return load((const char *)&h, dtype);
#else
    uint32_t words[VL] = {0};
    uint16_t halves[VL] = {0};
    for (int i = 0; i < VL - 1; i++)
        if (i < n && dtype == F32) memcpy(words + i, p + 4 * i, 4);
        else if (i < n) memcpy(halves + i, p + 2 * i, 2);
    return dtype == F32 ? load((const char *)words, dtype) : load((const char *)halves, dtype);
#endif
}
#define load_tail NAME(load_tail)

INLINE f4 NAME(sums)(vf a, vf b, vf c, vf d)
{
    f4 w = fold(a), x = fold(b), y = fold(c), z = fold(d);
    f4 wx = SHUFFLE4(w, x, 0, 4, 1, 5) + SHUFFLE4(w, x, 2, 6, 3, 7);
    f4 yz = SHUFFLE4(y, z, 0, 4, 1, 5) + SHUFFLE4(y, z, 2, 6, 3, 7);
    return SHUFFLE4(wx, yz, 0, 1, 4, 5) + SHUFFLE4(wx, yz, 2, 3, 6, 7);
}

/* s[row][token] = q[row] . k[token] for R rows (kp floats apart) and 4 tokens, which more tokens follow in row. */
INLINE void NAME(dots)(const float *q, int64_t kp, const char *const *row, int64_t k_dim, int dtype, int R, float *s)
{
    const int size = dtype == F32 ? 4 : 2;
    vf sum[ROWS][4];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int t = 0; t < 4; t++) sum[r][t] = (vf){0};
    int64_t d = 0;
    for (; d + VL <= k_dim; d += VL) {
        vf k[4];
        UNROLL for (int t = 0; t < 4; t++) k[t] = load(row[t] + d * size, dtype);
        if (d * size % 64 == 0)
            UNROLL for (int t = 0; t < NEAR; t++) FETCH_NEAR(row[t + NEAR] + d * size);
        UNROLL for (int r = 0; r < R; r++) {
            vf x = loadf(q + r * kp + d);
            UNROLL for (int t = 0; t < 4; t++) sum[r][t] += x * k[t];
        }
    }
    if (d < k_dim) {
        UNROLL for (int t = 0; t < 4; t++) {
            vf k = load_tail(row[t] + d * size, k_dim - d, dtype);
            UNROLL for (int r = 0; r < R; r++) sum[r][t] += loadf(q + r * kp + d) * k;
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        f4 x = NAME(sums)(sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
        memcpy(s + r * TILE, &x, sizeof x);
    }
}

/* acc[row][d..] += s[row][token] * v[token][d..] over a tile, for R rows and C vectors (n numbers when a tail). */
INLINE void NAME(sweep)(const tile *t, const tile *next, int64_t skip, const float *s, float *acc, int64_t vp,
                        int64_t tail, int dtype, int R, int C)
{
    const int size = dtype == F32 ? 4 : 2;
    vf sum[ROWS][4];
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) sum[r][c] = loadf(acc + r * vp + c * VL);
    for (int i = 0; i < t->n; i++) {
        vf v[4];
        if (next)
            UNROLL for (int c = 0; c < C * VL * size; c += 64) {
                FETCH_FAR(next->row[i] + skip + c);
                FETCH_NEAR(t->row[i + NEAR] + skip + c);
            }
        UNROLL for (int c = 0; c < C; c++)
            v[c] = tail ? load_tail(t->row[i] + skip, tail, dtype) : load(t->row[i] + skip + c * VL * size, dtype);
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int c = 0; c < C; c++) sum[r][c] += s[r * TILE + i] * v[c];
    }
    UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) storef(acc + r * vp + c * VL, sum[r][c]);
}

/* Scores (values = 0) or values of a tile for R rows; the first rows also fetch the same columns of the next tile. */
INLINE void NAME(rows)(const job *j, const tile *t, const tile *next, const float *q, float *s, float *acc, int values,
                       int dtype, int R)
{
    const int64_t size = dtype == F32 ? 4 : 2;
    int64_t d = 0;
    if (!values) {
        for (int i = 0; i < t->n; i += 4) {
            if (next)
                for (int64_t c = 0; c < j->k_dim * size; c += 64)
                    UNROLL for (int n = 0; n < 4; n++) FETCH_FAR(next->row[i + n] + c);
            NAME(dots)(q, j->k_pad, t->row + i, j->k_dim, dtype, R, s + i);
        }
        return;
    }
    for (; d + 4 * VL <= j->v_dim; d += 4 * VL)
        NAME(sweep)(t, next, (j->v_at + d) * size, s, acc + d, j->v_pad, 0, dtype, R, 4);
    for (; d + VL <= j->v_dim; d += VL)
        NAME(sweep)(t, next, (j->v_at + d) * size, s, acc + d, j->v_pad, 0, dtype, R, 1);
    if (d < j->v_dim) NAME(sweep)(t, next, (j->v_at + d) * size, s, acc + d, j->v_pad, j->v_dim - d, dtype, R, 1);
}

/* One pass over the keys or values of a tile for all rows. */
INLINE void NAME(pass)(const job *j, const tile *t, const tile *next, const float *q, float *s, float *acc, int values,
                       int dtype)
{
    int64_t r = 0;
    for (; r + ROWS <= j->rows; r += ROWS, next = NULL)
        NAME(rows)(j, t, next, q + r * j->k_pad, s + r * TILE, acc + r * j->v_pad, values, dtype, ROWS);
    for (; r < j->rows; r++, next = NULL)
        NAME(rows)(j, t, next, q + r * j->k_pad, s + r * TILE, acc + r * j->v_pad, values, dtype, 1);
}

static void NAME(tile_pass)(const job *j, const tile *t, const tile *next, const float *q, float *s, float *acc,
                            int values)
{
    if (j->dtype == F32) NAME(pass)(j, t, next, q, s, acc, values, F32);
    else if (j->dtype == BF16) NAME(pass)(j, t, next, q, s, acc, values, BF16);
    else NAME(pass)(j, t, next, q, s, acc, values, F16);
}

/* Scores of one row to weights, in place; rescales acc when the maximum moved. state: maximum, sum. */
static void NAME(weigh)(const job *j, const tile *t, int64_t r, float *s, float *acc, float *state)
{
    int padded = (t->n + VL - 1) / VL * VL;
    float top = state[0];
    if (j->softcap > 0)
        for (int i = 0; i < t->n; i += VL) {
            vf x = loadf(s + i) / j->softcap;
            vf e = vexp(-2.0f * pick(x < 0.0f, -x, x)), y = (1.0f - e) / (1.0f + e) * j->softcap;
            storef(s + i, pick(x < 0.0f, -y, y));
        }
    for (int i = t->n; i < padded; i++) s[i] = -INFINITY;
    if (t->low < j->lo[r] || t->high >= j->hi[r])
        for (int i = 0; i < t->n; i++)
            if (t->position[i] < j->lo[r] || t->position[i] >= j->hi[r]) s[i] = -INFINITY;
    vf most = loadf(s);
    for (int i = VL; i < padded; i += VL) most = pick(loadf(s + i) > most, loadf(s + i), most);
    float peak = NAME(largest)(most);
    top = peak > top ? peak : top;
    if (top > state[0]) {
        float shrink = expf(state[0] - top);
        state[0] = top;
        state[1] *= shrink;
        for (int64_t d = 0; d < j->v_pad; d += VL) storef(acc + d, loadf(acc + d) * shrink);
    }
    vf total = {0};
    float base = top == -INFINITY ? 0 : top;
    for (int i = 0; i < padded; i += VL) {
        vf x = vexp(loadf(s + i) - base);
        total += x;
        storef(s + i, x);
    }
    state[1] += NAME(total)(total);
}

static void NAME(attend_piece)(const job *j, int64_t head, int64_t first, int64_t last, float *result, float *scratch)
{
    float *q = scratch, *s = scratch + j->rows * j->k_pad, *state = result + j->rows * j->v_pad;
    memset(result, 0, sizeof(float) * j->rows * (j->v_pad + 2));
    memset(q, 0, sizeof(float) * j->rows * j->k_pad);
    for (int64_t r = 0; r < j->rows; r++) {
        state[2 * r] = -INFINITY;
        const float *from = j->q + (head * j->rows + r) * j->k_dim;
        for (int64_t d = 0; d < j->k_dim; d++) q[r * j->k_pad + d] = from[d] * j->scale;
    }
    tile tiles[2];
    cursor c = seek(j, head, first, last);
    next_tile(j, &c, &tiles[0]);
    for (int now = 0; tiles[now].n > 0; now ^= 1) {
        const tile *t = &tiles[now], *next = &tiles[now ^ 1];
        next_tile(j, &c, &tiles[now ^ 1]);
        NAME(tile_pass)(j, t, next, q, s, result, 0);
        for (int64_t r = 0; r < j->rows; r++)
            NAME(weigh)(j, t, r, s + r * TILE, result + r * j->v_pad, state + 2 * r);
        NAME(tile_pass)(j, t, next, q, s, result, 1);
    }
}

#include "vector_end.h"
#undef ROWS
#undef load
#undef load_tail
#endif
