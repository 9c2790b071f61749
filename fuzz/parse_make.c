/* The zygote's reading of a MAKE message, and init's of the numbers in cgroup files. */
#include "../isojob/native/cell.c"

#include "targets.h"

int fuzz_make(const uint8_t *data, size_t size)
{
    static struct config config = {.nhier = 3};
    struct cell cell = {.config = &config};
    struct reader r = {.at = data, .end = data + size};
    uint32_t mask = 0;
    int result = parse_make(&cell, &mask, &r);
    if (result == 0 && mask >> config.nhier)
        abort();
    return result;
}
