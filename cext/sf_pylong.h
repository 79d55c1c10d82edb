/* Python ints -> uint32, read where they lie.

   Contract: sf_uint32_of_longs takes exact ints (no subclasses) from 0 to what an int of one digit holds (2^30 - 1; a token id is far
   below) and nothing else: at anything unusual it says so and the caller goes the way of the C API, which knows all ints and all errors.
   The GIL is held; nothing here runs Python code.
   Why: PyLong_AsLongLong is a call with checks for each id, three quarters of the time of hashing a list. The layout is CPython's own
   (Include/cpython/longintrepr.h): up to 3.11 a signed count of digits; from 3.12 on behind PyUnstable_Long_*, which is made for this.
*/
#ifndef SF_PYLONG_H
#define SF_PYLONG_H

#include <Python.h>
#include <stdint.h>

/* The value of an exact int, negative when it has more than one digit or is below 0. */
static inline int64_t sf_one_digit(PyObject *item) {
    const PyLongObject *number = (const PyLongObject *)item;
#if PY_VERSION_HEX >= 0x030C0000
    return PyUnstable_Long_IsCompact(number) ? (int64_t)PyUnstable_Long_CompactValue(number) : -1;
#else
    Py_ssize_t digits = Py_SIZE(number); /* with the sign of the int */
    if (__builtin_expect(digits == 1, 1)) return number->ob_digit[0];
    return digits == 0 ? 0 : -1;
#endif
}

/* Write `count` ids. Returns 1, or 0 when one of them is unusual: what was written then says nothing. */
static inline int sf_uint32_of_longs(PyObject *const *items, Py_ssize_t count, uint32_t *restrict ids) {
    /* In a register: through the global offset table it would be read again after each id that is written. */
    PyTypeObject *exact = &PyLong_Type;
    __asm__("" : "+r"(exact));
#pragma GCC unroll 4
    for (Py_ssize_t i = 0; i < count; i++) {
        /* The type first: of anything else the rest is not there to be read. */
        if (__builtin_expect(Py_TYPE(items[i]) != exact, 0)) return 0;
        int64_t value = sf_one_digit(items[i]);
        if (__builtin_expect(value < 0, 0)) return 0;
        ids[i] = (uint32_t)value;
    }
    return 1;
}

_Static_assert(PyLong_SHIFT <= 32, "one digit must fit into 32 bits");

#endif
