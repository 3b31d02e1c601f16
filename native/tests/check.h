// What the test programs share.
#pragma once
#include <cstdio>
#include <cstdlib>

#include "gmtp/error.h"

inline void check(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "FAILED: %s\n", what);
    std::exit(1);
}

template <class F> void check_refused(F&& body, const char* what) {
    try {
        body();
    } catch (const gmtp::InputError&) {
        return;
    }
    check(false, what);
}
