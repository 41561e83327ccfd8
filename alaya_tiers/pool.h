/* Items of work for several threads, in attend.c; hidden from other libraries. */
#include <stdint.h>
__attribute__((visibility("hidden"))) void alaya_run(int64_t threads, void (*one)(void *job, int64_t item, int64_t worker),
                                                     void *job, int64_t items, int may_borrow);
enum { ALAYA_MAX_THREADS = 256 };

#ifndef ALAYA_MOST
#define ALAYA_MOST 16 /* floats in the widest vectors that may be used; tests build narrower ones */
#endif
