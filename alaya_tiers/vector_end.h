/* Undoes the names of vector.h, before the next instruction set. */
#undef NAME2
#undef NAME1
#undef NAME
#undef UNROLL
#undef INLINE
#undef SHUFFLE4
#undef vf
#undef vi
#undef vu
#undef vh
#undef pick
#undef loadf
#undef storef
#undef fold
#undef vexp
#undef any
