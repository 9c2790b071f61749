/* The zygote's reading of a SESSION message. */
#include "../isojob/native/session.c"

#include "targets.h"

int fuzz_session(const uint8_t *data, size_t size)
{
    struct directory d = {0};
    struct reader r = {.at = data, .end = data + size};
    return parse(&d, &r);
}
