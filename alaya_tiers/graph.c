/* A walk over a graph of keys to all that are within beta of the best score, for all query heads of a kv head at once.
 *
 * First a beam for each query: the best keys seen so far are expanded, best first, until the beam's keys all are. Then
 * everything seen that is near enough is expanded, and what that brings to light, until nothing near is left. A key that one
 * query comes by is scored for all. Keys that are not asked for are never scored, but walked through to those behind.
 * index/graph.py says where this comes from.
 *
 * Like attend.c this file includes itself once per instruction set.
 */
#ifndef VL
#define _GNU_SOURCE
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include "pool.h"
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define X86 1
#endif

enum { MAX_ROWS = 64, GROUP = 4, AHEAD = 3 }; /* GROUP: rows scored together; AHEAD: keys fetched before their turn */

typedef struct { float score; int32_t key; } seat;

typedef struct walk {
    const float *keys;         /* [n][dim] */
    const int32_t *neighbours; /* [n][degree]; what follows the first that is no key does not count */
    const float *q;            /* [rows][dim] */
    const int64_t *ranges;     /* [n_ranges][2]: positions asked for, ascending, apart */
    int64_t n, dim, degree, rows, n_ranges, beam, fan;
    float beta, best[MAX_ROWS]; /* best: of what was scored, or the seed when the beams are done */
    uint8_t *seen, *expanded;  /* a bit for each key */
    int32_t *fresh;            /* [fan + 2 degree]: what an expansion brings to light */
    int32_t *list;             /* [room]: keys scored, in order */
    float *scores;             /* [room][rows] */
    int64_t listed, room;
    seat *beams;               /* [rows][beam], best first */
    int64_t seated[MAX_ROWS], next[MAX_ROWS]; /* before next all are expanded */
    int in_beams;
    void (*score)(struct walk *, int64_t);
} walk;

static int marked(const uint8_t *bits, int32_t key) { return bits[key >> 3] >> (key & 7) & 1; }

static int mark(uint8_t *bits, int32_t key)
{
    int before = marked(bits, key);
    bits[key >> 3] |= (uint8_t)(1 << (key & 7));
    return before;
}

static int asked(const walk *w, int32_t key)
{
    int64_t a = 0, b = w->n_ranges;
    while (a < b) {
        int64_t mid = (a + b) / 2;
        if (key >= w->ranges[2 * mid + 1]) a = mid + 1; else b = mid;
    }
    return a < w->n_ranges && key >= w->ranges[2 * a];
}

static void seat_key(walk *w, int64_t r, float score, int32_t key)
{
    seat *beam = w->beams + r * w->beam;
    int64_t a = 0, b = w->seated[r];
    if (b == w->beam && score <= beam[b - 1].score) return;
    while (a < b) {
        int64_t mid = (a + b) / 2;
        if (beam[mid].score >= score) a = mid + 1; else b = mid;
    }
    if (w->seated[r] < w->beam) w->seated[r]++;
    memmove(beam + a + 1, beam + a, sizeof(seat) * (size_t)(w->seated[r] - 1 - a));
    beam[a] = (seat){score, key};
    if (a < w->next[r]) w->next[r] = a;
}

#define SELF "graph.c"
#include "widths.h"

/* Score w->fresh; returns -1 when memory ran out. */
static int take(walk *w, int64_t count)
{
    if (w->listed + count > w->room) {
        int64_t room = 2 * w->room > w->listed + count ? 2 * w->room : w->listed + count;
        int32_t *list = realloc(w->list, sizeof(int32_t) * (size_t)room);
        if (list) w->list = list;
        float *scores = realloc(w->scores, sizeof(float) * (size_t)(room * w->rows));
        if (scores) w->scores = scores;
        if (!list || !scores) return -1;
        w->room = room;
    }
    memcpy(w->list + w->listed, w->fresh, sizeof(int32_t) * (size_t)count);
    w->score(w, count);
    for (int64_t i = w->listed; i < w->listed + count; i++)
        for (int64_t r = 0; r < w->rows; r++) {
            float x = w->scores[i * w->rows + r];
            if (x > w->best[r]) w->best[r] = x;
            if (w->in_beams) seat_key(w, r, x, w->list[i]);
        }
    w->listed += count;
    return 0;
}

/* Score the neighbours of a key that are asked for, and of the others their neighbours: those at most fan in all. */
static int expand(walk *w, int32_t key)
{
    const int32_t *near = w->neighbours + key * w->degree;
    int64_t count = 0;
    mark(w->expanded, key);
    for (int64_t i = 0; i < w->degree && (uint32_t)near[i] < (uint32_t)w->n; i++) {
        if (asked(w, near[i])) {
            if (!mark(w->seen, near[i])) w->fresh[count++] = near[i];
            continue;
        }
        if (count >= w->fan || mark(w->seen, near[i])) continue;
        const int32_t *behind = w->neighbours + near[i] * w->degree;
        for (int64_t j = 0; j < w->degree && (uint32_t)behind[j] < (uint32_t)w->n; j++)
            if (asked(w, behind[j]) && !mark(w->seen, behind[j])) w->fresh[count++] = behind[j];
    }
    return take(w, count);
}

static int near_enough(const walk *w, int64_t i)
{
    for (int64_t r = 0; r < w->rows; r++)
        if (w->scores[i * w->rows + r] >= w->best[r] - w->beta) return 1;
    return 0;
}

static int walk_beams(walk *w)
{
    for (int moved = 1; moved;) {
        moved = 0;
        for (int64_t r = 0; r < w->rows; r++) {
            const seat *beam = w->beams + r * w->beam;
            while (w->next[r] < w->seated[r] && marked(w->expanded, beam[w->next[r]].key)) w->next[r]++;
            if (w->next[r] == w->seated[r]) continue;
            if (expand(w, beam[w->next[r]].key)) return -1;
            moved = 1;
        }
    }
    return 0;
}

/* Returns how many were found, or -1 when memory ran out. entries: [n_entries], keys of the graph. seed: [rows].
 * found: [n]; found_scores: [n][rows]. scored: how many keys were compared with the queries. */
int64_t alaya_walk(const float *keys, const int32_t *neighbours, const float *q, const int64_t *ranges,
                   const int32_t *entries, const float *seed, int64_t n, int64_t dim, int64_t degree, int64_t rows,
                   int64_t n_ranges, int64_t n_entries, int64_t beam, int64_t fan, float beta, int32_t *found,
                   float *found_scores, int64_t *scored)
{
    walk s = {.keys = keys, .neighbours = neighbours, .q = q, .ranges = ranges, .n = n, .dim = dim, .degree = degree,
               .rows = rows, .n_ranges = n_ranges, .beam = beam, .fan = fan, .beta = beta, .in_beams = 1,
               .room = n_entries + 1024, .score = score_4}, *w = &s;
#ifdef X86
    int widest = alaya_widest();
    if (widest == 16) w->score = score_16;
    else if (widest == 8) w->score = score_8;
#endif
    w->seen = calloc((size_t)(n + 7) / 8, 1);
    w->expanded = calloc((size_t)(n + 7) / 8, 1);
    w->fresh = malloc(sizeof(int32_t) * (size_t)(fan + 2 * degree > n_entries ? fan + 2 * degree : n_entries));
    w->list = malloc(sizeof(int32_t) * (size_t)w->room);
    w->scores = malloc(sizeof(float) * (size_t)(w->room * rows));
    w->beams = malloc(sizeof(seat) * (size_t)(rows * beam));
    int64_t count = 0;
    int failed = !w->seen || !w->expanded || !w->fresh || !w->list || !w->scores || !w->beams;
    for (int64_t r = 0; r < rows; r++) w->best[r] = -INFINITY;
    for (int64_t i = 0; !failed && i < n_entries; i++)
        if (asked(w, entries[i]) && !mark(w->seen, entries[i])) w->fresh[count++] = entries[i];
    failed = failed || take(w, count) || walk_beams(w);
    w->in_beams = 0;
    for (int64_t r = 0; r < rows; r++)
        if (seed[r] > w->best[r]) w->best[r] = seed[r];
    for (int64_t i = 0; !failed && i < w->listed; i++)
        if (!marked(w->expanded, w->list[i]) && near_enough(w, i)) failed = expand(w, w->list[i]);
    count = 0;
    for (int64_t i = 0; !failed && i < w->listed; i++)
        if (near_enough(w, i)) {
            found[count] = w->list[i];
            memcpy(found_scores + count++ * rows, w->scores + i * rows, sizeof(float) * (size_t)rows);
        }
    *scored = w->listed;
    free(w->seen), free(w->expanded), free(w->fresh), free(w->list), free(w->scores), free(w->beams);
    return failed ? -1 : count;
}

#else /* once per instruction set from here on */
#include "vector.h"

/* Scores of R queries with one key. */
INLINE void NAME(dots)(const float *key, const float *q, int64_t dim, float *out, int R)
{
    vf sum[GROUP];
    int64_t d = 0;
    UNROLL for (int r = 0; r < R; r++) sum[r] = (vf){0};
    for (; d + VL <= dim; d += VL) {
        const vf k = loadf(key + d);
        UNROLL for (int r = 0; r < R; r++) sum[r] += k * loadf(q + r * dim + d);
    }
    UNROLL for (int r = 0; r < R; r++) {
        out[r] = NAME(total)(sum[r]);
        for (int64_t t = d; t < dim; t++) out[r] += key[t] * q[r * dim + t];
    }
}

/* Scores of the next count keys of the list. */
static void NAME(score)(walk *w, int64_t count)
{
    const int32_t *list = w->list + w->listed;
    for (int64_t i = 0; i < count + AHEAD; i++) {
        if (i < count) {
            const char *key = (const char *)(w->keys + list[i] * w->dim);
            for (int64_t b = 0; b < 4 * w->dim; b += 64) __builtin_prefetch(key + b, 0, 3);
        }
        if (i < AHEAD) continue;
        const float *key = w->keys + list[i - AHEAD] * w->dim;
        float *out = w->scores + (w->listed + i - AHEAD) * w->rows;
        int64_t r = 0;
        for (; r + GROUP <= w->rows; r += GROUP) NAME(dots)(key, w->q + r * w->dim, w->dim, out + r, GROUP);
        for (; r < w->rows; r++) NAME(dots)(key, w->q + r * w->dim, w->dim, out + r, 1);
    }
}

#include "vector_end.h"
#endif
