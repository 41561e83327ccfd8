/* Many small reads at once, and their digests: what a page at a time costs too much for in Python.
 *
 * alaya_read uses Linux AIO through the system calls themselves: one thread keeps up to `depth` reads of O_DIRECT files
 * under way at 3 to 5 us of CPU each, where a thread for each costs 20. */
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#endif

#define MOST 256 /* depth.py has it too */
#define FEW 32
#define KEPT 32

typedef uint64_t (*hash_fn)(const void *, size_t);

/* Digests of every page of n extents of nbytes; the last page of each may be shorter. out: [n, pages]. */
void alaya_digest(hash_fn hash, int64_t n, const int64_t *addresses, int64_t nbytes, int64_t page, uint64_t *out)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t at = 0; at < nbytes; at += page)
            *out++ = hash((const char *)addresses[i] + at, (size_t)(nbytes - at < page ? nbytes - at : page));
}

/* One after the other: where there is no AIO. */
static void read_each(int64_t n, const int32_t *files, const int64_t *offsets, const int64_t *first,
                      const struct iovec *pieces, int64_t *done)
{
    for (int64_t i = 0; i < n; i++) {
        ssize_t got = preadv(files[i], pieces + first[i], (int)(first[i + 1] - first[i]), offsets[i]);
        done[i] = got < 0 ? -errno : got;
    }
}

#ifdef __linux__
/* Contexts nobody uses now. Destroying one takes 30 ms: the kernel waits until no processor can know of it any more.
 * They belong to a process: a forked child has none of them. */
static _Atomic(aio_context_t) kept[KEPT];
static _Atomic pid_t owner;

static aio_context_t take(void)
{
    if (atomic_exchange(&owner, getpid()) != getpid())
        for (int i = 0; i < KEPT; i++)
            atomic_store(&kept[i], 0);
    aio_context_t context = 0;
    for (int i = 0; i < KEPT && !context; i++)
        context = atomic_exchange(&kept[i], 0);
    if (context || !syscall(SYS_io_setup, MOST, &context)) /* all processes share fs.aio-max-nr */
        return context;
    return syscall(SYS_io_setup, FEW, &context) ? 0 : context;
}

static void give(aio_context_t context)
{
    aio_context_t empty = 0;
    for (int i = 0; i < KEPT; i++, empty = 0)
        if (atomic_compare_exchange_strong(&kept[i], &empty, context))
            return;
    syscall(SYS_io_destroy, context);
}
#endif

/* n reads: of files[i] from offsets[i] into pieces addresses[first[i]] .. addresses[first[i + 1] - 1] of `page` bytes.
 * depth: reads under way at a time, at most MOST. done[i]: bytes read, or -errno. Returns 0, or -1 without memory.
 * Blocks until every read has ended. */
int alaya_read(int64_t n, const int32_t *files, const int64_t *offsets, const int64_t *first, const int64_t *addresses,
               int64_t page, int64_t depth, int64_t *done)
{
    struct iovec *pieces = malloc(sizeof *pieces * (size_t)(first[n] + 1));
    if (!pieces)
        return -1;
    for (int64_t i = 0; i < first[n]; i++)
        pieces[i] = (struct iovec){(void *)addresses[i], (size_t)page};
#ifdef __linux__
    aio_context_t context = n > 1 ? take() : 0;
    if (context) {
        struct iocb requests[MOST], *list[MOST];
        struct io_event events[MOST];
        int64_t next = 0, under_way = 0;
        int idle[MOST], n_idle = (int)(depth < MOST ? depth : MOST);
        for (int i = 0; i < n_idle; i++)
            idle[i] = i;
        while (next < n || under_way) {
            int taken = 0;
            for (; taken < n_idle && next + taken < n; taken++) {
                int slot = idle[n_idle - 1 - taken];
                int64_t i = next + taken;
                memset(&requests[slot], 0, sizeof requests[slot]);
                requests[slot].aio_fildes = (uint32_t)files[i];
                requests[slot].aio_lio_opcode = IOCB_CMD_PREADV;
                requests[slot].aio_buf = (uint64_t)(uintptr_t)(pieces + first[i]);
                requests[slot].aio_nbytes = (uint64_t)(first[i + 1] - first[i]);
                requests[slot].aio_offset = offsets[i];
                requests[slot].aio_data = (uint64_t)i << 8 | (uint64_t)slot;
                list[taken] = &requests[slot];
            }
            int64_t started = taken ? syscall(SYS_io_submit, context, (long)taken, list) : 0;
            if (started < 0 && errno == EINTR)
                continue;
            if (taken && started <= 0 && !under_way) { /* refused, and nothing will end: this one by hand */
                read_each(1, files + next, offsets + next, first + next, pieces, done + next);
                next++;
                continue;
            }
            if (started > 0) {
                next += started;
                n_idle -= (int)started;
                under_way += started;
            }
            int64_t ended = syscall(SYS_io_getevents, context, 1L, (long)MOST, events, NULL);
            for (int64_t k = 0; k < ended; k++) {
                done[events[k].data >> 8] = events[k].res;
                idle[n_idle++] = (int)(events[k].data & 255);
            }
            under_way -= ended > 0 ? ended : 0;
        }
        give(context);
        free(pieces);
        return 0;
    }
#endif
    read_each(n, files, offsets, first, pieces, done);
    free(pieces);
    return 0;
}
