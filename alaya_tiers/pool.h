/* What attend.c does for the other kernels; hidden from other libraries. */
#include <stdint.h>
#define HIDDEN __attribute__((visibility("hidden")))

/* Items of work for several threads. */
HIDDEN void alaya_run(int64_t threads, void (*one)(void *job, int64_t item, int64_t worker), void *job, int64_t items,
                      int may_borrow);
enum { ALAYA_MAX_THREADS = 256 };

/* Floats in the widest vectors of this processor that there is code for: 16 (AVX-512), 8 (AVX2) or 4. */
HIDDEN int alaya_widest(void);
#ifndef ALAYA_MOST
#define ALAYA_MOST 16 /* and that may be used; tests build narrower ones */
#endif
